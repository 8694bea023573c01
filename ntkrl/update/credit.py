"""Credit assignment: from rewards and log-probs to the weight of each token, by the objective.

Pure functions of `[B, C]` arrays. Statistics of the full batch (quantiles, group variances,
corrections) are computed once before any step, so that minibatches and microbatches use the same
weights.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import advantage
from ntkrl.types import Array, UpdateBatch
from ntkrl.update.loss import kl_estimate
from ntkrl.update.objective import Objective


@chex.dataclass(frozen=True)
class RolloutArrays:
    """The arrays of a rollout that token weights are computed from.

    rewards: `[B]`.
    old_log_probs, ref_log_probs, behaviour_log_probs: `[B, C]` of the trainer before the update,
        of the reference policy, and as tokens were drawn (nats).
    mask: `[B, C]` completion mask.
    finished: `[B]` bool, False where the budget cut the completion.
    kl: `[B, C]` exact KL to the reference policy (nats), or None.
    """

    rewards: Array
    old_log_probs: Array
    ref_log_probs: Array
    behaviour_log_probs: Array
    mask: Array
    finished: Array
    kl: Array | None = None


@chex.dataclass(frozen=True)
class TokenWeights:
    """The fields of an UpdateBatch that come from rewards.

    mask: `[B, C]`, True on tokens that count in the loss.
    advantages, kl_advantages, penalties: see UpdateBatch.
    metrics: scalars.
    """

    mask: Array
    advantages: Array
    kl_advantages: Array | None
    penalties: Array | None
    metrics: dict[str, Array]


def advantages(
    objective: Objective, group: int, rewards: Array, penalties: Array, mask: Array
) -> Array:
    """Return `[B, C]` advantages of rewards minus the penalties on tokens.

    Args:
      objective: the axes.
      group: completions per prompt.
      rewards: `[B]`.
      penalties: `[B, C]`, 0 where masked.
      mask: `[B, C]` completion mask.

    Raises:
      ValueError: a group too small for the estimator.
    """
    if objective.advantage == "reward_to_go":
        return advantage.reward_to_go(rewards, penalties, mask)
    net_B = rewards - jnp.sum(penalties, axis=1)
    if objective.advantage == "pass_at_k":
        advantages_B = advantage.pass_at_k(net_B, group, objective.pass_k)
    else:
        advantages_B = advantage.ESTIMATORS[objective.advantage](net_B, group)
    return jnp.broadcast_to(advantages_B[:, None], mask.shape)


def token_weights(
    objective: Objective, group: int, rollout: RolloutArrays, key: Array
) -> TokenWeights:
    """Return the weight of each token in the loss.

    Args:
      objective: the axes.
      group: completions per prompt.
      rollout: rewards, log-probs and masks.
      key: consumed by covariance "clip".
    """
    rewards, mask, old_log_probs = rollout.rewards, rollout.mask, rollout.old_log_probs
    counted_BC = counted_tokens(objective, mask, rollout.finished, rewards, group)
    penalties_BC = reward_penalties(
        objective, old_log_probs, rollout.ref_log_probs, mask, rollout.kl
    )
    plain_BC = advantages(objective, group, rewards, penalties_BC, mask)
    correction_BC = correction_weights(objective, old_log_probs, rollout.behaviour_log_probs, mask)
    corrected_BC = filter_sign(objective, plain_BC) * correction_BC
    advantages_BC, ratio_penalties = covariance_weights(
        objective, old_log_probs, corrected_BC, counted_BC, key
    )
    kl_BC = None
    in_reward = objective.kl_place == "reward" and objective.needs_reference
    if in_reward and objective.advantage in advantage.LINEAR:
        kl_BC = advantages(objective, group, jnp.zeros_like(rewards), penalties_BC, mask)
        removed_BC = (advantages_BC == 0) & (plain_BC != 0)
        kl_BC = jnp.where(removed_BC, 0.0, kl_BC * correction_BC)
    metrics = {}
    if objective.correction != "off":
        name, count = "sampling/importance_sampling_ratio", jnp.maximum(jnp.sum(mask), 1)
        metrics[f"{name}/mean"] = jnp.sum(jnp.where(mask, correction_BC, 0.0)) / count
        metrics[f"{name}/min"] = jnp.min(jnp.where(mask, correction_BC, jnp.inf))
        metrics[f"{name}/max"] = jnp.max(jnp.where(mask, correction_BC, 0.0))
    return TokenWeights(
        mask=counted_BC,
        advantages=advantages_BC,
        kl_advantages=kl_BC,
        penalties=ratio_penalties,
        metrics=metrics,
    )


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
        mask = mask & jnp.repeat(~advantage.equal_groups(rewards, group_size), group_size)[:, None]
    return mask


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


def kl_shares(batch: UpdateBatch) -> np.ndarray | None:
    """Return the share `[B]` of the KL in the reward in each sample's advantage.

    A sample without an advantage has a share of 0. None where the batch has no `kl_advantages`,
    where advantages differ along a completion, and where the loss has penalties too.
    """
    if batch.kl_advantages is None or batch.penalties is not None:
        return None
    mask, parts_B = np.asarray(batch.completion_mask), []
    for leaf in (batch.advantages, batch.kl_advantages):
        low_B = np.min(leaf, axis=1, where=mask, initial=np.inf)
        high_B = np.max(leaf, axis=1, where=mask, initial=-np.inf)
        if np.any(low_B < high_B):
            return None
        parts_B.append(np.where(mask.any(axis=1), high_B, 0))
    total_B, kl_B = parts_B
    return np.divide(kl_B, total_B, out=np.zeros_like(kl_B), where=total_B != 0)


def _largest(values: Array, count: Array) -> Array:
    """Mark the `count` largest finite entries."""
    flat = values.reshape(-1)
    order = jnp.arange(flat.size, dtype=jnp.int32)
    rank = jnp.zeros_like(order).at[jnp.argsort(-flat)].set(order)
    return ((rank < count) & (flat > -jnp.inf)).reshape(values.shape)
