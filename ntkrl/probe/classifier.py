"""Size and movement of the head's matrix, read a block of rows at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum
from ntkrl.probe.weights import leading_direction
from ntkrl.softmax import OutputHead, slice_tile, tile_count
from ntkrl.types import Array


@functools.partial(jax.jit, static_argnums=(2,))
def classifier_measures(
    weight: Array, start: Array, chunk_vocabulary: int = 4096
) -> tuple[dict[str, Array], Array]:
    """Measure W and W − W_0; beside a block of rows, only two D×D Gram matrices are made.

    Args:
      weight: W `[V, D]`.
      start: W_0 `[V, D]`, of any dtype.
      chunk_vocabulary: rows taken at a time, ≥ 1.

    Returns:
      `(scalars, row norms [V])`. Scalars: `head_norm` ‖W‖_F, `head_distance` ‖W − W_0‖_F,
      `head_row_norm` and `head_row_norm_max` mean and largest row norm, `head_stable_rank`
      ‖W‖_F²/‖W‖_2² and `head_distance_stable_rank` the same of W − W_0 (in [1, min(V, D)]; NaN
      where nothing moved).

    Source: Tomihari & Sato 2405.16747 (norms), Tomihari 2601.04670.
    """
    head = OutputHead(weight)
    rows, count = tile_count(head, chunk_vocabulary)
    width = weight.shape[1]
    wide = jnp.promote_types(weight.dtype, jnp.float32)

    def add(grams: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        tile, other = slice_tile(head, rows, number), slice_tile(OutputHead(start), rows, number)
        here_RD = jnp.where(tile.fresh[:, None], at_least_float32(tile.weight), 0)
        there_RD = jnp.where(tile.fresh[:, None], at_least_float32(other.weight), 0)
        parts = here_RD, here_RD - there_RD
        grams = tuple(g + einsum("rd,re->de", p, p) for g, p in zip(grams, parts, strict=True))
        return grams, jnp.linalg.norm(here_RD, axis=1)

    zeros_DD = jnp.zeros((width, width), wide)
    numbers = jnp.arange(count, dtype=jnp.int32)
    (gram_DD, moved_DD), norms = jax.lax.scan(add, (zeros_DD, zeros_DD), numbers)
    # the last block was moved back to fit, its rows seen before zeroed
    last = norms[-1][count * rows - weight.shape[0] :]
    norms_V = jnp.concatenate([norms[:-1].ravel(), last])
    square, moved_square = jnp.trace(gram_DD), jnp.trace(moved_DD)
    return {
        "head_norm": jnp.sqrt(square),
        "head_distance": jnp.sqrt(moved_square),
        "head_row_norm": jnp.mean(norms_V),
        "head_row_norm_max": jnp.max(norms_V),
        "head_stable_rank": square / leading_direction(gram_DD).value,
        "head_distance_stable_rank": moved_square / leading_direction(moved_DD).value,
    }, norms_V
