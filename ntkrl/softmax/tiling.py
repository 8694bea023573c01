"""The output head, and its logits for a tile of vocabulary rows."""

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
class OutputHead:
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


class Tile(NamedTuple):
    """Vocabulary rows start … start + R − 1 of the head; `fresh` is False on repeated rows."""

    start: Array
    weight: Array
    bias: Array | None
    fresh: Array


def logits(head: OutputHead, features: Array) -> Array:
    """Return `[..., V]` logits of features `[..., D]`, float32 or better.

    Of features in half precision there are derivatives in reverse mode only, by products in half
    precision as in the forward pass; a float32 product takes 6 to 16 times as long.
    """
    half = features.dtype.itemsize < jnp.dtype(jnp.float32).itemsize
    product = (_half_product if half else _product)(features, head.weight)
    return _capped(head, _affine(product, head.bias, head.scale))


def uncapped_logits(features: Array, weight_RD: Array, bias_R: Array | None, scale: float) -> Array:
    """Return s (W φ + b) `[..., R]` for some rows of the head, float32 or better."""
    return _affine(_product(features, weight_RD), bias_R, scale)


def _affine(product: Array, bias_R: Array | None, scale: float) -> Array:
    if bias_R is not None:
        product += bias_R.astype(product.dtype).reshape((1,) * (product.ndim - 1) + (-1,))
    return product if scale == 1.0 else scale * product


def _product(features: Array, weight_RD: Array) -> Array:
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    weight_RD = weight_RD.astype(features.dtype)
    return einsum("...d,vd->...v", features, weight_RD, preferred_element_type=dtype)


_half_product = jax.custom_vjp(_product)


def _half_forward(features: Array, weight_RD: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(features, weight_RD), (features, weight_RD)


def _half_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    features, weight_RD = residuals
    multiply = functools.partial(einsum, preferred_element_type=cotangent.dtype)
    dz = cotangent.astype(features.dtype)
    d_features = multiply("...v,vd->...d", dz, weight_RD.astype(features.dtype))
    d_weight = multiply("...v,...d->vd", dz, features)
    return d_features.astype(features.dtype), d_weight.astype(weight_RD.dtype)


_half_product.defvjp(_half_forward, _half_backward)


def tile_count(head: OutputHead, chunk_vocabulary: int | None) -> tuple[int, int]:
    """Return the rows per tile, V for None, and the number of tiles."""
    size = head.weight.shape[0]
    rows = size if chunk_vocabulary is None else min(chunk_vocabulary, size)
    return rows, -(-size // rows)


def slice_tile(head: OutputHead, rows: int, number: Array) -> Tile:
    """Return tile `number`; the last one starts early enough to fit and repeats some rows."""
    size = head.weight.shape[0]
    first = number * rows
    start = jnp.minimum(first, size - rows)
    bias = None if head.bias is None else jax.lax.dynamic_slice_in_dim(head.bias, start, rows)
    weight = jax.lax.dynamic_slice_in_dim(head.weight, start, rows)
    return Tile(start, weight, bias, start + jnp.arange(rows) >= first)


def tile_logits(head: OutputHead, tile: Tile, phi: Array, temperature: float) -> Array:
    """Return the logits of a tile divided by the temperature, `[..., R]`; −∞ on repeated rows."""
    raw = uncapped_logits(phi, tile.weight, tile.bias, head.scale)
    return jnp.where(tile.fresh[None], _capped(head, raw) / temperature, -jnp.inf)


def _capped(head: OutputHead, raw: Array) -> Array:
    return raw if head.soft_cap is None else head.soft_cap * jnp.tanh(raw / head.soft_cap)
