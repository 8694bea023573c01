"""Measures of next-token distributions: confidence, entropy, divergence, probability mass.

Sums over the vocabulary that need log π of all V tokens are computed at one position, a tile of
vocabulary rows at a time, in two passes over the head: one for log Σ exp z, one for the sums.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, masked_total, mean
from ntkrl.softmax import (
    DEFAULT_OPTIONS,
    OutputHead,
    SoftmaxOptions,
    Tile,
    TokenStatistics,
    slice_tile,
    tile_count,
    tile_logits,
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


class Masses(NamedTuple):
    """Log-probability by token at each position; all `[O]` (nats).

    sampled: log π of the sampled token.
    greedy: log π of the token that was likeliest before the update.
    others: log of the mass of all other tokens.
    """

    sampled: Array
    greedy: Array
    others: Array


@functools.partial(jax.jit, static_argnames=("options",))
def token_masses(
    head: OutputHead,
    features: Array,
    sampled: Array,
    greedy: Array,
    options: SoftmaxOptions = DEFAULT_OPTIONS,
) -> Masses:
    """Compute the three masses, by tiles; `others` is a sum and not 1 less the other two.

    Args:
      head, features: the head's arrays, and `[O, D]`.
      sampled, greedy: `[O]` int tokens y, and y* that were likeliest before the update.
      options: temperature and chunk sizes.
    """

    def position(operands: tuple[Array, Array, Array]) -> Masses:
        phi_D, y, best = operands
        log_probs = tile_log_probs(head, phi_D, options)

        def term(number: Array) -> Masses:
            tile, log_pi_R = log_probs(number)
            ids_R = tile.start + jnp.arange(log_pi_R.shape[0])
            is_y_R, is_best_R = tile.fresh & (ids_R == y), tile.fresh & (ids_R == best)
            return Masses(
                jnp.sum(jnp.where(is_y_R, log_pi_R, 0)),
                jnp.sum(jnp.where(is_best_R, log_pi_R, 0)),
                jnp.sum(jnp.where(is_y_R | is_best_R, 0, jnp.exp(log_pi_R))),
            )

        masses = sum_over_tiles(term, head, options.chunk_vocabulary)
        return masses._replace(others=jnp.log(masses.others))

    return jax.lax.map(position, (features, sampled, greedy), batch_size=options.chunk_tokens)
