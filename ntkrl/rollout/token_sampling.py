"""Sampling of one token per row from logits: top-k, top-p, min-p, then a draw by inverse CDF.

With e = exp(z − max z), each truncation keeps the tokens with e ≥ a threshold of the row. The
thresholds come from bisection over the bits of e, which sort like the numbers: exact, and without
sorting V numbers. The draw selects a block of the vocabulary, then a token in it, with two uniform
numbers: V of them, as for Gumbel noise, would cost more than the product with the head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.rollout.settings import SamplerSettings
from ntkrl.types import Array

BLOCK = 128


class SampledTokens(NamedTuple):
    """One token per row, all `[B]`.

    tokens: int32. log_probs: at the temperature, before truncation (nats). kept_log_mass: log of
    the probability mass after truncation (nats, ≤ 0); None without truncation. entropy: of the
    distribution at the temperature, before truncation (nats).
    """

    tokens: Array
    log_probs: Array
    kept_log_mass: Array | None
    entropy: Array


def draw_uniforms(keys: Array, numbers: Array) -> Array:
    """Return two uniform numbers `[C, B, 2]` for each token of each row.

    Args:
      keys: `[B]`, one per row.
      numbers: `[C]` of the tokens in their completions.
    """

    def of_token(number: Array) -> Array:
        token_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(token_keys)

    return jax.vmap(of_token)(numbers)


def sample_tokens(
    settings: SamplerSettings, logits: Array, uniforms: Array | None
) -> SampledTokens:
    """Sample a token per row; without truncation, in one pass over the exponentials.

    Args:
      settings: temperature and truncation.
      logits: `[B, V]`, float32 or better.
      uniforms: `[B, 2]` uniform numbers; None for greedy decoding.
    """
    z_BV = logits if settings.greedy else logits / settings.temperature
    peak_B1 = jnp.max(z_BV, axis=1, keepdims=True)
    e_BV = jnp.exp(z_BV - peak_B1)
    entropy_B = _entropy(z_BV - peak_B1, e_BV)
    if uniforms is None:
        tokens_B = jnp.argmax(z_BV, axis=1).astype(jnp.int32)
        return SampledTokens(tokens_B, -jnp.log(jnp.sum(e_BV, axis=1)), None, entropy_B)
    table_BKW = _blocks(truncated(settings, e_BV))
    masses_BK = jnp.sum(table_BKW, axis=2)
    tokens_B = _pick(table_BKW, masses_BK, uniforms)
    mass_B = jnp.sum(masses_BK, axis=1)
    chosen_B = jnp.take_along_axis(z_BV, tokens_B[:, None], axis=1)[:, 0] - peak_B1[:, 0]
    if not settings.truncates:
        return SampledTokens(tokens_B, chosen_B - jnp.log(mass_B), None, entropy_B)
    log_total_B = jnp.log(jnp.sum(e_BV, axis=1))
    kept_B = jnp.log(mass_B) - log_total_B
    return SampledTokens(tokens_B, chosen_B - log_total_B, kept_B, entropy_B)


def _entropy(shifted_BV: Array, weights_BV: Array) -> Array:
    """Return the entropy `[B]` of exp(shifted) / Σ exp(shifted), from the exponentials."""
    mass_B = jnp.sum(weights_BV, axis=1)
    # a logit of −∞ has weight 0
    terms_BV = jnp.where(weights_BV > 0, weights_BV * shifted_BV, 0.0)
    return jnp.log(mass_B) - jnp.sum(terms_BV, axis=1) / mass_B


def truncated(settings: SamplerSettings, weights: Array) -> Array:
    """Zero the weights excluded by top_k, top_p and min_p.

    Args:
      settings: with top_k, then top_p of the remaining mass, then min_p.
      weights: `[B, V]` ≥ 0, the largest of each row 1.

    Returns:
      `[B, V]`; `weights` itself without truncation.
    """
    if settings.top_k is not None and settings.top_k < weights.shape[1]:
        target_B = jnp.full(weights.shape[0], settings.top_k, jnp.float32)
        weights = _at_least(weights, _threshold(weights, None, target_B))
    if settings.top_p is not None and settings.top_p < 1:
        target_B = settings.top_p * jnp.sum(weights, axis=1)
        weights = _at_least(weights, _threshold(weights, weights, target_B))
    if settings.min_p is not None:
        weights = jnp.where(weights >= settings.min_p, weights, 0.0)
    return weights


def _at_least(weights: Array, bits_B: Array) -> Array:
    return jnp.where(_bits(weights) >= bits_B[:, None], weights, 0.0)


def _bits(values: Array) -> Array:
    """Return integers in the order of non-negative float32 numbers."""
    return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _threshold(weights: Array, summed: Array | None, target: Array) -> Array:
    """Return the largest bits b `[B]` with Σ summed [bits(weights) ≥ b] ≥ target.

    Args:
      weights: `[B, V]` in [0, 1].
      summed: `[B, V]` ≥ 0; None for ones.
      target: `[B]`, at most the sum over all.
    """
    bits_BV = _bits(weights)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        above_BV = bits_BV >= middle_B[:, None]
        terms_BV = above_BV * 1.0 if summed is None else jnp.where(above_BV, summed, 0.0)
        enough_B = jnp.sum(terms_BV, axis=1) >= target
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    low_B = jnp.zeros(weights.shape[0], jnp.int32)
    above_one_B = jnp.full(weights.shape[0], _bits(jnp.float32(1.0)) + 1, jnp.int32)
    return jax.lax.fori_loop(0, 31, halve, (low_B, above_one_B))[0]


def _blocks(weights_BV: Array) -> Array:
    """Return the weights in blocks `[B, K, W]`, with zeros at the end."""
    rows, size = weights_BV.shape
    width = min(BLOCK, size)
    blocks = -(-size // width)
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, blocks * width - size)))
    return padded_BV.reshape(rows, blocks, width)


def _pick(table_BKW: Array, masses_BK: Array, uniform_B2: Array) -> Array:
    """Sample an index per row in proportion to the weights, in blocks with their masses."""
    block_B = _first_above(masses_BK, uniform_B2[:, 0])
    inside_BW = jnp.take_along_axis(table_BKW, block_B[:, None, None], axis=1)[:, 0]
    width = table_BKW.shape[2]
    return (block_B * width + _first_above(inside_BW, uniform_B2[:, 1])).astype(jnp.int32)


def _first_above(weights_BK: Array, uniform_B: Array) -> Array:
    """Return the first index whose cumulated weight exceeds u · total; its weight is positive."""
    cumulated_BK = jnp.cumsum(weights_BK, axis=1)
    total_B = cumulated_BK[:, -1]
    # u · total may round up to total, which no cumulated weight exceeds
    level_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, jnp.zeros_like(total_B)))
    return jnp.sum(cumulated_BK <= level_B[:, None], axis=1)
