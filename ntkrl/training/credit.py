"""Credit assignment: from rewards and log-probs to the weight of each token, by the objective."""

from __future__ import annotations

import dataclasses
from typing import overload

import chex
import jax.numpy as jnp
import numpy as np

from ntkrl import advantage, update
from ntkrl.types import Array, PreferenceBatch, UpdateBatch


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
    objective: update.Objective, group: int, rewards: Array, penalties: Array, mask: Array
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
    objective: update.Objective, group: int, rollout: RolloutArrays, key: Array
) -> TokenWeights:
    """Return the weight of each token in the loss.

    Args:
      objective: the axes.
      group: completions per prompt.
      rollout: rewards, log-probs and masks.
      key: consumed by covariance "clip".
    """
    rewards, mask, old_log_probs = rollout.rewards, rollout.mask, rollout.old_log_probs
    counted_BC = update.counted_tokens(objective, mask, rollout.finished, rewards, group)
    penalties_BC = update.reward_penalties(
        objective, old_log_probs, rollout.ref_log_probs, mask, rollout.kl
    )
    plain_BC = advantages(objective, group, rewards, penalties_BC, mask)
    correction_BC = update.correction_weights(
        objective, old_log_probs, rollout.behaviour_log_probs, mask
    )
    corrected_BC = update.filter_sign(objective, plain_BC) * correction_BC
    advantages_BC, ratio_penalties = update.covariance_weights(
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


@overload
def without_kl_advantages(batch: UpdateBatch) -> UpdateBatch: ...


@overload
def without_kl_advantages(batch: PreferenceBatch) -> PreferenceBatch: ...


def without_kl_advantages(batch: UpdateBatch | PreferenceBatch) -> UpdateBatch | PreferenceBatch:
    """Return a batch without the separate KL-advantage term, which only ledgers read."""
    return (
        dataclasses.replace(batch, kl_advantages=None) if isinstance(batch, UpdateBatch) else batch
    )


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
