"""Advantages from rewards: one pure function per estimator; groups are N consecutive rows.

Every function takes rewards `[B]`, B = P·N, and N, and returns `[B]`; `ESTIMATORS` names them.
Where the rewards that an estimator compares are all equal, the advantage is exactly 0 in any dtype:
a rounding error of a mean, divided by a deviation or by Adam, would become a full step.
"""

from collections.abc import Callable

import jax.numpy as jnp

from ntkrl.types import Array

EPSILON = 1e-4
"""ε that estimators add to a standard deviation; TRL's value."""
VARIANCE_EPSILON = 1e-8
"""ε that `reward_to_go` adds to a variance; as in verl's whitening."""


def no_baseline(rewards: Array, group_size: int) -> Array:
    """Return the rewards: REINFORCE without a baseline.

    Args:
      rewards: `[B]`.
      group_size: not used.

    Source: Williams 1992.
    """
    return rewards


def batch_mean(rewards: Array, group_size: int) -> Array:
    """Subtract the mean reward of the batch: REINFORCE with a baseline.

    A_i = r_i − 1/B Σ_j r_j.

    Args:
      rewards: `[B]`.
      group_size: not used.

    Source: Williams 1992, with the batch mean as the reinforcement baseline.
    """
    equal = jnp.all(rewards == rewards[:1])
    return jnp.where(equal, 0, rewards - jnp.mean(rewards))


def leave_one_out(rewards: Array, group_size: int) -> Array:
    """Subtract the mean reward of the other completions of the same prompt.

    A_i = r_i − 1/(N−1) Σ_{j≠i} r_j.

    Args:
      rewards: `[B]`, B = P·N, groups consecutive.
      group_size: N ≥ 2.

    Raises:
      ValueError: N < 2, or B not a multiple of N.

    Source: Kool et al. 2019; Ahmadian et al. 2402.14740, eq. 8.
    """
    rewards_PN = _groups(rewards, group_size, "leave_one_out")
    total_P1 = jnp.sum(rewards_PN, axis=1, keepdims=True)
    others_PN = (total_P1 - rewards_PN) / (group_size - 1)
    return _zero_where_equal(rewards_PN - others_PN, rewards_PN)


def group_mean(rewards: Array, group_size: int) -> Array:
    """Subtract the group's mean and divide by nothing.

    A_i = r_i − mean.

    Args:
      rewards: `[B]`, groups consecutive.
      group_size: N ≥ 2.

    Raises:
      ValueError: N < 2, or B not a multiple of N.

    Source: Liu et al. 2503.20783 (Dr. GRPO).
    """
    rewards_PN = _groups(rewards, group_size, "group_mean")
    centered_PN = rewards_PN - jnp.mean(rewards_PN, axis=1, keepdims=True)
    return _zero_where_equal(centered_PN, rewards_PN)


def group_normalised(rewards: Array, group_size: int) -> Array:
    """Subtract the group's mean and divide by its standard deviation.

    A_i = (r_i − mean) / (std + ε), std unbiased (ddof = 1).

    Args:
      rewards: `[B]`, groups consecutive.
      group_size: N ≥ 2.

    Raises:
      ValueError: N < 2, or B not a multiple of N.

    Source: Shao et al. 2402.03300, section 4.1.2; ddof and ε as in TRL's GRPOTrainer.
    """
    rewards_PN = _groups(rewards, group_size, "group_normalised")
    spread_P1 = jnp.std(rewards_PN, axis=1, keepdims=True, ddof=1)
    centered_PN = rewards_PN - jnp.mean(rewards_PN, axis=1, keepdims=True)
    return _zero_where_equal(centered_PN / (spread_P1 + EPSILON), rewards_PN)


def batch_scaled(rewards: Array, group_size: int) -> Array:
    """Subtract the group's mean and divide by the batch's standard deviation of rewards.

    A_i = (r_i − mean of the group) / (std of the batch + ε), std unbiased.

    Args:
      rewards: `[B]`, groups consecutive.
      group_size: N ≥ 2.

    Raises:
      ValueError: N < 2, or B not a multiple of N.

    Source: Hu et al. 2508.08221 (Lite PPO); TRL's scale_rewards="batch".
    """
    centered = group_mean(rewards, group_size)
    return centered / (jnp.std(rewards, ddof=1) + EPSILON)


def max_likelihood(rewards: Array, group_size: int) -> Array:
    """Subtract the group's mean and divide by it: the gradient of log pass rate.

    A_i = (r_i − mean) / mean for rewards in {0, 1}; 0 for a group without success.

    Args:
      rewards: `[B]`, ≥ 0, groups consecutive.
      group_size: N ≥ 2.

    Raises:
      ValueError: N < 2, or B not a multiple of N.

    Source: Tajwar et al. 2602.02710 (MaxRL); ∇ log p = ∇p / p with p the pass rate.
    """
    rewards_PN = _groups(rewards, group_size, "max_likelihood")
    mean_P1 = jnp.mean(rewards_PN, axis=1, keepdims=True)
    safe_P1 = jnp.where(mean_P1 > 0, mean_P1, 1.0)
    relative_PN = jnp.where(mean_P1 > 0, (rewards_PN - mean_P1) / safe_P1, 0.0)
    return _zero_where_equal(relative_PN, rewards_PN)


