"""A head's arrays, and its logits for a tile of positions × vocabulary rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import einsum
from ntkrl.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias"),
    meta_fields=("scale", "soft_cap"),
)
@dataclasses.dataclass(frozen=True)
class Head:
    """z = κ tanh(s (W φ + b) / κ).

    weight: W `[V, D]`.
    bias: b `[V]`, or None.
    scale: s.
    soft_cap: κ, or None for no cap.
    """

    weight: Array
    bias: Array | None = None
    scale: float = 1.0
    soft_cap: float | None = None


class Tiling(NamedTuple):
    """What is static of a pass.

    temperature: divides the logits.
    rows: vocabulary rows per tile; None for all.
    top: k of the likeliest tokens to return.
    """

    temperature: float
    rows: int | None
    top: int


def logits(head: Head, features: Array) -> Array:
    """Return `[..., V]` logits of features `[..., D]`, float32 or better."""
    return capped(head, products(features, head.weight, head.bias, head.scale))


def products(features: Array, weight_RD: Array, bias_R: Array | None, scale: float) -> Array:
    """Return s (W φ + b) `[..., R]` for some rows of the head, float32 or better."""
    wide = jnp.promote_types(features.dtype, jnp.float32)
    found = einsum(
        "...d,vd->...v", features, weight_RD.astype(features.dtype), preferred_element_type=wide
    )
    if bias_R is not None:
        found += bias_R.astype(wide).reshape((1,) * (found.ndim - 1) + (-1,))
    return found if scale == 1.0 else scale * found


def capped(head: Head, raw: Array) -> Array:
    """Apply the head's soft cap, if it has one."""
    return raw if head.soft_cap is None else head.soft_cap * jnp.tanh(raw / head.soft_cap)


class Tile(NamedTuple):
    """Vocabulary rows start … start + R − 1 of the head; `fresh` marks those not seen before."""

    start: Array
    weight: Array
    bias: Array | None
    fresh: Array


def cut(head: Head, rows: int, number: Array) -> Tile:
    """Cut tile `number`; the last one is moved back to fit, its rows seen before masked."""
    size = head.weight.shape[0]
    first = number * rows
    start = jnp.minimum(first, size - rows)
    bias = None if head.bias is None else jax.lax.dynamic_slice_in_dim(head.bias, start, rows)
    weight = jax.lax.dynamic_slice_in_dim(head.weight, start, rows)
    return Tile(start, weight, bias, start + jnp.arange(rows) >= first)


def tile_count(head: Head, tiling: Tiling) -> tuple[int, int]:
    """Return rows per tile and how many tiles."""
    size = head.weight.shape[0]
    rows = size if tiling.rows is None else min(tiling.rows, size)
    return rows, -(-size // rows)


def tile_logits(head: Head, tile: Tile, phi: Array, temperature: float) -> Array:
    """Return the tempered logits of a tile `[..., R]`, −∞ where the tile before had the row."""
    found = capped(head, products(phi, tile.weight, tile.bias, head.scale)) / temperature
    return jnp.where(tile.fresh[None], found, -jnp.inf)
