"""Sums over the vocabulary at one position, a tile of vocabulary rows at a time.

What needs log π of all V tokens is read in two passes over the head: one for log Σ exp z, one for
the sums. The functions here are of one position; callers map them over chunks of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.softmax import OutputHead, Tile, slice_tile, tile_count, tile_logits
from ntkrl.types import Array


def log_normaliser(
    head: OutputHead, features: Array, temperature: float, chunk_vocabulary: int | None
) -> Array:
    """Return log Σ_v exp z_v of one position, a scalar; arguments as in `log_probs_by_tile`."""
    rows, count = tile_count(head, chunk_vocabulary)

    def add(held: Array, number: Array) -> tuple[Array, None]:
        z_1R = tile_logits(head, slice_tile(head, rows, number), features[None], temperature)
        return jnp.logaddexp(held, jax.nn.logsumexp(z_1R)), None

    low = jnp.full((), -jnp.inf, jnp.promote_types(features.dtype, jnp.float32))
    return jax.lax.scan(add, low, jnp.arange(count, dtype=jnp.int32))[0]


def log_probs_by_tile(
    head: OutputHead, features: Array, temperature: float, chunk_vocabulary: int | None
) -> Callable[[Array], tuple[Tile, Array]]:
    """Return a function from a tile's number to the tile and log π of its rows.

    Args:
      head: of V rows.
      features: `[D]` of one position.
      temperature: divides the logits; > 0.
      chunk_vocabulary: R, vocabulary rows whose logits exist at a time, ≥ 1; None for all.

    Returns:
      `number -> (tile, log π [R])` (nats), with −∞ at rows that the tile before had.
    """
    rows, _ = tile_count(head, chunk_vocabulary)
    normaliser = log_normaliser(head, features, temperature, chunk_vocabulary)

    def log_probs_of(number: Array) -> tuple[Tile, Array]:
        tile = slice_tile(head, rows, number)
        return tile, tile_logits(head, tile, features[None], temperature)[0] - normaliser

    return log_probs_of


def sum_over_tiles(
    term: Callable[[Array], Any], head: OutputHead, chunk_vocabulary: int | None
) -> Any:
    """Add up `term(number)`, a tree of arrays, over the tiles of a head."""
    _, count = tile_count(head, chunk_vocabulary)

    def add(sums: Any, number: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, term(number)), None

    shapes = jax.eval_shape(term, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, jnp.arange(count, dtype=jnp.int32))[0]
