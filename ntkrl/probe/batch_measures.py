"""Measures of a training batch: its learning signal, and one optimizer step on its own tokens."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import at_least_float32, masked_total, mean
from ntkrl.probe.distributions import advantage_covariance, token_masses, top_fraction
from ntkrl.probe.features import ches, head_sums
from ntkrl.scoring import completion_features, head_of
from ntkrl.softmax import OutputHead, SoftmaxOptions, token_statistics
from ntkrl.types import Array, Params, Policy, UpdateBatch

TILE = 8192
"""Vocabulary rows whose logits exist at a time."""


def reward_signal(
    rewards: np.ndarray, tolerance: float = 0.0
) -> tuple[np.ndarray, dict[str, float]]:
    """Return the variance of the rewards of each prompt, which bounds how fast it can improve.

    Args:
      rewards: `[P, N]`, N ≥ 2.
      tolerance: standard deviation up to which a prompt's rewards count as equal, ≥ 0.

    Returns:
      `(variances [P], scalars)`: unbiased variances (reward²), their mean `reward_variance`, and
      `frac_reward_zero_std`, the fraction of prompts without any.

    Source: Razin et al. 2503.15477.
    """
    rewards_PN = np.asarray(rewards, np.float64)
    variances_P = rewards_PN.var(axis=1, ddof=1)
    # equality by the range: the variance of equal numbers is not always exactly 0
    equal_P = np.ptp(rewards_PN, axis=1) == 0
    return variances_P, {
        "reward_variance": float(np.mean(variances_P)),
        "frac_reward_zero_std": float(np.mean(equal_P | (np.sqrt(variances_P) <= tolerance))),
    }


class GradientNoise(NamedTuple):
    """Mean and spread of B per-sample gradients g_i with mean ḡ.

    mean_square: ‖ḡ‖², biased upwards by noise/B.
    noise: tr Cov(g) = Σ‖g_i − ḡ‖²/(B − 1).
    signal_to_noise: ‖ḡ‖²/tr Cov(g).
    noise_scale: tr Cov(g)/(‖ḡ‖² − tr Cov(g)/B), samples; the batch size up to which larger
      batches save steps. Negative or huge where the batch cannot tell the mean from 0.
    """

    mean_square: Array
    noise: Array
    signal_to_noise: Array
    noise_scale: Array


def noise_from_squares(squares: Array, mean_square: Array) -> GradientNoise:
    """Return the signal-to-noise ratio and the simple noise scale of per-sample gradients.

    Args:
      squares: `[B]` ‖g_i‖², B ≥ 2. Samples are taken as independent; baselines within a group make
        them weakly dependent.
      mean_square: ‖ḡ‖².

    Returns:
      GradientNoise of scalars; the unbiased mean square is that of noise_scale's denominator.

    Source: McCandlish et al. 1812.06162, section 2.2 and appendix A.1.
    """
    size = squares.shape[0]
    noise = (jnp.sum(squares) - size * mean_square) / (size - 1)
    return GradientNoise(
        mean_square, noise, mean_square / noise, noise / (mean_square - noise / size)
    )


@jax.jit
def entropy_share(entropy: Array, amounts: Array, mask: Array, fraction: float = 0.2) -> Array:
    """Return the share of the policy gradient on the tokens with the largest entropy.

    Amounts may be A² ‖g‖² with ‖g‖² = 1 − 2π(y) + Σ π², a token's squared gradient in the logits;
    or the row sums of `ntk.score_gram` with advantages as weights, ⟨∇_t, Σ_s ∇_s⟩, whose shares add
    up over any partition of tokens and leave [0, 1] where parts oppose each other.

    Args:
      entropy, amounts: `[...]` H(π) (nats) and amount of each token.
      mask: `[...]` bool, tokens that count.
      fraction: ρ, of the tokens that are the top, in (0, 1]; at least one token.

    Returns:
      Σ of the amounts on the top ρ of tokens over Σ of all, a scalar.

    Source: Wang et al. 2506.01939 (ρ = 0.2).
    """
    amounts = jnp.where(mask, at_least_float32(amounts), 0).ravel()
    falling = jnp.argsort(jnp.where(mask, -at_least_float32(entropy), jnp.inf).ravel())
    top = top_fraction(falling.size, jnp.sum(mask), fraction)
    return jnp.sum(jnp.where(top, amounts[falling], 0)) / jnp.sum(amounts)


@functools.partial(jax.jit, static_argnames=("policy", "temperature", "chunk_tokens", "group"))
def step_measures(
    policy: Policy,
    params: tuple[Params, Params],
    batch: UpdateBatch,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    group: int | None = None,
) -> dict[str, Array]:
    """Measure a step on its own batch.

    Args:
      policy: the network's functions.
      params: before and after the step.
      batch: of the step, not packed.
      temperature: of sampling, > 0.
      chunk_tokens: positions whose logits exist at a time, ≥ 1.
      group: completions of each prompt, in adjacent rows; None where prompts have one.

    Returns:
      Scalars: `probe/squeeze_sampled`, `_greedy` and `_others`, mean change (nats) of the log-mass
      of the sampled token, of the likeliest before and of all others, over tokens with A < 0 (0
      without any); `probe/advantage_covariance` and its `_top`; `signal/entropy_share`, of
      A² ‖e_y − π‖² on the top 20 % of tokens by entropy; with groups those of `group_measures`.
    """
    rows, length = batch.completion_mask.shape
    targets_BC, mask = batch.tokens[:, -length:], batch.completion_mask
    heads = [head_of(policy, tree) for tree in params]
    features = [
        completion_features(policy, tree, batch.tokens, batch.mask, length) for tree in params
    ]
    options = SoftmaxOptions(temperature, chunk_tokens, TILE)
    old = token_statistics(heads[0], features[0], targets_BC, options)
    before, after = (
        token_masses(
            head,
            phi_BCD.reshape(rows * length, -1),
            targets_BC.reshape(-1),
            old.argmax.reshape(-1),
            options._replace(chunk_tokens=min(chunk_tokens, 64)),
        )
        for head, phi_BCD in zip(heads, features, strict=True)
    )
    negative = (mask & (batch.advantages < 0)).reshape(-1)
    changes = jax.tree.map(jnp.subtract, after, before)._asdict()
    metrics = {
        f"probe/squeeze_{name}": mean(masked_total(change, negative))
        for name, change in changes.items()
    }
    covariance = advantage_covariance(old.log_probs, batch.advantages, mask)
    squares_BC = 1 - 2 * jnp.exp(old.log_probs) + old.sum_squares
    amounts_BC = jnp.square(batch.advantages) * squares_BC
    if group is not None:
        pair = heads[0], features[0]
        metrics |= group_measures(pair, targets_BC, batch.advantages, mask, group, temperature)
    return metrics | {
        "probe/advantage_covariance": covariance.mean,
        "probe/advantage_covariance_top": covariance.top,
        "signal/entropy_share": entropy_share(old.entropy, amounts_BC, mask),
    }


def group_measures(
    policy: tuple[OutputHead, Array],
    targets: Array,
    advantages: Array,
    mask: Array,
    group: int,
    temperature: float = 1.0,
) -> dict[str, Array]:
    """Measure the effect of the completions of a prompt on each other through the head.

    Args:
      policy: head and features `[B, C, D]` before the step.
      targets, advantages, mask: `[B, C]` of the completions' tokens.
      group: N completions of each prompt, in adjacent rows; divides B.
      temperature: of sampling, > 0.

    Returns:
      Scalars: `probe/ches` and `probe/ches_normalised`, mean over prompts of that of its best and
      its worst completion by advantage, without prompts of equal advantages; and means over tokens
      o of Σ_u A_u I(o, u) over the tokens u of the same prompt, see `head_sums`:
      `probe/head_sum_positive` and `probe/head_sum_negative`, u with A > 0 and A < 0, at tokens
      with A > 0 (their sums over tokens are −GWHES); `probe/head_sum_wrong`, u with A > 0 taken at
      A = 1, at tokens with A < 0 (NTHR). 0 where there is nothing to average.

    Source: Razin et al. 2410.08847; Deng et al. 2505.18830.
    """
    features = policy[1]
    weights_BC = jnp.where(mask, at_least_float32(advantages), 0)
    lengths_B = jnp.sum(mask, axis=1)
    means_B = jnp.sum(weights_BC, axis=1) / jnp.maximum(lengths_B, 1)

    def extremes(argument: Callable[..., Array], filler: float) -> tuple[Array, Array]:
        means_PN = jnp.where(lengths_B > 0, means_B, filler).reshape(-1, group)
        rows_P = jnp.arange(len(means_PN)) * group + argument(means_PN, axis=1)
        return rows_P, means_B[rows_P]

    best_P, high_P = extremes(jnp.argmax, -jnp.inf)
    worst_P, low_P = extremes(jnp.argmin, jnp.inf)
    scores = ches(features[best_P], mask[best_P], features[worst_P], mask[worst_P])
    metrics = {
        f"probe/{name}": mean(masked_total(score_P, high_P > low_P))
        for name, score_P in zip(("ches", "ches_normalised"), scores, strict=True)
    }
    return metrics | _mean_head_sums(policy, targets, weights_BC, group, temperature)


def _mean_head_sums(
    policy: tuple[OutputHead, Array],
    targets: Array,
    weights_BC: Array,
    group: int,
    temperature: float,
) -> dict[str, Array]:
    """Return the `probe/head_sum_…` of `group_measures`; weights: A, 0 at masked tokens."""
    positive_BC, negative_BC = jnp.maximum(weights_BC, 0), jnp.minimum(weights_BC, 0)
    weights_BCK = jnp.stack([positive_BC, negative_BC, weights_BC > 0], axis=-1)

    def by_prompt(leaf: Array) -> Array:
        return leaf.reshape(-1, group * leaf.shape[1], *leaf.shape[2:])

    def sums_of_prompt(tokens: tuple[Array, Array, Array]) -> Array:
        return head_sums(policy[0], *tokens, SoftmaxOptions(temperature, chunk_vocabulary=TILE))

    tokens = by_prompt(policy[1]), by_prompt(targets), by_prompt(weights_BCK)
    sums_PUK = jax.lax.map(sums_of_prompt, tokens)
    up_PU, down_PU = by_prompt(weights_BC > 0), by_prompt(weights_BC < 0)
    averaged = (("positive", up_PU), ("negative", up_PU), ("wrong", down_PU))
    return {
        f"probe/head_sum_{name}": mean(masked_total(sums_PUK[..., number], mask_PU))
        for number, (name, mask_PU) in enumerate(averaged)
    }
