"""Measures of next-token distributions: confidence, entropy and its changes, divergence.

Sums over the vocabulary that need log π of all V tokens are computed at one position, a tile of
vocabulary rows at a time, in two passes over the head: one for log Σ exp z, one for the sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import at_least_float32, einsum, masked_total, mean
from ntkrl.softmax import (
    DEFAULT_OPTIONS,
    OutputHead,
    SoftmaxOptions,
    Tile,
    TokenStatistics,
    slice_tile,
    tile_count,
    tile_logits,
    uncapped_logits,
)
from ntkrl.types import Array


def log_normaliser(head: OutputHead, features: Array, options: SoftmaxOptions) -> Array:
    """Return log Σ_v exp z_v of one position with features `[D]`, a scalar."""
    rows, count = tile_count(head, options.chunk_vocabulary)

    def add(total: Array, number: Array) -> tuple[Array, None]:
        tile = slice_tile(head, rows, number)
        z_1R = tile_logits(head, tile, features[None], options.temperature)
        return jnp.logaddexp(total, jax.nn.logsumexp(z_1R)), None

    low = jnp.full((), -jnp.inf, jnp.promote_types(features.dtype, jnp.float32))
    return jax.lax.scan(add, low, jnp.arange(count, dtype=jnp.int32))[0]


def tile_log_probs(
    head: OutputHead, features: Array, options: SoftmaxOptions
) -> Callable[[Array], tuple[Tile, Array]]:
    """Return `number -> (tile, log π [R])` of one position with features `[D]`.

    R is the options' chunk_vocabulary; log π (nats) is −∞ at repeated rows.
    """
    rows, _ = tile_count(head, options.chunk_vocabulary)
    normaliser = log_normaliser(head, features, options)

    def log_probs(number: Array) -> tuple[Tile, Array]:
        tile = slice_tile(head, rows, number)
        return tile, tile_logits(head, tile, features[None], options.temperature)[0] - normaliser

    return log_probs


def sum_over_tiles(
    term: Callable[[Array], Any], head: OutputHead, chunk_vocabulary: int | None
) -> Any:
    """Sum `term(number)`, a tree of arrays, over the tiles of a head."""
    _, count = tile_count(head, chunk_vocabulary)

    def add(sums: Any, number: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, term(number)), None

    shapes = jax.eval_shape(term, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, jnp.arange(count, dtype=jnp.int32))[0]


@jax.jit
def confidence_measures(statistics: TokenStatistics, mask: Array) -> dict[str, Array]:
    """Average measures of confidence over the tokens that a bool mask `[...]` counts.

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
    """Return the first-order change of H(π) by each part of a logit change.

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
    # where: 0 · log 0 is 0
    weights_OV = jnp.where(pi_OV > 0, pi_OV * log_pi_OV, 0)
    weights_OV -= pi_OV * jnp.sum(weights_OV, axis=1, keepdims=True)
    return {part: -jnp.sum(weights_OV * dz_OV, axis=1) for part, dz_OV in changes.items()}


@functools.partial(jax.jit, static_argnames=("options",))
def entropy_changes_by_tile(
    head: OutputHead,
    features: Array,
    parts: Mapping[str, tuple[Array, Array]],
    options: SoftmaxOptions = DEFAULT_OPTIONS,
) -> dict[str, Array]:
    """Compute `entropy_changes` of logit changes of the form matrix times features, by tiles.

    A step Δθ that moves W by ΔW, b by Δb and the features by Δφ has the parts (ΔW, φ), (W, Δφ) and
    (Δb, 1); scale, soft-cap and temperature of the head are applied to them as to its logits.

    Args:
      head, features: the head's arrays and φ `[O, D]`, before the step.
      parts: by name a matrix `[V, D']` and vectors `[O, D']`, of any D'.
      options: temperature and chunk sizes.

    Returns:
      `[O]` by part (nats).

    Source: ours.
    """
    matrices = {part: matrix for part, (matrix, _) in parts.items()}
    vectors_O = {part: vectors for part, (_, vectors) in parts.items()}

    def position(operands: tuple[Array, Mapping[str, Array]]) -> dict[str, Array]:
        phi_D, vectors = operands
        log_probs = tile_log_probs(head, phi_D, options)

        def term(number: Array) -> tuple[Array, dict[str, tuple[Array, Array]]]:
            tile, log_pi_R = log_probs(number)
            pi_R = jnp.exp(log_pi_R)
            weight_R = jnp.where(pi_R > 0, pi_R * log_pi_R, 0)
            sums = {}
            for part, matrix in matrices.items():
                rows = jax.lax.dynamic_slice_in_dim(matrix, tile.start, pi_R.shape[0])
                dz_R = einsum("rd,d->r", at_least_float32(rows), vectors[part])
                dz_R *= head.scale / options.temperature
                if head.soft_cap is not None:
                    raw_R = uncapped_logits(phi_D, tile.weight, tile.bias, head.scale)
                    dz_R *= 1 - jnp.tanh(raw_R / head.soft_cap) ** 2
                sums[part] = (weight_R @ dz_R, pi_R @ dz_R)
            return jnp.sum(weight_R), sums

        moment, sums = sum_over_tiles(term, head, options.chunk_vocabulary)
        return {part: moment * at_pi - at_log for part, (at_log, at_pi) in sums.items()}

    return jax.lax.map(position, (features, vectors_O), batch_size=options.chunk_tokens)


class Covariance(NamedTuple):
    """Covariance of log π and advantage over tokens.

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
      log_probs, advantages: `[...]` of the sampled tokens (nats).
      mask: `[...]` bool, tokens that count.
      fraction: of the tokens that are the top, in (0, 1]; at least one token.

    Source: Cui et al. 2505.22617, section 4 (Clip-Cov and KL-Cov act on the top 2e-4).
    """
    first, second = at_least_float32(log_probs), at_least_float32(advantages)
    products = jnp.where(
        mask,
        (first - mean(masked_total(first, mask))) * (second - mean(masked_total(second, mask))),
        0,
    )
    falling = -jnp.sort(jnp.where(mask, -products, jnp.inf).ravel())
    top = top_fraction(falling.size, jnp.sum(mask), fraction)
    averages = mean(masked_total(products, mask)), mean(masked_total(falling, top))
    return Covariance(products, *averages)


def top_fraction(size: int, count: Array, fraction: float) -> Array:
    """Return `[size]` bool, True on the first `fraction` of `count` entries, at least on one."""
    return jnp.arange(size) < jnp.clip(jnp.round(fraction * count), 1, count)


class EntropyFit(NamedTuple):
    """R̄ ≈ −a e^H + b over the steps of a run.

    a, b: coefficients (reward).
    ceiling: b − a, the reward predicted at H = 0.
    residual: root mean square residual of the fit (reward).
    """

    a: float
    b: float
    ceiling: float
    residual: float


def fit_entropy_reward(entropy: np.ndarray, reward: np.ndarray) -> EntropyFit:
    """Fit R̄ = −a e^H + b by least squares.

    Args:
      entropy, reward: `[n]` mean entropy of a policy (nats) and mean reward at n steps.

    Raises:
      ValueError: fewer than two different entropies.

    Source: Cui et al. 2505.22617 (R = −a exp H + b).
    """
    entropy_n, reward_n = np.asarray(entropy, float), np.asarray(reward, float)
    if len(np.unique(entropy_n)) < 2:
        raise ValueError("a fit of reward on entropy needs two different entropies or more.")
    design_n2 = np.stack([-np.exp(entropy_n), np.ones_like(entropy_n)], axis=1)
    (a, b), *_ = np.linalg.lstsq(design_n2, reward_n)
    residual_n = reward_n - design_n2 @ (a, b)
    return EntropyFit(float(a), float(b), float(b - a), float(np.sqrt(np.mean(residual_n**2))))


class Divergences(NamedTuple):
    """Distances of the next-token distributions π and ρ at each position; all `[O]`.

    kl: KL(π‖ρ) (nats, ≥ 0).
    kl_reverse: KL(ρ‖π) (nats, ≥ 0).
    total_variation: ½ Σ_v |π_v − ρ_v|, in [0, 1].
    """

    kl: Array
    kl_reverse: Array
    total_variation: Array


def divergences(
    policy: tuple[OutputHead, Array],
    other: tuple[OutputHead, Array],
    options: SoftmaxOptions = DEFAULT_OPTIONS,
) -> Divergences:
    """Compare two policies at O positions, with logits for one tile at a time.

    With ρ the policy before training, `kl_reverse` is the KL of RL's razor: base first.

    Args:
      policy, other: head and features `[O, D]` of π and of ρ, over the same vocabulary.
      options: temperature of both, and chunk sizes.

    Raises:
      ValueError: different vocabularies or numbers of positions.

    Source: Shenfeld et al. 2509.04259 (forgetting tracks KL on the new task).
    """
    sizes = [(head.weight.shape[0], features.shape[0]) for head, features in (policy, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"policies differ in vocabulary or positions: (V, O) is {sizes[0]} and {sizes[1]}."
        )
    return _divergences(policy, other, options)


@functools.partial(jax.jit, static_argnames=("options",))
def _divergences(
    policy: tuple[OutputHead, Array], other: tuple[OutputHead, Array], options: SoftmaxOptions
) -> Divergences:
    def position(features: tuple[Array, Array]) -> Divergences:
        log_pi = tile_log_probs(policy[0], features[0], options)
        log_rho = tile_log_probs(other[0], features[1], options)

        def term(number: Array) -> Divergences:
            here_R, there_R = log_pi(number)[1], log_rho(number)[1]
            pi_R, rho_R = jnp.exp(here_R), jnp.exp(there_R)
            return Divergences(
                _expectation(pi_R, here_R - there_R),
                _expectation(rho_R, there_R - here_R),
                0.5 * jnp.sum(jnp.abs(pi_R - rho_R)),
            )

        return sum_over_tiles(term, policy[0], options.chunk_vocabulary)

    return jax.lax.map(position, (policy[1], other[1]), batch_size=options.chunk_tokens)


def _expectation(probs_R: Array, values_R: Array) -> Array:
    # where: a token of probability 0 adds 0, even at an infinite value
    return jnp.sum(jnp.where(probs_R > 0, probs_R * values_R, 0))
