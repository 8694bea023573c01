"""Statistics of next-token distributions from features and head: one pass, no logits kept.

Logits z = s (W φ + b), capped κ tanh(z / κ) where the head says so and divided by the temperature,
exist for a tile of positions × vocabulary rows at a time. What a softmax needs of all V (log Σ eᶻ
and its moments) is gathered online over the tiles, and the backward pass makes each tile again:

    ∂ log π(y)/∂z = e_y − π        ∂H/∂z = −π (log π + H)       ∂Σπ²/∂z = 2π (π − Σπ²)
    ∂ max π/∂z = max π (e_max − π)  ∂KL(π‖ρ)/∂z = π (log π − log ρ − KL)

Everything is float32 or better whatever the model's dtype. Source: the online softmax of Milakov &
Gimelshein 1805.02867; the moments ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum, primal
from ntkrl.softmax.moments import Sums, TokenStatistics, finish, gather, nothing, pull_logits
from ntkrl.softmax.tiles import Head, Tile, Tiling, cut, tile_count, tile_logits
from ntkrl.types import Array


def token_statistics(
    head: Head,
    features: Array,
    targets: Array,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    chunk_vocabulary: int | None = None,
    reference: tuple[Head, Array] | None = None,
    top: int = 0,
) -> TokenStatistics:
    """Read log-prob, entropy, Σπ², arg-max mass and KL of every position from its features.

    Differentiable (in reverse) in head and features through log_probs, entropy, sum_squares,
    max_prob and kl; the reference and the top tokens are constants. Chunks run over the last axis
    of positions, so that rows spread over devices stay there.

    Args:
      head: the head's arrays.
      features: `[..., T, D]`.
      targets: `[..., T]` int token whose log-prob is wanted.
      temperature: divides the logits, the reference's too; > 0.
      chunk_tokens: positions whose logits exist at a time, ≥ 1; a chunk holds one column of all
        rows at least.
      chunk_vocabulary: vocabulary rows whose logits exist at a time, ≥ 1; None for all.
      reference: head and features `[..., T, D']` of ρ, or None.
      top: how many of the likeliest tokens to return.

    Returns:
      TokenStatistics with arrays of the shape of `targets`.
    """
    *rows, columns = targets.shape
    width = max(1, chunk_tokens // max(1, math.prod(rows)))
    tiling = Tiling(temperature, chunk_vocabulary, top)
    if reference is not None:
        reference = jax.lax.stop_gradient(reference)
    if columns <= width:
        return _flat(tiling, head, features, targets, reference)
    count = -(-columns // width)
    axis = len(rows)

    def split(values: Array) -> Array:
        padding = [(0, 0)] * values.ndim
        padding[axis] = (0, count * width - columns)
        shape = (*values.shape[:axis], count, width, *values.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(values, padding).reshape(shape), axis, 0)

    def join(values: Array) -> Array:
        whole = jnp.moveaxis(values, 0, axis)
        return whole.reshape(*rows, count * width, *values.shape[axis + 2 :])[
            (slice(None),) * axis + (slice(columns),)
        ]

    def chunk(parts: Any) -> TokenStatistics:
        phi, y, other = parts
        beside = None if reference is None else (reference[0], other)
        return _flat(tiling, head, phi, y, beside)

    other = None if reference is None else split(reference[1])
    return jax.tree.map(join, jax.lax.map(chunk, (split(features), split(targets), other)))


def logit_statistics(values: Array, targets: Array) -> TokenStatistics:
    """Read the statistics of logits that exist: `[..., V]` and targets `[...]`.

    The values of `token_statistics` without a reference, for callers that keep the logits of a
    few positions from the forward to the backward pass.
    """
    wide = at_least_float32(values).reshape(-1, values.shape[-1])
    return _shaped(_of_logits(wide, targets.reshape(-1)), targets.shape)


def _flat(
    tiling: Tiling, head: Head, phi: Array, y: Array, reference: tuple[Head, Array] | None
) -> TokenStatistics:
    """Read a chunk as one axis of positions."""
    if reference is not None:
        reference = (reference[0], reference[1].reshape(y.size, -1))
    found = _statistics(tiling, head, phi.reshape(y.size, -1), y.reshape(-1), reference)
    return _shaped(found, y.shape)


def _shaped(found: TokenStatistics, shape: tuple[int, ...]) -> TokenStatistics:
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), found)


def _read(
    tiling: Tiling, head: Head, phi: Array, y: Array, reference: tuple[Head, Array] | None
) -> tuple[TokenStatistics, tuple[Array, Array | None]]:
    """Return the statistics, and log Σ exp z of the distribution and of the reference."""
    rows, count = tile_count(head, tiling)

    def add(sums: Sums, number: Array) -> tuple[Sums, None]:
        tile = cut(head, rows, number)
        z = tile_logits(head, tile, phi, tiling.temperature)
        z_other = None
        if reference is not None:
            other = cut(reference[0], rows, number)
            z_other = tile_logits(reference[0], other, reference[1], tiling.temperature)
        return gather(sums, tile, z, y, z_other), None

    wide = jnp.promote_types(phi.dtype, jnp.float32)
    sums = nothing(y.shape, wide, tiling, reference is not None)
    if count == 1:
        sums, _ = add(sums, jnp.int32(0))
    else:
        sums, _ = jax.lax.scan(add, sums, jnp.arange(count, dtype=jnp.int32))
    return finish(sums, reference)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(
    tiling: Tiling, head: Head, phi: Array, y: Array, reference: tuple[Head, Array] | None
) -> TokenStatistics:
    return _read(tiling, head, phi, y, reference)[0]


def _forward(tiling: Tiling, head: Any, phi: Any, y: Any, reference: Any) -> tuple[Any, Any]:
    (head, for_head), (phi, for_phi) = primal(head), primal(phi)
    (y, reference), _ = primal((y, reference))
    found, normalisers = _read(tiling, head, phi, y, reference)
    # None or () says in the structure, which is static, whose cotangent is wanted
    wanted = tuple(() if moved else None for moved in (for_head, for_phi))
    return found, (head, phi, y, reference, found, normalisers, wanted)


def _backward(tiling: Tiling, residuals: Any, given: TokenStatistics) -> tuple[Any, ...]:
    head, phi, y, reference, found, (normaliser, other), (for_head, for_phi) = residuals
    rows, count = tile_count(head, tiling)

    def pull(sums: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], None]:
        head_sum, phi_sum = sums
        tile = cut(head, rows, number)
        z = tile_logits(head, tile, phi, tiling.temperature)
        log_pi, gap = z - normaliser[:, None], None
        if reference is not None:
            beside = cut(reference[0], rows, number)
            z_other = tile_logits(reference[0], beside, reference[1], tiling.temperature)
            gap = log_pi - z_other + other[:, None]
        dz = pull_logits(found, given, log_pi, gap, tile.start, y)
        dz *= head.scale / tiling.temperature
        if head.soft_cap is not None:
            dz *= 1 - jnp.square(z * (tiling.temperature / head.soft_cap))
        dz = jnp.where(tile.fresh[None], dz, 0)
        if for_head is not None:
            head_sum = _add_rows(head_sum, tile, dz, phi)
        if for_phi is not None:
            phi_sum += _product("nv,vd->nd", dz, tile.weight, phi.dtype)
        return (head_sum, phi_sum), None

    wide = jnp.promote_types(phi.dtype, jnp.float32)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide), (head, phi))
    start = (None if for_head is None else zeros[0], None if for_phi is None else zeros[1])
    if count == 1:
        (d_head, d_phi), _ = pull(start, jnp.int32(0))
    else:
        (d_head, d_phi), _ = jax.lax.scan(pull, start, jnp.arange(count, dtype=jnp.int32))
    d_head = zeros[0] if d_head is None else d_head
    d_phi = zeros[1] if d_phi is None else d_phi
    cast = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), (d_head, d_phi), (head, phi))
    return (*cast, None, None)


def _add_rows(head_sum: Head, tile: Tile, dz: Array, phi: Array) -> Head:
    """Add a tile's cotangent to the head's; rows that overlap the tile before hold zeros."""
    pulled = _product("nv,nd->vd", dz, phi, phi.dtype)

    def added(whole: Array, part: Array) -> Array:
        if whole.shape == part.shape:
            return whole + part
        held = jax.lax.dynamic_slice_in_dim(whole, tile.start, part.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(whole, held + part, tile.start, axis=0)

    bias = head_sum.bias
    if bias is not None:
        bias = added(bias, jnp.sum(dz, axis=0))
    return dataclasses.replace(head_sum, weight=added(head_sum.weight, pulled), bias=bias)


def _product(spec: str, left: Array, right: Array, dtype: Any) -> Array:
    wide = jnp.promote_types(dtype, jnp.float32)
    return einsum(spec, left.astype(dtype), right.astype(dtype), preferred_element_type=wide)


_statistics.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def _of_logits(z: Array, y: Array) -> TokenStatistics:
    return _summary(z, y)[0]


def _summary(z: Array, y: Array) -> tuple[TokenStatistics, Array]:
    whole = Tile(0, None, None, jnp.ones(z.shape[-1], bool))
    tiling = Tiling(1.0, None, 0)
    sums = gather(nothing(y.shape, z.dtype, tiling, False), whole, z, y, None)
    found, (normaliser, _) = finish(sums, None)
    return found, normaliser


def _of_logits_forward(z: Any, y: Any) -> tuple[Any, Any]:
    (z, y), _ = primal((z, y))
    found, normaliser = _summary(z, y)
    return found, (z, y, found, normaliser)


def _of_logits_backward(residuals: Any, given: TokenStatistics) -> tuple[Array, None]:
    z, y, found, normaliser = residuals
    return pull_logits(found, given, z - normaliser[:, None], None, 0, y), None


_of_logits.defvjp(_of_logits_forward, _of_logits_backward, symbolic_zeros=True)
