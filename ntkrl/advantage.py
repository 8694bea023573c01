"""Rewards → advantages. Groups are N consecutive rows; one pure function per estimator."""

from __future__ import annotations

import jax.numpy as jnp

from ntkrl.types import Array


def leave_one_out(rewards: Array, group_size: int) -> Array:
    """Subtract the mean reward of the other completions of the same prompt.

    A_i = r_i − 1/(N−1) Σ_{j≠i} r_j.

    Args:
      rewards: `[B]`, B = P·N, groups consecutive.
      group_size: N ≥ 2.

    Returns:
      `[B]`.

    Raises:
      ValueError: N < 2, or B no multiple of N.

    Source: Kool et al. 2019; Ahmadian et al. 2402.14740, eq. 8.
    """
    rewards_PN = _groups(rewards, group_size, "leave_one_out")
    total_P1 = jnp.sum(rewards_PN, axis=1, keepdims=True)
    others_PN = (total_P1 - rewards_PN) / (group_size - 1)
    return (rewards_PN - others_PN).reshape(-1)


def group_normalised(rewards: Array, group_size: int, epsilon: float = 1e-4) -> Array:
    """Subtract the group's mean and divide by its standard deviation.

    A_i = (r_i − mean) / (std + ε), std unbiased (ddof 1).

    Args:
      rewards: `[B]`, groups consecutive.
      group_size: N ≥ 2.
      epsilon: ε, TRL's 1e-4; a group of equal rewards gets zeros.

    Returns:
      `[B]`.

    Raises:
      ValueError: N < 2, or B no multiple of N.

    Source: Shao et al. 2402.03300, section 4.1.2; ddof and ε as in TRL's GRPOTrainer.
    """
    rewards_PN = _groups(rewards, group_size, "group_normalised")
    centred_PN = rewards_PN - jnp.mean(rewards_PN, axis=1, keepdims=True)
    spread_P1 = jnp.std(rewards_PN, axis=1, ddof=1, keepdims=True)
    return (centred_PN / (spread_P1 + epsilon)).reshape(-1)


def _groups(rewards: Array, group_size: int, name: str) -> Array:
    if group_size < 2:
        raise ValueError(
            f"{name} compares the completions of one prompt and needs at least 2 of them, not "
            f"{group_size}; raise rollout.completions_per_prompt."
        )
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{name}: rewards must be one number per completion, a multiple of {group_size}, not "
            f"of shape {tuple(rewards.shape)}."
        )
    return rewards.reshape(-1, group_size)