def pass_at_k(rewards: Array, group_size: int, k: int) -> Array:
    """Weight completions by their effect on pass@k, over all subgroups of k.

    With S_i the mean over subsets of k that contain i of "one of them succeeds" and R̄ the mean over
    all subsets, A_i = (S_i − R̄) / (√(R̄ (1 − R̄)) + ε). For c successes of N,
    R̄ = 1 − C(N−c, k)/C(N, k); S_i = 1 for a success, 1 − C(N−c−1, k−1)/C(N−1, k−1) otherwise.

    Args:
      rewards: `[B]`, a success where > 0, groups consecutive.
      group_size: N ≥ 2.
      k: 1 to N − 1; k = N would give every completion the same weight.

    Raises:
      ValueError: N < 2, B not a multiple of N, or k out of range.

    Source: Chen et al. 2508.10751, section 2.3 (analytical derivation).
    """
    rewards_PN = _groups(rewards, group_size, "pass_at_k")
    solved_PN = rewards_PN > 0
    if not 1 <= k < group_size:
        raise ValueError(
            f"pass_at_k needs 1 ≤ k < completions per prompt = {group_size}, not k = {k}."
        )
    wrong_P1 = jnp.sum(~solved_PN, axis=1, keepdims=True)
    mean_P1 = 1 - _all_drawn_from(wrong_P1, k, group_size)
    with_wrong_P1 = 1 - _all_drawn_from(wrong_P1 - 1, k - 1, group_size - 1)
    deviation_P1 = jnp.sqrt(mean_P1 * (1 - mean_P1))
    subset_PN = jnp.where(solved_PN, 1.0, with_wrong_P1)
    return _zero_where_equal((subset_PN - mean_P1) / (deviation_P1 + EPSILON), rewards_PN)


def _all_drawn_from(part: Array, k: int, total: int) -> Array:
    """Return C(part, k)/C(total, k), the probability that k drawn of `total` are all in `part`."""
    share = jnp.ones(part.shape, float)
    for drawn in range(k):
        share = share * jnp.maximum(part - drawn, 0) / (total - drawn)
    return share


def reward_to_go(rewards: Array, token_penalties: Array, mask: Array) -> Array:
    """Normalise rewards to go over the tokens of the batch (REINFORCE++).

    G_it = r_i − Σ_{s ≥ t} p_is with p the KL penalty of each token (β k1; 0 for none);
    A_it = (G_it − mean) / √(var + ε), mean and variance (unbiased) over all tokens of the batch.

    Args:
      rewards: `[B]`.
      token_penalties: `[B, C]`.
      mask: `[B, C]` completion mask.

    Returns:
      `[B, C]`, 0 where masked.

    Source: Hu et al. 2501.03262, eqs. 4 to 6, with discount 1.
    """
    masked_BC = jnp.where(mask, token_penalties, 0.0)
    ahead_BC = jnp.cumsum(masked_BC[:, ::-1], axis=1)[:, ::-1]
    returns_BC = rewards[:, None] - ahead_BC
    count = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask, returns_BC, 0.0)) / jnp.maximum(count, 1)
    squares_BC = jnp.where(mask, jnp.square(returns_BC - mean), 0.0)
    variance = jnp.sum(squares_BC) / jnp.maximum(count - 1, 1)
    low = jnp.min(jnp.where(mask, returns_BC, jnp.inf))
    high = jnp.max(jnp.where(mask, returns_BC, -jnp.inf))
    differ_BC = mask & (low < high)
    return jnp.where(differ_BC, (returns_BC - mean) / jnp.sqrt(variance + VARIANCE_EPSILON), 0.0)


def equal_groups(rewards: Array, group_size: int) -> Array:
    """Return which groups `[P]` have equal rewards, so that their advantages are all zero."""
    return _are_equal(rewards.reshape(-1, group_size))


def _are_equal(rewards: Array) -> Array:
    return jnp.all(rewards == rewards[:, :1], axis=1)


def _zero_where_equal(advantages: Array, rewards: Array) -> Array:
    """Flatten `[P, N]` advantages, with 0 in groups of equal rewards."""
    return jnp.where(_are_equal(rewards)[:, None], 0, advantages).reshape(-1)


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


ESTIMATORS: dict[str, Callable[[Array, int], Array]] = {
    "none": no_baseline,
    "batch_mean": batch_mean,
    "leave_one_out": leave_one_out,
    "group_mean": group_mean,
    "group_normalised": group_normalised,
    "batch_scaled": batch_scaled,
    "max_likelihood": max_likelihood,
}
LINEAR = ("none", "batch_mean", "leave_one_out", "group_mean")
"""Estimators that are linear in the rewards."""
