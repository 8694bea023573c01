"""Sums over vocabulary tiles, the statistics they give, and the cotangent of a tile's logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ntkrl.types import Array


class TokenStatistics(NamedTuple):
    """Statistics of π = softmax(z / temperature) at each position; all of one shape `[...]`.

    log_probs: log π of the target (nats, ≤ 0).
    entropy: H(π) (nats, in [0, log V]).
    sum_squares: Σ_v π_v² (in [1/V, 1]).
    max_prob: max_v π_v.
    argmax: the most likely token, int32.
    kl: KL(π‖ρ) to a reference distribution ρ (nats, ≥ 0), or None without a reference.
    top_log_probs, top_tokens: `[..., k]` of the k likeliest tokens, falling, or None.
    """

    log_probs: Array
    entropy: Array
    sum_squares: Array
    max_prob: Array
    argmax: Array
    kl: Array | None = None
    top_log_probs: Array | None = None
    top_tokens: Array | None = None


class ReferenceSums(NamedTuple):
    """Running sums for KL(π‖ρ): gap Σ e (z − z_ref), the reference's running maximum and total."""

    gap: Array
    peak: Array
    total: Array


class OnlineSums(NamedTuple):
    """Running sums over tiles, relative to the running maximum `peak`; e = exp(z − peak).

    total Σe, moment Σ e (z − peak), squares Σ e²; the likeliest token and the target's logit; sums
    for a reference; the k largest logits and their tokens.
    """

    peak: Array
    total: Array
    moment: Array
    squares: Array
    argmax: Array
    target: Array
    reference: ReferenceSums | None
    top: tuple[Array, Array] | None


def initial_sums(shape: tuple[int, ...], dtype: Any, top: int, with_reference: bool) -> OnlineSums:
    """Return the sums over no tile, for positions of a shape."""
    # lower than any logit, and finite: −∞ − (−∞) would be NaN
    zeros, low = jnp.zeros(shape, dtype), jnp.full(shape, jnp.finfo(dtype).min / 2, dtype)
    reference = ReferenceSums(zeros, low, zeros) if with_reference else None
    best = None
    if top:
        best = (jnp.full((*shape, top), -jnp.inf, dtype), jnp.zeros((*shape, top), jnp.int32))
    return OnlineSums(low, zeros, zeros, zeros, jnp.zeros(shape, jnp.int32), zeros, reference, best)


def accumulate(
    sums: OnlineSums,
    z: Array,
    y: Array,
    start: Array | int,
    fresh: Array,
    z_reference: Array | None,
) -> OnlineSums:
    """Add a tile of logits `[N, R]` to the sums `[N]`; y, start and fresh as in Tile."""
    best, at_best = jnp.max(z, axis=1), jnp.argmax(z, axis=1).astype(jnp.int32)
    peak = jnp.maximum(sums.peak, best)
    shift = sums.peak - peak
    shrink = jnp.exp(shift)
    shifted = z - peak[:, None]
    e = jnp.exp(shifted)
    moment = shrink * (sums.moment + shift * sums.total)
    local = y - start
    in_tile = (local >= 0) & (local < z.shape[1])
    at = jnp.clip(local, 0, z.shape[1] - 1)[:, None]
    picked = jnp.take_along_axis(z, at, axis=1)[:, 0]
    updated = sums._replace(
        peak=peak,
        total=shrink * sums.total + jnp.sum(e, axis=1),
        # where: a logit of −∞ has e = 0 and e z = 0, not NaN
        moment=moment + jnp.sum(jnp.where(e > 0, e * shifted, 0), axis=1),
        squares=jnp.square(shrink) * sums.squares + jnp.sum(jnp.square(e), axis=1),
        argmax=jnp.where(best > sums.peak, start + at_best, sums.argmax),
        target=jnp.where(in_tile & fresh[at[:, 0]], picked, sums.target),
        top=None if sums.top is None else _merge_top(sums.top, start, z),
    )
    if z_reference is None or sums.reference is None:
        return updated
    before = sums.reference
    peak = jnp.maximum(before.peak, jnp.max(z_reference, axis=1))
    total = jnp.sum(jnp.exp(z_reference - peak[:, None]), axis=1)
    gap = jnp.sum(jnp.where(e > 0, e * (z - z_reference), 0), axis=1)
    reference = ReferenceSums(
        gap=shrink * before.gap + gap,
        peak=peak,
        total=jnp.exp(before.peak - peak) * before.total + total,
    )
    return updated._replace(reference=reference)


