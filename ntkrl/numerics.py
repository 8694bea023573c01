"""Totals, and statistics of a token's next-token distribution without V-wide batches.

Log-probs, entropies and softmax statistics are float32 or better whatever the model's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.types import Array, Total


def at_least_float32(values: Array) -> Array:
    """Cast to float32 unless the dtype is already wider."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


SHORTEST_BUCKET = 8
HIGHEST = jax.lax.Precision.HIGHEST
einsum = functools.partial(jnp.einsum, precision=HIGHEST)
"""Products in full precision: accelerators otherwise multiply float32 in fewer bits."""


def bucket_length(longest: int, maximum: int) -> int:
    """Return the length to pad to: few different ones, since each compiles anew.

    Args:
      longest: tokens of the longest row, 1 to `maximum`.
      maximum: longest row allowed (tokens).

    Returns:
      The smallest power of two that is at least `longest` and 8, or `maximum` if smaller.

    Raises:
      ValueError: `longest` outside its range.
    """
    if not 1 <= longest <= maximum:
        raise ValueError(f"the longest row has {longest} tokens; allowed are 1 to {maximum}.")
    return min(max(SHORTEST_BUCKET, 1 << (longest - 1).bit_length()), maximum)


def masked_total(values: Array, mask: Array) -> Total:
    """Sum `values` where `mask`, and count the mask; both of one shape."""
    return Total(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask))


def mean(total: Total) -> Array:
    """Divide a Total; an empty one is 0, never NaN."""
    return total.total / jnp.maximum(total.count, 1)


class TokenStatistics(NamedTuple):
    """Statistics of π = softmax(z / temperature) at each position; all of one shape `[...]`.

    log_probs: log π of the target (nats, ≤ 0).
    entropy: H(π) (nats, in [0, log V]).
    sum_squares: Σ_v π_v² (in [1/V, 1]).
    max_prob: max_v π_v.
    argmax: the most likely token, int32.
    """

    log_probs: Array
    entropy: Array
    sum_squares: Array
    max_prob: Array
    argmax: Array


def token_statistics(
    head: Callable[[Array], Array],
    features: Array,
    targets: Array,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> TokenStatistics:
    """Read log-prob, entropy, Σπ² and arg-max mass of every position from its features.

    Logits exist for about `chunk_tokens` positions at a time only, in the backward pass too.
    Chunks run over the last axis of positions, so that rows spread over devices stay there.

    Args:
      head: `[..., D] -> [..., V]` logits.
      features: `[..., T, D]`.
      targets: `[..., T]` int token whose log-prob is wanted.
      temperature: divides the logits; > 0.
      chunk_tokens: positions per chunk, ≥ 1; a chunk holds one column of all rows at least.

    Returns:
      TokenStatistics with arrays of the shape of `targets`.
    """
    *rows, columns = targets.shape
    width = max(1, chunk_tokens // math.prod(rows))

    def chunk(pair: tuple[Array, Array]) -> TokenStatistics:
        return _statistics(head(pair[0]) / temperature, pair[1])

    if columns <= width:
        return chunk((features, targets))
    count = -(-columns // width)
    axis = len(rows)

    def split(values: Array) -> Array:
        padding = [(0, 0)] * values.ndim
        padding[axis] = (0, count * width - columns)
        shape = (*values.shape[:axis], count, width, *values.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(values, padding).reshape(shape), axis, 0)

    def join(values: Array) -> Array:
        whole = jnp.moveaxis(values, 0, axis).reshape(*rows, count * width)
        return whole[..., :columns]

    stacked = jax.lax.map(jax.checkpoint(chunk), (split(features), split(targets)))
    return TokenStatistics(*(join(leaf) for leaf in stacked))


def _statistics(logits: Array, targets: Array) -> TokenStatistics:
    log_probs = jax.nn.log_softmax(at_least_float32(logits), axis=-1)
    probs = jnp.exp(log_probs)
    return TokenStatistics(
        log_probs=jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0],
        # where: a logit of -inf has p = 0 and p log p = 0, not NaN
        entropy=-jnp.sum(jnp.where(probs > 0, probs * log_probs, 0), axis=-1),
        sum_squares=jnp.sum(jnp.square(probs), axis=-1),
        max_prob=jnp.max(probs, axis=-1),
        argmax=jnp.argmax(log_probs, axis=-1).astype(jnp.int32),
    )
