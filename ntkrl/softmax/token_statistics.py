"""Log-prob, entropy, Σπ², arg-max mass and KL of next-token distributions, without stored logits.

Logits z = s (W φ + b), capped κ tanh(z / κ) by some heads and divided by the temperature, exist for
one tile of positions × vocabulary rows at a time. The forward pass accumulates log Σ eᶻ and the
moments online over the tiles of the vocabulary; the backward pass recomputes each tile:

    ∂ log π(y)/∂z = e_y − π        ∂H/∂z = −π (log π + H)       ∂Σπ²/∂z = 2π (π − Σπ²)
    ∂ max π/∂z = max π (e_max − π)  ∂KL(π‖ρ)/∂z = π (log π − log ρ − KL)

Everything is float32 or better whatever the model's dtype. Source: the online softmax of Milakov &
Gimelshein 1805.02867; the moments ours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum, primal
from ntkrl.softmax.online_sums import (
    OnlineSums,
    TokenStatistics,
    accumulate,
    finalize,
    initial_sums,
    logits_cotangent,
)
from ntkrl.softmax.tiling import OutputHead, Tile, slice_tile, tile_count, tile_logits
from ntkrl.types import Array

Reference = tuple[OutputHead, Array]
"""Head and features `[..., D']` of a reference distribution ρ."""


class SoftmaxOptions(NamedTuple):
    """Static arguments of `token_statistics`.

    temperature: divides the logits, the reference's too; > 0.
    chunk_tokens: positions whose logits exist at a time, ≥ 1; a chunk spans at least one column of
      all rows.
    chunk_vocabulary: vocabulary rows whose logits exist at a time, ≥ 1; None for all.
    top: how many of the likeliest tokens to return.
    """

    temperature: float = 1.0
    chunk_tokens: int = 1024
    chunk_vocabulary: int | None = None
    top: int = 0


DEFAULT_OPTIONS = SoftmaxOptions()


def token_statistics(
    head: OutputHead,
    features: Array,
    targets: Array,
    options: SoftmaxOptions = DEFAULT_OPTIONS,
    reference: Reference | None = None,
) -> TokenStatistics:
    """Compute log-prob, entropy, Σπ², arg-max mass and KL of every position from its features.

    Differentiable (reverse mode) in head and features through log_probs, entropy, sum_squares,
    max_prob and kl; the reference and the top tokens are constants. Chunks run over the last axis
    of positions, so that rows sharded over devices stay on theirs.

    Args:
      head: the head's arrays.
      features: `[..., T, D]`.
      targets: `[..., T]` int token for log_probs.
      options: temperature, chunk sizes and top k.
      reference: head and features `[..., T, D']` of ρ, or None.

    Returns:
      TokenStatistics with arrays of the shape of `targets`.
    """
    *rows, columns = targets.shape
    width = max(1, options.chunk_tokens // max(1, math.prod(rows)))
    if reference is not None:
        reference = jax.lax.stop_gradient(reference)
    if columns <= width:
        return _flattened(options, head, features, targets, reference)
    count = -(-columns // width)
    axis = len(rows)

    def split(values: Array) -> Array:
        padding = [(0, 0)] * values.ndim
        padding[axis] = (0, count * width - columns)
        shape = (*values.shape[:axis], count, width, *values.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(values, padding).reshape(shape), axis, 0)

    def join(values: Array) -> Array:
        values = jnp.moveaxis(values, 0, axis)
        values = values.reshape(*rows, count * width, *values.shape[axis + 2 :])
        return values[(slice(None),) * axis + (slice(columns),)]

    def of_chunk(chunk: tuple[Array, Array, Array | None]) -> TokenStatistics:
        phi, y, reference_phi = chunk
        pair = None if reference_phi is None or reference is None else (reference[0], reference_phi)
        return _flattened(options, head, phi, y, pair)

    reference_phi = None if reference is None else split(reference[1])
    chunks = (split(features), split(targets), reference_phi)
    return jax.tree.map(join, jax.lax.map(of_chunk, chunks))


def logit_statistics(values: Array, targets: Array) -> TokenStatistics:
    """Compute the statistics of existing logits `[..., V]` at targets `[...]`.

    The values of `token_statistics` without a reference, for callers that keep the logits of a
    few positions from the forward to the backward pass.
    """
    z = at_least_float32(values).reshape(-1, values.shape[-1])
    return _reshaped(_of_logits(z, targets.reshape(-1)), targets.shape)


def _flattened(
    options: SoftmaxOptions, head: OutputHead, phi: Array, y: Array, reference: Reference | None
) -> TokenStatistics:
    """Compute a chunk with its positions on one axis."""
    if reference is not None:
        reference = (reference[0], reference[1].reshape(y.size, -1))
    statistics = _of_features(options, head, phi.reshape(y.size, -1), y.reshape(-1), reference)
    return _reshaped(statistics, y.shape)


def _reshaped(statistics: TokenStatistics, shape: tuple[int, ...]) -> TokenStatistics:
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_features(
    options: SoftmaxOptions, head: OutputHead, phi: Array, y: Array, reference: Reference | None
) -> TokenStatistics:
    return _forward_pass(options, head, phi, y, reference)[0]


def _forward_pass(
    options: SoftmaxOptions, head: OutputHead, phi: Array, y: Array, reference: Reference | None
) -> tuple[TokenStatistics, tuple[Array, Array | None]]:
    """Return the statistics, and log Σ exp z of the distribution and of the reference."""
    rows, count = tile_count(head, options.chunk_vocabulary)

    def add(sums: OnlineSums, number: Array) -> tuple[OnlineSums, None]:
        tile, z_reference = slice_tile(head, rows, number), None
        z = tile_logits(head, tile, phi, options.temperature)
        if reference is not None:
            z_reference = _reference_logits(reference, rows, number, options)
        return accumulate(sums, z, y, tile.start, tile.fresh, z_reference), None

    dtype = jnp.promote_types(phi.dtype, jnp.float32)
    sums = initial_sums(y.shape, dtype, options.top, reference is not None)
    sums, _ = _over_tiles(add, sums, count)
    return finalize(sums)


def _reference_logits(
    reference: Reference, rows: int, number: Array, options: SoftmaxOptions
) -> Array:
    head, phi = reference
    return tile_logits(head, slice_tile(head, rows, number), phi, options.temperature)


def _over_tiles(body: Callable[[Any, Array], Any], carry: Any, count: int) -> Any:
    if count == 1:
        return body(carry, jnp.int32(0))
    return jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))


def _of_features_forward(
    options: SoftmaxOptions, head: Any, phi: Any, y: Any, reference: Any
) -> tuple[TokenStatistics, Any]:
    (head, perturbed_head), (phi, perturbed_phi) = primal(head), primal(phi)
    (y, reference), _ = primal((y, reference))
    statistics, normalisers = _forward_pass(options, head, phi, y, reference)
    # None or () marks, in the static structure, which cotangents are needed
    needs = tuple(() if perturbed else None for perturbed in (perturbed_head, perturbed_phi))
    return statistics, (head, phi, y, reference, statistics, normalisers, needs)


def _of_features_backward(
    options: SoftmaxOptions, residuals: Any, cotangents: TokenStatistics
) -> tuple[Any, ...]:
    head, phi, y, reference, statistics, normalisers, (needs_head, needs_phi) = residuals
    normaliser, reference_normaliser = normalisers
    temperature = options.temperature
    rows, count = tile_count(head, options.chunk_vocabulary)

    def add(sums: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], None]:
        d_head, d_phi = sums
        tile = slice_tile(head, rows, number)
        z = tile_logits(head, tile, phi, temperature)
        log_pi, gap = z - normaliser[:, None], None
        if reference is not None:
            z_reference = _reference_logits(reference, rows, number, options)
            gap = log_pi - z_reference + reference_normaliser[:, None]
        probs = (jnp.exp(log_pi), log_pi)
        dz = logits_cotangent(statistics, cotangents, probs, gap, tile.start, y)
        dz *= head.scale / temperature
        if head.soft_cap is not None:
            dz *= 1 - jnp.square(z * (temperature / head.soft_cap))
        dz = jnp.where(tile.fresh[None], dz, 0)
        if needs_head is not None:
            d_head = _add_rows(d_head, tile, dz, phi)
        if needs_phi is not None:
            d_phi += _product("nv,vd->nd", dz, tile.weight, phi.dtype)
        return (d_head, d_phi), None

    dtype = jnp.promote_types(phi.dtype, jnp.float32)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), (head, phi))
    start = (None if needs_head is None else zeros[0], None if needs_phi is None else zeros[1])
    (d_head, d_phi), _ = _over_tiles(add, start, count)
    d_head = zeros[0] if d_head is None else d_head
    d_phi = zeros[1] if d_phi is None else d_phi
    cast = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), (d_head, d_phi), (head, phi))
    return (*cast, None, None)


def _add_rows(d_head: OutputHead, tile: Tile, dz: Array, phi: Array) -> OutputHead:
    """Add a tile's cotangent to the head's; dz is 0 on repeated rows."""

    def added(total: Array, rows: Array) -> Array:
        if total.shape == rows.shape:
            return total + rows
        before = jax.lax.dynamic_slice_in_dim(total, tile.start, rows.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(total, before + rows, tile.start, axis=0)

    weight = added(d_head.weight, _product("nv,nd->vd", dz, phi, phi.dtype))
    bias = None if d_head.bias is None else added(d_head.bias, jnp.sum(dz, axis=0))
    return dataclasses.replace(d_head, weight=weight, bias=bias)


def _product(spec: str, left: Array, right: Array, dtype: Any) -> Array:
    result = jnp.promote_types(dtype, jnp.float32)
    return einsum(spec, left.astype(dtype), right.astype(dtype), preferred_element_type=result)


_of_features.defvjp(_of_features_forward, _of_features_backward, symbolic_zeros=True)


@jax.custom_vjp
def _of_logits(z: Array, y: Array) -> TokenStatistics:
    return _single_tile(z, y)[0]


def _single_tile(z: Array, y: Array) -> tuple[TokenStatistics, OnlineSums]:
    sums = initial_sums(y.shape, z.dtype, 0, False)
    sums = accumulate(sums, z, y, 0, jnp.ones(z.shape[-1], bool), None)
    return finalize(sums)[0], sums


def _of_logits_forward(z: Any, y: Any) -> tuple[TokenStatistics, Any]:
    (z, y), _ = primal((z, y))
    statistics, sums = _single_tile(z, y)
    return statistics, (z, y, statistics, sums.peak, sums.total)


def _of_logits_backward(residuals: Any, cotangents: TokenStatistics) -> tuple[Array, None]:
    z, y, statistics, peak, total = residuals
    shifted = z - peak[:, None]
    # the exponentials of the forward pass: compiled together, they are computed once
    probs = (jnp.exp(shifted) * (1 / total)[:, None], shifted - jnp.log(total)[:, None])
    return logits_cotangent(statistics, cotangents, probs, None, 0, y), None


_of_logits.defvjp(_of_logits_forward, _of_logits_backward, symbolic_zeros=True)