def _merge_top(top: tuple[Array, Array], start: Array | int, z: Array) -> tuple[Array, Array]:
    """Return the k largest logits and their tokens, of those so far and of a tile."""
    ids = jnp.broadcast_to(start + jnp.arange(z.shape[1], dtype=jnp.int32)[None], z.shape)
    values, tokens = (jnp.concatenate(pair, axis=1) for pair in zip(top, (z, ids), strict=True))
    best, at = jax.lax.top_k(values, top[0].shape[-1])
    return best, jnp.take_along_axis(tokens, at, axis=1)


def finalize(sums: OnlineSums) -> tuple[TokenStatistics, tuple[Array, Array | None]]:
    """Return the statistics, and log Σ exp z of the distribution and of the reference."""
    normaliser = sums.peak + jnp.log(sums.total)
    kl, reference_normaliser, top_log_probs, top_tokens = (None,) * 4
    if sums.reference is not None:
        reference_normaliser = sums.reference.peak + jnp.log(sums.reference.total)
        kl = sums.reference.gap / sums.total - normaliser + reference_normaliser
    if sums.top is not None:
        top_log_probs, top_tokens = sums.top[0] - normaliser[:, None], sums.top[1]
    statistics = TokenStatistics(
        log_probs=sums.target - normaliser,
        entropy=jnp.log(sums.total) - sums.moment / sums.total,
        sum_squares=sums.squares / jnp.square(sums.total),
        max_prob=1 / sums.total,
        argmax=sums.argmax.astype(jnp.int32),
        kl=kl,
        top_log_probs=top_log_probs,
        top_tokens=top_tokens,
    )
    return statistics, (normaliser, reference_normaliser)


def logits_cotangent(
    statistics: TokenStatistics,
    cotangents: TokenStatistics,
    probs: tuple[Array, Array],
    gap: Array | None,
    start: Array | int,
    y: Array,
) -> Array:
    """Return the cotangent of a tile's logits after the temperature, `[N, R]`.

    Args:
      statistics: `[N]`.
      cotangents: of the statistics; symbolic zeros cost nothing.
      probs: π and log π of the tile's rows, `[N, R]` each.
      gap: log π − log ρ of the tile's rows, or None.
      start: the tile's first vocabulary row.
      y: targets `[N]`.
    """
    pi, log_pi = probs
    ids = start + jnp.arange(log_pi.shape[1])[None]
    total = jnp.zeros_like(pi)

    def cotangent(name: str) -> Array | None:
        value = getattr(cotangents, name)
        absent = value is None or isinstance(value, SymbolicZero)
        return None if absent else value[:, None]

    if (c := cotangent("log_probs")) is not None:
        total += c * ((ids == y[:, None]) - pi)
    # where: π (log π + H) is 0, not NaN, at a logit of −∞
    if (c := cotangent("entropy")) is not None:
        total -= c * jnp.where(pi > 0, pi * (log_pi + statistics.entropy[:, None]), 0)
    if (c := cotangent("sum_squares")) is not None:
        total += c * 2 * pi * (pi - statistics.sum_squares[:, None])
    if (c := cotangent("max_prob")) is not None:
        total += c * statistics.max_prob[:, None] * ((ids == statistics.argmax[:, None]) - pi)
    kl = statistics.kl
    if gap is not None and kl is not None and (c := cotangent("kl")) is not None:
        total += c * jnp.where(pi > 0, pi * (gap - kl[:, None]), 0)
    return total
