"""How sure a policy is, and what moves its entropy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import at_least_float32, einsum, masked_total, mean
from ntkrl.probe.tiles import log_probs_by_tile, sum_over_tiles
from ntkrl.softmax import OutputHead, TokenStatistics, uncapped_logits
from ntkrl.types import Array


@jax.jit
def confidence_measures(statistics: TokenStatistics, mask: Array) -> dict[str, Array]:
    """Average over tokens what says how sure the policy is.

    Args:
      statistics: arrays `[...]` of some tokens.
      mask: `[...]` bool, tokens that count.

    Returns:
      Scalar means: `confidence` max π, `log_prob` of the sampled token and `greedy_log_prob` of the
      likeliest (nats), `entropy` (nats), `sum_squares` Σ_v π_v² (in [1/V, 1]); 0 without tokens.
    """
    values = {
        "confidence": statistics.max_prob,
        "log_prob": statistics.log_probs,
        "greedy_log_prob": jnp.log(statistics.max_prob),
        "entropy": statistics.entropy,
        "sum_squares": statistics.sum_squares,
    }
    return {name: mean(masked_total(value, mask)) for name, value in values.items()}


@jax.jit
def entropy_changes(logits: Array, changes: Mapping[str, Array]) -> dict[str, Array]:
    """Return the first-order change of H(π) that each part of a logit change makes.

    ΔH(o) = −Cov_{a∼π}(log π(a), Δz(a)) = −Σ_a π(a) (log π(a) + H) Δz(a). Linear in Δz: the changes
    of parts add up to that of their sum, whether parts are of the kernel (head, body, cross), of
    the batch (samples, A > 0 and A < 0) or of the contexts (o = u and others).

    Args:
      logits: `[O, V]`.
      changes: Δz `[O, V]` by part, for instance of `ntk.Kernel.apply(…, part)`.

    Returns:
      `[O]` by part (nats).

    Source: Cui et al. 2505.22617, lemma 1, with any Δz in place of the tabular one.
    """
    log_pi_OV = jax.nn.log_softmax(at_least_float32(logits))
    pi_OV = jnp.exp(log_pi_OV)
    # where: a token without mass adds nothing
    weights_OV = jnp.where(pi_OV > 0, pi_OV * log_pi_OV, 0)
    weights_OV -= pi_OV * jnp.sum(weights_OV, axis=1, keepdims=True)
    return {part: -jnp.sum(weights_OV * dz_OV, axis=1) for part, dz_OV in changes.items()}


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def entropy_changes_by_tile(
    head: OutputHead,
    features: Array,
    parts: Mapping[str, tuple[Array, Array]],
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    chunk_vocabulary: int | None = None,
) -> dict[str, Array]:
    """Do `entropy_changes` for logit changes given as matrix times features, by tiles.

    A step Δθ that moves W by ΔW, b by Δb and the features by Δφ has the parts (ΔW, φ), (W, Δφ) and
    (Δb, 1); scale, soft-cap and temperature of the head are applied to them as to its logits.

    Args:
      head: the head's arrays, before the step.
      features: φ `[O, D]`, before the step.
      parts: by name a matrix `[V, D']` and vectors `[O, D']`, of any D'.
      temperature: divides the logits; > 0.
      chunk_tokens: positions whose logits exist at a time, ≥ 1.
      chunk_vocabulary: vocabulary rows whose logits exist at a time, ≥ 1; None for all.

    Returns:
      `[O]` by part (nats).

    Source: ours.
    """
    matrices = {part: matrix for part, (matrix, _) in parts.items()}
    given = features, {part: vectors for part, (_, vectors) in parts.items()}

    def position(given: tuple[Array, Mapping[str, Array]]) -> dict[str, Array]:
        phi_D, vectors = given
        log_probs_of = log_probs_by_tile(head, phi_D, temperature, chunk_vocabulary)

        def term(number: Array) -> tuple[Array, dict[str, tuple[Array, Array]]]:
            tile, log_pi_R = log_probs_of(number)
            pi_R = jnp.exp(log_pi_R)
            weight_R = jnp.where(pi_R > 0, pi_R * log_pi_R, 0)
            sums = {}
            for part, matrix in matrices.items():
                rows = jax.lax.dynamic_slice_in_dim(matrix, tile.start, pi_R.shape[0])
                dz_R = einsum("rd,d->r", at_least_float32(rows), vectors[part])
                dz_R *= head.scale / temperature
                if head.soft_cap is not None:
                    raw_R = uncapped_logits(phi_D, tile.weight, tile.bias, head.scale)
                    dz_R *= 1 - jnp.tanh(raw_R / head.soft_cap) ** 2
                sums[part] = (weight_R @ dz_R, pi_R @ dz_R)
            return jnp.sum(weight_R), sums

        moment, sums = sum_over_tiles(term, head, chunk_vocabulary)
        return {part: moment * at_pi - at_log for part, (at_log, at_pi) in sums.items()}

    return jax.lax.map(position, given, batch_size=chunk_tokens)


class Covariance(NamedTuple):
    """How log π and advantage go together over tokens.

    tokens: c_t = (log π_t − mean)(A_t − mean) `[...]`, 0 where masked.
    mean: of c_t over tokens; entropy falls where it is positive.
    top: mean of c_t over the tokens with the largest.
    """

    tokens: Array
    mean: Array
    top: Array


@jax.jit
def advantage_covariance(
    log_probs: Array, advantages: Array, mask: Array, fraction: float = 2e-4
) -> Covariance:
    """Return the covariance of log π and advantage, per token and for the largest of them.

    Args:
      log_probs: `[...]` of the sampled tokens (nats).
      advantages: `[...]`.
      mask: `[...]` bool, tokens that count.
      fraction: of the tokens that are the top, in (0, 1]; at least one token.

    Returns:
      Covariance.

    Source: Cui et al. 2505.22617, section 4 (Clip-Cov and KL-Cov act on the top 2e-4).
    """
    first, second = at_least_float32(log_probs), at_least_float32(advantages)
    together = jnp.where(
        mask,
        (first - mean(masked_total(first, mask))) * (second - mean(masked_total(second, mask))),
        0,
    )
    count = jnp.sum(mask)
    falling = -jnp.sort(jnp.where(mask, -together, jnp.inf).ravel())
    top = jnp.arange(falling.size) < jnp.clip(jnp.round(fraction * count), 1, count)
    return Covariance(
        together, mean(masked_total(together, mask)), mean(masked_total(falling, top))
    )


class EntropyFit(NamedTuple):
    """R̄ ≈ −a e^H + b over the steps of a run.

    a, b: coefficients (reward).
    ceiling: b − a, the reward predicted at H = 0.
    residual: root mean square of what the fit leaves (reward).
    """

    a: float
    b: float
    ceiling: float
    residual: float


def fit_entropy_reward(entropy: np.ndarray, reward: np.ndarray) -> EntropyFit:
    """Fit R̄ = −a e^H + b by least squares.

    Args:
      entropy: `[n]` mean entropy of a policy at n moments (nats), not all equal.
      reward: `[n]` mean reward at the same moments.

    Returns:
      EntropyFit.

    Raises:
      ValueError: fewer than two different entropies.

    Source: Cui et al. 2505.22617 (R = −a exp H + b).
    """
    entropy_n, reward_n = np.asarray(entropy, float), np.asarray(reward, float)
    if len(np.unique(entropy_n)) < 2:
        raise ValueError("a fit of reward on entropy needs two different entropies or more.")
    design_n2 = np.stack([-np.exp(entropy_n), np.ones_like(entropy_n)], axis=1)
    (a, b), *_ = np.linalg.lstsq(design_n2, reward_n)
    left_n = reward_n - design_n2 @ (a, b)
    return EntropyFit(float(a), float(b), float(b - a), float(np.sqrt(np.mean(left_n**2))))
