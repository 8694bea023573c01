"""The loss of each token, and how tokens add up to one number.

Losses return a Total; the mean is taken once, by the step, so that chunks of rows, micro-batches
and padding change nothing but rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import masked_total
from ntkrl.softmax import TokenStatistics
from ntkrl.types import Array, Total, UpdateBatch
from ntkrl.update.objective import Objective


class Measures(NamedTuple):
    """What is logged beside a loss, in forms that parts of a batch add up in.

    totals: Totals by name.
    maxima: scalars by name, of which the largest counts.
    """

    totals: dict[str, Total]
    maxima: dict[str, Array]


def policy_loss(
    objective: Objective, budget: int, statistics: TokenStatistics, batch: UpdateBatch
) -> tuple[Total, Measures]:
    """Return the objective's loss over the completions of a batch.

    Per token: −surrogate + β KL (in the loss) − η H + penalty |log ρ|, with the surrogate

        min(ρA, clip(ρ)A), at least cA where A < 0 and a dual clip c is set    (clip "min")
        ρA  (clip "none")        sg(clip(ρ)) A log π  (clip "detach")        A log π  (ratio "none")

    then the objective's aggregation. At ρ = 1 the gradient of each is that of A log π.

    Args:
      objective: the axes.
      budget: completion tokens allowed, the constant L of aggregation "constant".
      statistics: of the current params on the batch, `[B, C]` arrays, with `kl` for a full KL.
      batch: UpdateBatch.

    Returns:
      `(Total, Measures)`: the Total counts completions, tokens or completions × budget as the
      aggregation says, of those completions that have a token that counts.
    """
    mask, advantages_BC = batch.completion_mask, batch.advantages
    # where: what stands on padding must not overflow, not even in a gradient times zero
    log_probs_BC = jnp.where(mask, statistics.log_probs, 0.0)
    log_ratio_BC = jnp.where(mask, statistics.log_probs - batch.old_log_probs, 0.0)
    ratio_BC = _ratio(objective, log_ratio_BC, mask)
    loss_BC = -_surrogate(objective, ratio_BC, log_probs_BC, advantages_BC)
    kl_BC = None
    if objective.needs_distribution:
        kl_BC = statistics.kl
    elif objective.needs_reference:
        kl_BC = kl_estimate(objective.kl_estimator, log_probs_BC, batch.ref_log_probs, mask)
    if objective.kl_place == "loss" and kl_BC is not None:
        loss_BC += objective.kl_coefficient * kl_BC
    if objective.entropy_coefficient:
        loss_BC -= objective.entropy_coefficient * statistics.entropy
    if batch.penalties is not None:
        loss_BC += batch.penalties * jnp.abs(log_ratio_BC)
    measures = _measures(objective, statistics, batch, jax.lax.stop_gradient(ratio_BC))
    if kl_BC is not None:
        measures.totals["kl"] = masked_total(kl_BC, mask)
    return aggregate(objective, budget, loss_BC, mask), measures


def kl_estimate(estimator: str, log_probs: Array, ref_log_probs: Array, mask: Array) -> Array:
    """Return k1, k2 or k3 of KL(π‖π_ref) per token.

    Args:
      estimator: "k1" = log π − log π_ref, "k2" = k1²/2, "k3" = e^(−k1) − 1 + k1.
      log_probs, ref_log_probs: `[B, C]` (nats).
      mask: `[B, C]`; 0 is returned where False.

    Returns:
      `[B, C]` (nats); k1 alone may be negative.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    k1_BC = jnp.where(mask, log_probs - ref_log_probs, 0.0)
    if estimator == "k1":
        return k1_BC
    if estimator == "k2":
        return jnp.square(k1_BC) / 2
    return jnp.exp(-k1_BC) - 1 + k1_BC


def aggregate(objective: Objective, budget: int, loss: Array, mask: Array) -> Total:
    """Sum `[B, C]` losses where `mask` and count what the aggregation divides by."""
    held_BC = jnp.where(mask, loss, 0.0)
    lengths_B = jnp.sum(mask, axis=1)
    completions = jnp.sum(lengths_B > 0)
    if objective.aggregation == "token_mean":
        return Total(jnp.sum(held_BC), jnp.sum(mask))
    if objective.aggregation == "constant":
        return Total(jnp.sum(held_BC), completions * budget)
    if objective.aggregation == "sequence_mean":
        held_BC /= jnp.maximum(lengths_B, 1)[:, None]
    return Total(jnp.sum(held_BC), completions)


def supervised_loss(statistics: TokenStatistics, batch: UpdateBatch) -> tuple[Total, Measures]:
    """Return −log π of the completion tokens as a Total over tokens, and measures."""
    mask = batch.completion_mask
    return masked_total(-statistics.log_probs, mask), Measures(_confidence(statistics, mask), {})


def _ratio(objective: Objective, log_ratio: Array, mask: Array) -> Array:
    """Return ρ `[B, C]`, equal along a completion for a ratio of whole completions."""
    if objective.ratio_level in ("token", "none"):
        return jnp.exp(log_ratio)
    whole_B1 = jnp.sum(log_ratio, axis=1, keepdims=True)
    if objective.ratio_level == "sequence_mean":
        whole_B1 /= jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.broadcast_to(jnp.exp(whole_B1), log_ratio.shape)


def _surrogate(objective: Objective, ratio: Array, log_probs: Array, advantages: Array) -> Array:
    if objective.ratio_level == "none":
        return advantages * log_probs
    if objective.clip == "none":
        return ratio * advantages
    clipped = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
    if objective.clip == "detach":
        return jax.lax.stop_gradient(clipped) * advantages * log_probs
    smaller = jnp.minimum(ratio * advantages, clipped * advantages)
    if objective.dual_clip is None:
        return smaller
    bounded = jnp.maximum(smaller, objective.dual_clip * advantages)
    return jnp.where(advantages < 0, bounded, smaller)


def _measures(
    objective: Objective, statistics: TokenStatistics, batch: UpdateBatch, ratio: Array
) -> Measures:
    mask, advantages = batch.completion_mask, batch.advantages
    totals = _confidence(statistics, mask)
    if objective.clip != "none":
        low = (ratio < 1 - objective.clip_low) & (advantages < 0)
        high = (ratio > 1 + objective.clip_high) & (advantages > 0)
        # a ratio of whole completions is one number each, however long they are
        whole = objective.ratio_level in ("sequence", "sequence_mean")
        counted = mask & (jnp.cumsum(mask, axis=1) == 1) if whole else mask
        for name, hit in (("low", low), ("high", high), ("region", low | high)):
            totals[f"clip_ratio/{name}_mean"] = masked_total(hit * 1.0, counted)
    gap_BC = jnp.abs(statistics.log_probs - batch.old_log_probs)
    held_BC = jax.lax.stop_gradient(jnp.where(mask, gap_BC, 0.0))
    totals["log_ratio"] = masked_total(held_BC, mask)
    return Measures(totals, {"log_ratio_max": jnp.max(held_BC)})


def _confidence(statistics: TokenStatistics, mask: Array) -> dict[str, Total]:
    read = jax.lax.stop_gradient
    return {
        "entropy": masked_total(read(statistics.entropy), mask),
        "confidence": masked_total(read(statistics.max_prob), mask),
    }
