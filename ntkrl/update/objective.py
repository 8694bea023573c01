"""What one step minimises: ratio level × clip × aggregation × place of the KL term.

Losses return a Total; the mean is taken once, by the step. KL appears as two different objects:
k1 subtracted from the reward without a gradient, or k3 per token in the loss.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ntkrl.numerics import masked_total
from ntkrl.types import Array, Total, UpdateBatch
from ntkrl.vocabulary import TokenStatistics

RATIO_LEVELS = ("token", "sequence")
AGGREGATIONS = ("sequence_mean", "token_mean")
KL_PLACES = ("reward", "loss", "off")
ADVANTAGES = ("leave_one_out", "group_normalised")


@dataclasses.dataclass(frozen=True)
class Objective:
    """One point on the axes.

    advantage: "leave_one_out" or "group_normalised" (see ntkrl.advantage).
    ratio_level: "token": one ratio per token; "sequence": their product over the completion.
    clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; in (0, 1) and > 0.
    aggregation: "sequence_mean": mean over completions of the mean over their tokens (of the one
        number, for a sequence ratio); "token_mean": mean over all tokens of the batch.
    kl_place: "reward" (k1, no gradient), "loss" (k3 per token) or "off".
    kl_coefficient: β ≥ 0.
    """

    advantage: str
    ratio_level: str
    clip_low: float
    clip_high: float
    aggregation: str
    kl_place: str
    kl_coefficient: float

    def __post_init__(self):
        problems = [
            f"{name} {value!r} is not among {', '.join(allowed)}"
            for name, value, allowed in (
                ("advantage", self.advantage, ADVANTAGES),
                ("ratio_level", self.ratio_level, RATIO_LEVELS),
                ("aggregation", self.aggregation, AGGREGATIONS),
                ("kl_place", self.kl_place, KL_PLACES),
            )
            if value not in allowed
        ]
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            problems.append(
                "clip_low must be in (0, 1) and clip_high > 0, not "
                f"{self.clip_low}, {self.clip_high}"
            )
        if self.kl_coefficient < 0:
            problems.append(f"kl_coefficient must be ≥ 0, not {self.kl_coefficient}")
        if self.ratio_level == "sequence" and self.aggregation == "token_mean":
            problems.append(
                "a sequence ratio gives one number per completion: use aggregation sequence_mean"
            )
        if self.ratio_level == "sequence" and self.kl_place == "loss":
            problems.append(
                "kl_place loss is a per-token penalty and needs ratio_level token; "
                "with a sequence ratio use kl_place reward"
            )
        if problems:
            raise ValueError("objective: " + "; ".join(problems) + ".")

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy has to be read."""
        return self.kl_place != "off" and self.kl_coefficient > 0


PRESETS: dict[str, Objective] = {
    # Ahmadian et al. 2402.14740 as in TRL's RLOOTrainer: k1 in the reward, sequence ratio
    "rloo": Objective(
        advantage="leave_one_out",
        ratio_level="sequence",
        clip_low=0.2,
        clip_high=0.2,
        aggregation="sequence_mean",
        kl_place="reward",
        kl_coefficient=0.05,
    ),
    # Shao et al. 2402.03300, eq. 3: k3 in the loss, token ratio; β = 0.04 as in the paper
    "grpo": Objective(
        advantage="group_normalised",
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
        aggregation="sequence_mean",
        kl_place="loss",
        kl_coefficient=0.04,
    ),
}


def penalised_rewards(
    objective: Objective, rewards: Array, log_probs: Array, ref_log_probs: Array, mask: Array
) -> Array:
    """Subtract β Σ_t (log π − log π_ref) from each reward, where the KL term sits in the reward.

    Args:
      objective: the axes.
      rewards: `[B]`.
      log_probs: `[B, C]` of the policy that sampled (nats).
      ref_log_probs: `[B, C]` (nats).
      mask: `[B, C]` completion mask.

    Returns:
      `[B]`; `rewards` itself for any other place.
    """
    if objective.kl_place != "reward":
        return rewards
    kl_k1_B = jnp.sum(jnp.where(mask, log_probs - ref_log_probs, 0.0), axis=1)
    return rewards - objective.kl_coefficient * kl_k1_B


def policy_loss(
    objective: Objective, statistics: TokenStatistics, batch: UpdateBatch
) -> tuple[Total, dict[str, Total]]:
    """Return the clipped surrogate −min(ρA, clip(ρ)A), plus β k3 where the KL sits in the loss.

    With sequence ratio: ρ_i = exp Σ_t (log π − log π_old), loss = mean_i. With token ratio:
    ρ_it per token, then the objective's aggregation. At ρ = 1 its gradient is that of
    −A Σ_t log π (sequence) or −A log π per token.

    Args:
      objective: the axes.
      statistics: of the current params on the batch, `[B, C]` arrays.
      batch: UpdateBatch.

    Returns:
      `(Total, metrics)`: the Total counts completions or tokens as the aggregation says; metrics
      are Totals over tokens (`entropy`, `confidence`, `kl`) or ratios (`clip_ratio/region_mean`).
    """
    mask = batch.completion_mask
    log_ratio_BC = jnp.where(mask, statistics.log_probs - batch.old_log_probs, 0.0)
    if objective.ratio_level == "sequence":
        ratio = jnp.exp(jnp.sum(log_ratio_BC, axis=1))
        advantages, counted = batch.advantages, jnp.any(mask, axis=1)
    else:
        ratio, advantages, counted = jnp.exp(log_ratio_BC), batch.advantages[:, None], mask
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    clipped = jnp.clip(ratio, low, high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    # where inside exp too: an unread ref_log_prob of 0 on padding must not overflow
    ref_log_ratio_BC = jnp.where(mask, batch.ref_log_probs - statistics.log_probs, 0.0)
    kl_k3_BC = jnp.exp(ref_log_ratio_BC) - 1 - ref_log_ratio_BC
    if objective.kl_place == "loss":
        loss = loss + objective.kl_coefficient * kl_k3_BC
    metrics = {
        "entropy": masked_total(statistics.entropy, mask),
        "confidence": masked_total(statistics.max_prob, mask),
        "kl": masked_total(kl_k3_BC, mask),
        "clip_ratio/region_mean": masked_total(((ratio < low) | (ratio > high)) * 1.0, counted),
    }
    return _aggregate(objective, loss, counted), metrics


def supervised_loss(
    statistics: TokenStatistics, batch: UpdateBatch
) -> tuple[Total, dict[str, Total]]:
    """Return −log π of the completion tokens as a Total over tokens, and metrics."""
    mask = batch.completion_mask
    metrics = {
        "entropy": masked_total(statistics.entropy, mask),
        "confidence": masked_total(statistics.max_prob, mask),
    }
    return masked_total(-statistics.log_probs, mask), metrics


def _aggregate(objective: Objective, loss: Array, counted: Array) -> Total:
    if objective.ratio_level == "sequence" or objective.aggregation == "token_mean":
        return masked_total(loss, counted)
    lengths_B = jnp.sum(counted, axis=1)
    means_B = jnp.sum(jnp.where(counted, loss, 0.0), axis=1) / jnp.maximum(lengths_B, 1)
    return masked_total(means_B, lengths_B > 0)
