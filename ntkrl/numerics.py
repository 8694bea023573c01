"""Totals, and statistics of a token's next-token distribution without V-wide batches.

Log-probs, entropies and softmax statistics are float32 or better whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.types import Array, Total


def at_least_float32(values: Array) -> Array:
    """Cast to float32 unless the dtype is already wider."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


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

    Logits exist for `chunk_tokens` positions at a time only, in the backward pass too.

    Args:
      head: `[..., D] -> [..., V]` logits.
      features: `[..., D]`.
      targets: `[...]` int token whose log-prob is wanted.
      temperature: divides the logits; > 0.
      chunk_tokens: positions per chunk, ≥ 1.

    Returns:
      TokenStatistics with arrays of shape `[...]`.
    """
    shape = targets.shape
    features_TD = features.reshape(-1, features.shape[-1])
    targets_T = targets.reshape(-1)
    tokens = targets_T.shape[0]

    def chunk(pair: tuple[Array, Array]) -> TokenStatistics:
        return _statistics(head(pair[0]) / temperature, pair[1])

    if tokens <= chunk_tokens:
        flat = chunk((features_TD, targets_T))
    else:
        padding = -tokens % chunk_tokens
        features_CTD = jnp.pad(features_TD, ((0, padding), (0, 0)))
        features_CTD = features_CTD.reshape(-1, chunk_tokens, features_TD.shape[-1])
        targets_CT = jnp.pad(targets_T, (0, padding)).reshape(-1, chunk_tokens)
        stacked = jax.lax.map(jax.checkpoint(chunk), (features_CTD, targets_CT))
        flat = TokenStatistics(*(leaf.reshape(-1)[:tokens] for leaf in stacked))
    return TokenStatistics(*(leaf.reshape(shape) for leaf in flat))


def _statistics(logits_TV: Array, targets_T: Array) -> TokenStatistics:
    log_probs_TV = jax.nn.log_softmax(at_least_float32(logits_TV), axis=-1)
    probs_TV = jnp.exp(log_probs_TV)
    argmax_T = jnp.argmax(log_probs_TV, axis=-1).astype(jnp.int32)
    return TokenStatistics(
        log_probs=jnp.take_along_axis(log_probs_TV, targets_T[:, None], axis=-1)[:, 0],
        # where: a logit of -inf has p = 0 and p log p = 0, not NaN
        entropy=-jnp.sum(jnp.where(probs_TV > 0, probs_TV * log_probs_TV, 0), axis=-1),
        sum_squares=jnp.sum(jnp.square(probs_TV), axis=-1),
        max_prob=jnp.max(probs_TV, axis=-1),
        argmax=argmax_T,
    )
