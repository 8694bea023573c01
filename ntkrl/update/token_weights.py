"""Factors of each token's score function, computed for a full batch before any step on it.

Pure functions of `[B, C]` arrays. Statistics of the full batch (quantiles, group variances,
corrections) are computed once, so that minibatches and microbatches use the same weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ntkrl.types import Array
from ntkrl.update.loss import kl_estimate
from ntkrl.update.objective import Objective


def reward_penalties(
    objective: Objective,
    log_probs: Array,
    ref_log_probs: Array,
    mask: Array,
    kl: Array | None = None,
) -> Array:
    """Return the penalty of each token on its completion's reward: β KL_t, without a gradient.

    Args:
      objective: the axes.
      log_probs: `[B, C]` of the policy that sampled (nats).
      ref_log_probs: `[B, C]` (nats).
      mask: `[B, C]` completion mask.
      kl: `[B, C]` KL over the vocabulary (nats), for estimator "full".

    Returns:
      `[B, C]`, 0 where masked; all 0 if the KL term is not in the reward.
    """
    if objective.kl_place != "reward" or not objective.needs_reference:
        return jnp.zeros(mask.shape, jnp.float32)
    if objective.kl_estimator == "full":
        assert kl is not None
        return objective.kl_coefficient * jnp.where(mask, kl, 0.0)
    kind = objective.kl_estimator
    return objective.kl_coefficient * kl_estimate(kind, log_probs, ref_log_probs, mask)


def counted_tokens(
    objective: Objective, mask: Array, finished: Array, rewards: Array, group_size: int
) -> Array:
    """Mask completions that the objective excludes from the loss.

    Args:
      objective: its `overlong` and `group_filter` are used.
      mask: `[B, C]` completion mask.
      finished: `[B]` bool, False where the budget cut the completion.
      rewards: `[B]`, groups of N consecutive.
      group_size: N.

    Returns:
      `[B, C]` bool.
    """
    if objective.overlong == "mask":
        mask = mask & finished[:, None]
    if objective.group_filter != "off":
        mask = mask & jnp.repeat(~equal_groups(rewards, group_size), group_size)[:, None]
    return mask


def equal_groups(rewards: Array, group_size: int) -> Array:
    """Return which groups `[P]` have equal rewards, so that their advantages are all zero."""
    rewards_PN = rewards.reshape(-1, group_size)
    return jnp.all(rewards_PN == rewards_PN[:, :1], axis=1)


def filter_sign(objective: Objective, advantages: Array) -> Array:
    """Set advantages of the sign excluded by the objective to 0."""
    if objective.signs == "positive":
        return jnp.maximum(advantages, 0.0)
    if objective.signs == "negative":
        return jnp.minimum(advantages, 0.0)
    return advantages


def correction_weights(
    objective: Objective, old_log_probs: Array, behaviour_log_probs: Array, mask: Array
) -> Array:
    """Return importance weights π_old/μ, truncated or masked.

    Args:
      objective: its `correction`, `correction_level` and `correction_cap` are used.
      old_log_probs: `[B, C]` of the trainer's forward pass, full vocabulary (nats).
      behaviour_log_probs: `[B, C]` of the distribution sampled from: truncated, in the sampler's
        arithmetic (nats).
      mask: `[B, C]` completion mask.

    Returns:
      `[B, C]` ≥ 0; 1 where masked, and everywhere when the correction is off.

    Source: Yao et al. 2025 (truncated importance sampling); "mask" as MIS in verl and IcePop's
      upper side (Ling team 2510.18855).
    """
    if objective.correction == "off":
        return jnp.ones(mask.shape, jnp.float32)
    log_weight_BC = jnp.where(mask, old_log_probs - behaviour_log_probs, 0.0)
    if objective.correction_level == "sequence":
        sequence_B1 = jnp.sum(log_weight_BC, axis=1, keepdims=True)
        log_weight_BC = jnp.broadcast_to(sequence_B1, mask.shape)
    weight_BC = jnp.exp(log_weight_BC)
    if objective.correction == "truncate":
        return jnp.minimum(weight_BC, objective.correction_cap)
    return jnp.where(weight_BC <= objective.correction_cap, weight_BC, 0.0)


def covariance_weights(
    objective: Objective, log_probs: Array, advantages: Array, mask: Array, key: Array
) -> tuple[Array, Array | None]:
    """Exclude or penalise the tokens that lower the entropy most.

    c = (log π − mean)(A − mean) over the n tokens of the batch; k = max(1, ⌊fraction · n⌋).
    "clip" sets the advantage of k tokens, drawn from those with c in the range, to 0; "kl" puts a
    penalty on |log π − log π_old| of the k tokens with the largest c.

    Args:
      objective: its `covariance…` fields are used.
      log_probs: `[B, C]` of the policy that sampled (nats): tokens are selected before the first
        step, where the published code uses the current policy at each.
      advantages: `[B, C]`.
      mask: `[B, C]` completion mask.
      key: consumed by "clip".

    Returns:
      `(advantages, penalties)`, `[B, C]` each; penalties are None except for "kl".

    Source: Cui et al. 2505.22617, section 4.
    """
    if objective.covariance == "off":
        return advantages, None
    count = jnp.sum(mask)

    def centered(values: Array) -> Array:
        mean = jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(count, 1)
        return jnp.where(mask, values - mean, 0.0)

    covariance_BC = centered(log_probs) * centered(advantages)
    selected = jnp.maximum(1, (objective.covariance_fraction * count).astype(jnp.int32))
    if objective.covariance == "kl":
        chosen_BC = _largest(jnp.where(mask, covariance_BC, -jnp.inf), selected)
        return advantages, jnp.where(chosen_BC, objective.covariance_penalty, 0.0)
    low, high = objective.covariance_range
    eligible_BC = mask & (covariance_BC > low) & (covariance_BC < high)
    order_BC = jax.random.uniform(key, mask.shape)
    chosen_BC = _largest(jnp.where(eligible_BC, order_BC, -jnp.inf), selected)
    return jnp.where(chosen_BC, 0.0, advantages), None


def _largest(values: Array, count: Array) -> Array:
    """Mark the `count` largest finite entries."""
    flat = values.reshape(-1)
    order = jnp.arange(flat.size, dtype=jnp.int32)
    rank = jnp.zeros_like(order).at[jnp.argsort(-flat)].set(order)
    return ((rank < count) & (flat > -jnp.inf)).reshape(values.shape)
