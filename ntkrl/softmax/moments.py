"""What a softmax needs of all logits, gathered over tiles and turned into statistics and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ntkrl.softmax.tiles import Tile, Tiling
from ntkrl.types import Array


class TokenStatistics(NamedTuple):
    """Statistics of π = softmax(z / temperature) at each position; all of one shape `[...]`.

    log_probs: log π of the target (nats, ≤ 0).
    entropy: H(π) (nats, in [0, log V]).
    sum_squares: Σ_v π_v² (in [1/V, 1]).
    max_prob: max_v π_v.
    argmax: the most likely token, int32.
    kl: KL(π‖ρ) to a reference distribution ρ (nats, ≥ 0), or None without one.
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


class Sums(NamedTuple):
    """What is gathered over tiles, shifted by the running maximum m; e = exp(z − m).

    total Σe, moment Σ e (z − m), squares Σ e², gap Σ e (z − z_ref).
    """

    peak: Array
    total: Array
    moment: Array
    squares: Array
    argmax: Array
    target: Array
    gap: Array | None
    other_peak: Array | None
    other_total: Array | None
    top: tuple[Array, Array] | None


def nothing(shape: tuple[int, ...], dtype: Any, tiling: Tiling, with_other: bool) -> Sums:
    """Return the sums over no tile, for positions of a shape."""
    # lower than any logit, and finite: −∞ − (−∞) would be NaN
    zeros, low = jnp.zeros(shape, dtype), jnp.full(shape, jnp.finfo(dtype).min / 2, dtype)
    best = (
        jnp.full((*shape, tiling.top), -jnp.inf, dtype),
        jnp.zeros((*shape, tiling.top), jnp.int32),
    )
    other = (zeros, low, zeros) if with_other else (None, None, None)
    chosen = jnp.zeros(shape, jnp.int32)
    return Sums(low, zeros, zeros, zeros, chosen, zeros, *other, best if tiling.top else None)


def gather(sums: Sums, tile: Tile, z: Array, y: Array, z_other: Array | None) -> Sums:
    """Add a tile of logits `[N, R]` to the sums `[N]`."""
    best, at_best = jnp.max(z, axis=1), jnp.argmax(z, axis=1).astype(jnp.int32)
    peak = jnp.maximum(sums.peak, best)
    moved = sums.peak - peak
    shrink = jnp.exp(moved)
    shifted = z - peak[:, None]
    e = jnp.exp(shifted)
    kept_moment = shrink * (sums.moment + moved * sums.total)
    local = y - tile.start
    here = (local >= 0) & (local < z.shape[1])
    at = jnp.clip(local, 0, z.shape[1] - 1)[:, None]
    picked = jnp.take_along_axis(z, at, axis=1)[:, 0]
    target = jnp.where(here & tile.fresh[at[:, 0]], picked, sums.target)
    gathered = Sums(
        peak=peak,
        total=shrink * sums.total + jnp.sum(e, axis=1),
        # where: a logit of −∞ has e = 0 and e z = 0, not NaN
        moment=kept_moment + jnp.sum(jnp.where(e > 0, e * shifted, 0), axis=1),
        squares=jnp.square(shrink) * sums.squares + jnp.sum(jnp.square(e), axis=1),
        argmax=jnp.where(best > sums.peak, tile.start + at_best, sums.argmax),
        target=target,
        gap=None,
        other_peak=None,
        other_total=None,
        top=None if sums.top is None else _likeliest(sums.top, tile, z),
    )
    if z_other is None:
        return gathered
    other_peak = jnp.maximum(sums.other_peak, jnp.max(z_other, axis=1))
    other_e = jnp.exp(z_other - other_peak[:, None])
    return gathered._replace(
        gap=shrink * sums.gap + jnp.sum(jnp.where(e > 0, e * (z - z_other), 0), axis=1),
        other_peak=other_peak,
        other_total=jnp.exp(sums.other_peak - other_peak) * sums.other_total
        + jnp.sum(other_e, axis=1),
    )


def _likeliest(held: tuple[Array, Array], tile: Tile, z: Array) -> tuple[Array, Array]:
    values, tokens = held
    ids = jnp.broadcast_to(tile.start + jnp.arange(z.shape[1], dtype=jnp.int32)[None], z.shape)
    values, tokens = (jnp.concatenate(pair, axis=1) for pair in ((values, z), (tokens, ids)))
    best, at = jax.lax.top_k(values, held[0].shape[-1])
    return best, jnp.take_along_axis(tokens, at, axis=1)


def finish(sums: Sums, reference: Any) -> tuple[TokenStatistics, tuple[Array, Array | None]]:
    """Return the statistics, and log Σ exp z of the distribution and of the reference."""
    normaliser = sums.peak + jnp.log(sums.total)
    kl, other_normaliser, top_log_probs, top_tokens = (None,) * 4
    if reference is not None:
        other_normaliser = sums.other_peak + jnp.log(sums.other_total)
        kl = sums.gap / sums.total - normaliser + other_normaliser
    if sums.top is not None:
        top_log_probs, top_tokens = sums.top[0] - normaliser[:, None], sums.top[1]
    found = TokenStatistics(
        log_probs=sums.target - normaliser,
        entropy=jnp.log(sums.total) - sums.moment / sums.total,
        sum_squares=sums.squares / jnp.square(sums.total),
        max_prob=1 / sums.total,
        argmax=sums.argmax.astype(jnp.int32),
        kl=kl,
        top_log_probs=top_log_probs,
        top_tokens=top_tokens,
    )
    return found, (normaliser, other_normaliser)


def pull_logits(
    found: TokenStatistics,
    given: TokenStatistics,
    log_pi: Array,
    gap: Array | None,
    start: Array | int,
    y: Array,
) -> Array:
    """Return the cotangent of the tempered logits of a tile, `[N, R]`.

    Args:
      found: the statistics `[N]`.
      given: their cotangents; symbolic zeros cost nothing.
      log_pi: log π of the tile's rows `[N, R]`.
      gap: log π − log ρ of the tile's rows, or None.
      start: the tile's first vocabulary row.
      y: targets `[N]`.
    """
    pi = jnp.exp(log_pi)
    ids = start + jnp.arange(log_pi.shape[1])[None]
    total = jnp.zeros_like(pi)

    def cotangent(name: str) -> Array | None:
        value = getattr(given, name)
        absent = value is None or isinstance(value, SymbolicZero)
        return None if absent else value[:, None]

    if (c := cotangent("log_probs")) is not None:
        total += c * ((ids == y[:, None]) - pi)
    # where: π (log π + H) is 0, not NaN, at a logit of −∞
    if (c := cotangent("entropy")) is not None:
        total -= c * jnp.where(pi > 0, pi * (log_pi + found.entropy[:, None]), 0)
    if (c := cotangent("sum_squares")) is not None:
        total += c * 2 * pi * (pi - found.sum_squares[:, None])
    if (c := cotangent("max_prob")) is not None:
        total += c * found.max_prob[:, None] * ((ids == found.argmax[:, None]) - pi)
    if gap is not None and (c := cotangent("kl")) is not None:
        total += c * jnp.where(pi > 0, pi * (gap - found.kl[:, None]), 0)
    return total
