"""How much there is to learn from in a batch: reward variance, gradient noise, who carries it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import at_least_float32
from ntkrl.types import Array


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
    # the spread and not the variance says "equal": the mean of equal numbers may be off by a bit
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


@jax.jit
def gradient_noise(gram: Array) -> GradientNoise:
    """Return the signal-to-noise ratio and the simple noise scale of per-sample gradients.

    Args:
      gram: `[B, B]` ⟨g_i, g_j⟩, B ≥ 2, for instance `ntk.score_gram(…, by="sequence")` with the
        advantages as weights. Samples are taken as independent; baselines within a group make them
        weakly dependent.

    Returns:
      GradientNoise of scalars; the unbiased mean square is that of noise_scale's denominator.

    Source: McCandlish et al. 1812.06162, section 2.2 and appendix A.1.
    """
    gram = at_least_float32(gram)
    return noise_from_squares(jnp.diagonal(gram), jnp.mean(gram))


def noise_from_squares(squares: Array, mean_square: Array) -> GradientNoise:
    """Return `gradient_noise` of what it needs of the Gram matrix: `[B]` ‖g_i‖², and ‖ḡ‖²."""
    size = squares.shape[0]
    noise = (jnp.sum(squares) - size * mean_square) / (size - 1)
    return GradientNoise(
        mean_square, noise, mean_square / noise, noise / (mean_square - noise / size)
    )


@jax.jit
def entropy_share(entropy: Array, amounts: Array, mask: Array, fraction: float = 0.2) -> Array:
    """Return the share of the policy gradient on the tokens with the largest entropy.

    What a token's amount is, is the caller's choice:
    A² ‖g‖² with ‖g‖² = 1 − 2π(y) + Σ π², its squared gradient in the logits; or the row sums of
    `ntk.score_gram` with advantages as weights, ⟨∇_t, Σ_s ∇_s⟩, whose shares add up over any
    partition of tokens and leave [0, 1] where parts oppose each other.

    Args:
      entropy: `[...]` H(π) at each token (nats).
      amounts: `[...]`.
      mask: `[...]` bool, tokens that count.
      fraction: ρ, of the tokens that are the top, in (0, 1]; at least one token.

    Returns:
      Σ of the amounts on the top ρ of tokens over Σ of all, a scalar.

    Source: Wang et al. 2506.01939 (ρ = 0.2).
    """
    count = jnp.sum(mask)
    amounts = jnp.where(mask, at_least_float32(amounts), 0).ravel()
    falling = jnp.argsort(jnp.where(mask, -at_least_float32(entropy), jnp.inf).ravel())
    top = jnp.arange(falling.size) < jnp.clip(jnp.round(fraction * count), 1, count)
    return jnp.sum(jnp.where(top, amounts[falling], 0)) / jnp.sum(amounts)
