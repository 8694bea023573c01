"""From rewards and log-probs to the weight of each token, by the objective's axes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ntkrl import advantage, update
from ntkrl.types import Array


def advantages(
    objective: update.Objective, group: int, rewards: Array, penalties: Array, mask: Array
) -> Array:
    """Return `[B, C]` advantages; penalties on tokens are paid out of the reward.

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
    paid_B = rewards - jnp.sum(penalties, axis=1)
    if objective.advantage == "pass_at_k":
        found_B = advantage.pass_at_k(paid_B, group, objective.pass_k)
    else:
        found_B = advantage.ESTIMATORS[objective.advantage](paid_B, group)
    return jnp.broadcast_to(found_B[:, None], mask.shape)


def weigh(
    objective: update.Objective,
    group: int,
    rewards: Array,
    old_log_probs: Array,
    ref_log_probs: Array,
    behaviour_log_probs: Array,
    mask: Array,
    finished: Array,
    kl: Array | None,
    key: Array,
) -> dict[str, Any]:
    """Settle what multiplies each token.

    Args:
      objective: the axes.
      group: completions per prompt.
      rewards: `[B]`.
      old_log_probs, ref_log_probs, behaviour_log_probs: `[B, C]` of the trainer before the update,
        of the reference policy, and as tokens were drawn (nats).
      mask: `[B, C]` completion mask.
      finished: `[B]` bool, False where the budget cut the completion.
      kl: `[B, C]` the whole KL to the reference (nats), or None.
      key: consumed by covariance "clip".

    Returns:
      `mask` (tokens that count), `advantages`, `kl_advantages` and `penalties` of an UpdateBatch,
      and `metrics`.
    """
    counted_BC = update.counted_tokens(objective, mask, finished, rewards, group)
    log_probs = (old_log_probs, ref_log_probs)
    paid_BC = update.reward_penalties(objective, *log_probs, mask, kl)
    found_BC = advantages(objective, group, rewards, paid_BC, mask)
    correction_BC = update.correction_weights(objective, old_log_probs, behaviour_log_probs, mask)
    whole_BC = update.filter_sign(objective, found_BC) * correction_BC
    advantages_BC, penalties = update.covariance_weights(
        objective, old_log_probs, whole_BC, counted_BC, key
    )
    kl_BC = None
    in_reward = objective.kl_place == "reward" and objective.needs_reference
    if in_reward and objective.advantage in advantage.LINEAR:
        kl_BC = advantages(objective, group, jnp.zeros_like(rewards), paid_BC, mask)
        taken_out_BC = (advantages_BC == 0) & (found_BC != 0)
        kl_BC = jnp.where(taken_out_BC, 0.0, kl_BC * correction_BC)
    metrics = {}
    if objective.correction != "off":
        name, count = "sampling/importance_sampling_ratio", jnp.maximum(jnp.sum(mask), 1)
        metrics[f"{name}/mean"] = jnp.sum(jnp.where(mask, correction_BC, 0.0)) / count
        metrics[f"{name}/min"] = jnp.min(jnp.where(mask, correction_BC, jnp.inf))
        metrics[f"{name}/max"] = jnp.max(jnp.where(mask, correction_BC, 0.0))
    return {
        "mask": counted_BC,
        "advantages": advantages_BC,
        "kl_advantages": kl_BC,
        "penalties": penalties,
        "metrics": metrics,
    }
