"""Losses: policy gradient, supervised and Bradley–Terry, each a Total with measures.

The mean is taken once, by the step, so that chunks of rows, microbatches and padding change
nothing but rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ntkrl.numerics import masked_total
from ntkrl.softmax import OutputHead, TokenStatistics
from ntkrl.types import Array, Params, PreferenceBatch, Scorer, Total, UpdateBatch
from ntkrl.update.objective import Objective


class Measures(NamedTuple):
    """Metrics beside a loss, in forms that accumulate over parts of a batch.

    totals: Totals by name.
    maxima: scalars by name, reduced by their maximum.
    """

    totals: dict[str, Total]
    maxima: dict[str, Array]


Totals = TypeVar("Totals", Total, dict[str, Total])
"""The Total of a loss, or a Total for each of its terms by name."""
TokenLoss = Callable[[TokenStatistics, UpdateBatch], tuple[Totals, Measures]]
"""A loss on the token statistics of completions; it adds up over completions."""


def policy_loss(
    objective: Objective, budget: int, statistics: TokenStatistics, batch: UpdateBatch
) -> tuple[Total, Measures]:
    """Return the objective's loss over the completions of a batch.

    Per token: −surrogate + β KL (in the loss) − η H + penalty |log ρ|, with the surrogate

        min(ρA, clip(ρ)A), at least cA where A < 0 and a dual clip c is set    (clip "min")
        ρA  (clip "none")        sg(clip(ρ)) A log π  (clip "detach")        A log π  (ratio "none")

    then the objective's aggregation. At ρ = 1 the gradient of each is that of A log π.

    Args:
      objective: its settings.
      budget: completion tokens allowed, the constant L of aggregation "constant".
      statistics: `[B, C]` arrays under the current params, with `kl` for a full KL.
      batch: UpdateBatch.

    Returns:
      `(Total, Measures)`: the Total counts completions, tokens or completions × budget as the
      aggregation says, of the completions with at least one counted token.
    """
    mask, advantages_BC = batch.completion_mask, batch.advantages
    # where: values on padding must not overflow, not even in a gradient times zero
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
    """Sum `[B, C]` losses where `mask`, with the count that the aggregation divides by."""
    masked_BC = jnp.where(mask, loss, 0.0)
    lengths_B = jnp.sum(mask, axis=1)
    completions = jnp.sum(lengths_B > 0)
    if objective.aggregation == "token_mean":
        return Total(jnp.sum(masked_BC), jnp.sum(mask))
    if objective.aggregation == "constant":
        return Total(jnp.sum(masked_BC), completions * budget)
    if objective.aggregation == "sequence_mean":
        masked_BC /= jnp.maximum(lengths_B, 1)[:, None]
    return Total(jnp.sum(masked_BC), completions)


def supervised_loss(statistics: TokenStatistics, batch: UpdateBatch) -> tuple[Total, Measures]:
    """Return −log π of the completion tokens as a Total over tokens, and measures."""
    mask = batch.completion_mask
    return masked_total(-statistics.log_probs, mask), Measures(_confidence(statistics, mask), {})


def policy_terms(objective: Objective, budget: int) -> TokenLoss[dict[str, Total]]:
    """Return the terms of `policy_loss`, each with the others at zero; they add up to it.

    Args:
      objective, budget: as in `policy_loss`.

    Returns:
      `(statistics, batch) -> ({name: Total}, Measures)`, for `policy_loss_fn`: "policy"; "kl" if
      the KL is in the loss, or in the reward and the batch has `kl_advantages`; and "bonus" if
      entropy is rewarded.
    """
    bare = dataclasses.replace(objective, kl_coefficient=0.0, kl_place="off", entropy_coefficient=0)
    terms = {}
    if objective.kl_place == "loss":
        terms["kl"] = dataclasses.replace(objective, entropy_coefficient=0.0)
    if objective.entropy_coefficient:
        weight = objective.entropy_coefficient
        terms["bonus"] = dataclasses.replace(bare, entropy_coefficient=weight)

    def loss(statistics: TokenStatistics, batch: UpdateBatch) -> tuple[dict[str, Total], Measures]:
        _, measures = policy_loss(objective, budget, statistics, batch)
        policy = policy_loss(bare, budget, statistics, batch)[0]
        totals = {"policy": policy}
        if batch.kl_advantages is not None:
            # The surrogate is proportional to a token's advantage on the branch (clipped or not)
            # that the full advantage selects: a part's share is the derivative along the part.
            part = batch.kl_advantages.astype(batch.advantages.dtype)

            def surrogate(advantages: Array) -> Array:
                changed = dataclasses.replace(batch, advantages=advantages)
                return policy_loss(bare, budget, statistics, changed)[0].total

            kl = jax.jvp(surrogate, (batch.advantages,), (part,))[1]
            totals = {
                "policy": Total(policy.total - kl, policy.count),
                "kl": Total(kl, policy.count),
            }
        no_advantages = dataclasses.replace(
            batch, advantages=jnp.zeros_like(batch.advantages), penalties=None
        )
        for name, term in terms.items():
            totals[name] = policy_loss(term, budget, statistics, no_advantages)[0]
        return totals, measures

    return loss


def supervised_terms(
    statistics: TokenStatistics, batch: UpdateBatch
) -> tuple[dict[str, Total], Measures]:
    """Return `supervised_loss` as a dict of terms, of which "likelihood" is the only one."""
    total, measures = supervised_loss(statistics, batch)
    return {"likelihood": total}, measures


def preference_loss(scores: Array, centering_coefficient: float) -> tuple[Total, dict[str, Total]]:
    """Return Σ −log σ(s⁺ − s⁻) + λ (s⁺ + s⁻)² over pairs, and metrics.

    Args:
      scores: `[B, 2]` of the chosen and the rejected text.
      centering_coefficient: λ ≥ 0, keeps the mean score near zero (Eisenstein et al. 2312.09244;
        TRL's center_rewards_coefficient).

    Returns:
      `(Total, metrics)`: Totals over pairs; metrics `accuracy`, `margin` (s⁺ − s⁻) and
      `mean_reward` ((s⁺ + s⁻) / 2).
    """
    margin_B, sum_B = scores[:, 0] - scores[:, 1], scores[:, 0] + scores[:, 1]
    loss_B = -jax.nn.log_sigmoid(margin_B) + centering_coefficient * jnp.square(sum_B)
    totals = {"accuracy": (margin_B > 0) * 1.0, "margin": margin_B, "mean_reward": sum_B / 2}
    count = jnp.asarray(len(margin_B))
    return (
        Total(jnp.sum(loss_B), count),
        {name: Total(jnp.sum(values), count) for name, values in totals.items()},
    )


def preference_loss_fn(
    scorer: Scorer, centering_coefficient: float
) -> Callable[[Params, PreferenceBatch, OutputHead | None], tuple[Total, Measures]]:
    """Return `(params, batch, None) -> (Total, Measures)` of a reward model."""

    def loss_fn(
        params: Params, batch: PreferenceBatch, reference: OutputHead | None = None
    ) -> tuple[Total, Measures]:
        pairs, _, length = batch.tokens.shape
        tokens, mask = (x.reshape(2 * pairs, length) for x in (batch.tokens, batch.mask))
        gates = batch.gates.reshape(2 * pairs)
        scores = scorer.score(params, tokens, mask, gates)["score"].reshape(pairs, 2)
        total, totals = preference_loss(scores, centering_coefficient)
        return total, Measures(totals, {})

    return loss_fn


def _ratio(objective: Objective, log_ratio: Array, mask: Array) -> Array:
    """Return ρ `[B, C]`, constant along a completion for a ratio of sequences."""
    if objective.ratio_level in ("token", "none"):
        return jnp.exp(log_ratio)
    sequence_B1 = jnp.sum(log_ratio, axis=1, keepdims=True)
    if objective.ratio_level == "sequence_mean":
        sequence_B1 /= jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.broadcast_to(jnp.exp(sequence_B1), log_ratio.shape)


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
        # a sequence ratio counts once per completion, at its first token
        per_sequence = objective.ratio_level in ("sequence", "sequence_mean")
        counted = mask & (jnp.cumsum(mask, axis=1) == 1) if per_sequence else mask
        for name, hit in (("low", low), ("high", high), ("region", low | high)):
            totals[f"clip_ratio/{name}_mean"] = masked_total(hit * 1.0, counted)
    gap_BC = jnp.abs(statistics.log_probs - batch.old_log_probs)
    gap_BC = jax.lax.stop_gradient(jnp.where(mask, gap_BC, 0.0))
    totals["log_ratio"] = masked_total(gap_BC, mask)
    return Measures(totals, {"log_ratio_max": jnp.max(gap_BC)})


def _confidence(statistics: TokenStatistics, mask: Array) -> dict[str, Total]:
    statistics = jax.lax.stop_gradient(statistics)
    return {
        "entropy": masked_total(statistics.entropy, mask),
        "confidence": masked_total(statistics.max_prob, mask),
    }
