"""More of features: spread of their cosines, drift from the start, and sums the head kernel sees.

The sums are of the head part R alone: with one step on log π(y') of weight A', log π(y) changes by
A' ⟨g, g'⟩ ⟨φ, φ'⟩ + (body part), g = e_y − π.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum, masked_total, mean
from ntkrl.probe.features import cosines_of, kinds_of_pairs
from ntkrl.probe.tiles import log_normaliser, sum_over_tiles
from ntkrl.softmax import OutputHead, Tile, slice_tile, tile_count, tile_logits
from ntkrl.types import Array


@jax.jit
def cosine_variances(features: Array, rows: Array, groups: Array) -> dict[str, Array]:
    """Return how much the cosines of each kind of pair vary, beside the means that exist.

    Args:
      features: `[O, D]`.
      rows: `[O]` completion each token belongs to.
      groups: `[O]` prompt each token belongs to.

    Returns:
      Scalars `cosine_variance_within_response`, `…_across_responses`, `…_across_prompts`: variance
      over pairs of distinct tokens (divided by their number), in [0, 1]; 0 without such pairs.

    Source: Tomihari 2601.04670.
    """
    phi_OD = at_least_float32(features)
    cosines_OO = cosines_of(einsum("od,ud->ou", phi_OD, phi_OD))

    def variance(mask: Array) -> Array:
        centre = mean(masked_total(cosines_OO, mask))
        return mean(masked_total(jnp.square(cosines_OO - centre), mask))

    pairs = kinds_of_pairs(rows, groups)
    return {f"cosine_variance_{kind}": variance(mask) for kind, mask in pairs.items()}


@jax.jit
def feature_drift(features: Array, start_features: Array) -> dict[str, Array]:
    """Say how far features are from where they began, in units of where they began.

    Args:
      features: φ_t `[O, D]`.
      start_features: φ_0 `[O, D]`, none of them 0.

    Returns:
      Scalars, means over tokens: `feature_distortion_relative` ‖φ_t − φ_0‖/‖φ_0‖ (≥ 0),
      `feature_cosine_start` ⟨φ_t, φ_0⟩/(‖φ_t‖‖φ_0‖) (in [−1, 1]), `feature_norm_ratio`
      ‖φ_t‖/‖φ_0‖ (≥ 0).

    Source: Tomihari & Sato 2405.16747 (distortion), the others ours.
    """
    phi_OD, start_OD = at_least_float32(features), at_least_float32(start_features)
    norms_O, start_norms_O = (jnp.linalg.norm(f, axis=1) for f in (phi_OD, start_OD))
    inner_O = jnp.sum(phi_OD * start_OD, axis=1)
    moved_O = jnp.linalg.norm(phi_OD - start_OD, axis=1)
    return {
        "feature_distortion_relative": jnp.mean(moved_O / start_norms_O),
        "feature_cosine_start": jnp.mean(inner_O / (norms_O * start_norms_O)),
        "feature_norm_ratio": jnp.mean(norms_O / start_norms_O),
    }


@jax.jit
def ches(
    chosen: Array, chosen_mask: Array, rejected: Array, rejected_mask: Array
) -> tuple[Array, Array]:
    """Return the centred hidden embedding similarity of pairs: large where log π(y⁺) will fall.

    CHES = ⟨Σ_t φ⁺_t, Σ_s φ⁻_s⟩ − ‖Σ_t φ⁺_t‖², and the same of means over tokens.

    Args:
      chosen, rejected: features `[B, C, D]` of the completions' tokens.
      chosen_mask, rejected_mask: `[B, C]` bool, tokens that count.

    Returns:
      Two `[B]` arrays: CHES and its length-normalised form, which pairs are compared by.

    Source: Razin et al. 2410.08847.
    """

    def total(features: Array, mask: Array) -> Array:
        return einsum("bcd,bc->bd", at_least_float32(features), mask.astype(jnp.float32))

    plus_BD, minus_BD = total(chosen, chosen_mask), total(rejected, rejected_mask)

    def score(plus_BD: Array, minus_BD: Array) -> Array:
        return jnp.sum(plus_BD * (minus_BD - plus_BD), axis=1)

    lengths = (jnp.sum(mask, axis=1, keepdims=True) for mask in (chosen_mask, rejected_mask))
    means = (part / jnp.maximum(n, 1) for part, n in zip((plus_BD, minus_BD), lengths, strict=True))
    return score(plus_BD, minus_BD), score(*means)


@functools.partial(jax.jit, static_argnums=(3,))
def head_influence(
    head: OutputHead,
    observed: tuple[Array, Array],
    updated: tuple[Array, Array],
    chunk_vocabulary: int | None = None,
) -> Array:
    """Return what a unit of weight on each updated token adds to log π of each observed one, by R.

    I(o, u) = g_oᵀ R(o, u) g_u = s² (⟨φ_o, φ_u⟩ [+ 1 with a bias]) ⟨g_o, g_u⟩ for a plain head;
    slopes of a soft-cap multiply g. It is `ntk.score_gram(…, part="head")` between two sets and
    without `[O, V]` in memory.

    Args:
      head: the head's arrays.
      observed, updated: features `[O, D]` and int tokens `[O]`; `[U, D]` and `[U]`.
      chunk_vocabulary: vocabulary rows whose logits exist at a time, ≥ 1; None for all.

    Returns:
      `[O, U]` (nats per unit of learning rate times advantage).

    Source: α ⟨φ, φ'⟩ of Deng et al. 2505.18830.
    """
    rows, _ = tile_count(head, chunk_vocabulary)
    sides = observed, updated

    def normaliser(phi_D: Array) -> Array:
        return log_normaliser(head, phi_D, 1.0, chunk_vocabulary)

    normalisers = [jax.vmap(normaliser)(phi_OD) for phi_OD, _ in sides]

    def term(number: Array) -> Array:
        tile = slice_tile(head, rows, number)
        scores = [
            _scores(head, tile, phi_OD, y_O, normaliser_O)
            for (phi_OD, y_O), normaliser_O in zip(sides, normalisers, strict=True)
        ]
        return einsum("or,ur->ou", *scores)

    alike_OU = sum_over_tiles(term, head, chunk_vocabulary)
    inner_OU = einsum("od,ud->ou", *(at_least_float32(phi_OD) for phi_OD, _ in sides))
    return head.scale**2 * alike_OU * (inner_OU + (head.bias is not None))


def head_sums(
    head: OutputHead,
    features: Array,
    tokens: Array,
    weights: Array,
    temperature: float = 1.0,
    chunk_vocabulary: int | None = None,
) -> Array:
    """Return Σ_u w_u I(o, u) over all tokens u of a set at each of them, for K weightings.

    I is `head_influence`; linear in its second token, so the sums need no pairs: they are what a
    step of the head along Σ_u w_u g_u φ_uᵀ does.

    Args:
      head: the head's arrays.
      features, tokens: `[O, D]` and int `[O]`.
      weights: w `[O, K]`, 0 at tokens that do not count.
      temperature: divides the logits; > 0.
      chunk_vocabulary: vocabulary rows whose logits exist at a time, ≥ 1; None for all.

    Returns:
      `[O, K]` (nats per unit of learning rate times weight).
    """
    rows, _ = tile_count(head, chunk_vocabulary)
    phi_OD, weights_OK = at_least_float32(features), at_least_float32(weights)
    normaliser_O = jax.vmap(
        lambda phi_D: log_normaliser(head, phi_D, temperature, chunk_vocabulary)
    )(phi_OD)

    def term(number: Array) -> Array:
        tile = slice_tile(head, rows, number)
        g_OR = _scores(head, tile, phi_OD, tokens, normaliser_O, temperature)
        step_KRD = einsum("ukd,ur->krd", weights_OK[..., None] * phi_OD[:, None], g_OR)
        found_OK = einsum("okd,od->ok", einsum("or,krd->okd", g_OR, step_KRD), phi_OD)
        if head.bias is None:
            return found_OK
        return found_OK + einsum("or,kr->ok", g_OR, einsum("uk,ur->kr", weights_OK, g_OR))

    return (head.scale / temperature) ** 2 * sum_over_tiles(term, head, chunk_vocabulary)


def _scores(
    head: OutputHead,
    tile: Tile,
    phi_OD: Array,
    y_O: Array,
    normaliser_O: Array,
    temperature: float = 1.0,
) -> Array:
    """Return a tile `[O, R]` of g = e_y − π, times the slopes of a soft-cap."""
    z_OR = tile_logits(head, tile, phi_OD, temperature)
    ids_R = tile.start + jnp.arange(z_OR.shape[1])
    hit_OR = (ids_R[None] == y_O[:, None]) & tile.fresh[None]
    g_OR = hit_OR - jnp.exp(z_OR - normaliser_O[:, None])
    if head.soft_cap is None:
        return g_OR
    slopes_OR = 1 - jnp.square(z_OR * (temperature / head.soft_cap))
    return jnp.where(tile.fresh[None], g_OR * slopes_OR, 0)


@jax.jit
def token_sums(
    influence: Array, advantages: Array, observed_groups: Array, updated_groups: Array
) -> dict[str, Array]:
    """Sum the influence of a prompt's own updated tokens on each observed token, by sign of A.

    Over the tokens of a prompt's correct completions, −(positive + negative) adds up to its GWHES:
    where it is large, log π of those completions is held down. With wrong completions observed and
    correct ones updated at A = 1, `positive` is the token's NTHR.

    Args:
      influence: `[O, U]` from `head_influence`.
      advantages: `[U]`.
      observed_groups, updated_groups: `[O]` and `[U]`, prompt each token belongs to.

    Returns:
      `[O]` arrays `positive` and `negative`: Σ_u A_u I(o, u) over A_u > 0 and over A_u < 0.

    Source: Deng et al. 2505.18830, whose sums leave the body part out as these do.
    """
    same_OU = observed_groups[:, None] == updated_groups[None]
    pushes_OU = jnp.where(same_OU, influence * advantages[None], 0)
    return {
        "positive": jnp.sum(jnp.where(advantages[None] > 0, pushes_OU, 0), axis=1),
        "negative": jnp.sum(jnp.where(advantages[None] < 0, pushes_OU, 0), axis=1),
    }
