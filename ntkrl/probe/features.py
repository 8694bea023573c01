"""Geometry of features: cosines, norms, drift from the start, and sums over the head kernel.

The sums are of the head part R alone: with one step on log π(y') of weight A', log π(y) changes by
A' ⟨g, g'⟩ ⟨φ, φ'⟩ + (body part), g = e_y − π.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum, masked_total, mean
from ntkrl.probe.distributions import log_normaliser, sum_over_tiles
from ntkrl.softmax import (
    DEFAULT_OPTIONS,
    OutputHead,
    SoftmaxOptions,
    Tile,
    slice_tile,
    tile_count,
    tile_logits,
)
from ntkrl.types import Array


@jax.jit
def feature_measures(
    features: Array, start_features: Array, rows: Array, groups: Array
) -> dict[str, Array]:
    """Summarise the features of O probe tokens.

    Args:
      features, start_features: `[O, D]` now and before training.
      rows, groups: `[O]` completion and prompt of each token.

    Returns:
      Scalars. `cosine_within_response` (pairs of tokens of one completion),
      `cosine_across_responses` (one prompt, two completions), `cosine_across_prompts`: mean
      cosines in [−1, 1] over pairs of distinct tokens, 0 where there is no such pair;
      `positive_pairs`: fraction of all distinct pairs with ⟨φ, φ'⟩ > 0; `effective_rank`:
      participation ratio (tr G)²/‖G‖_F² of G = ΦΦᵀ, in [1, min(O, D)]; `feature_norm`: mean ‖φ‖;
      `feature_distortion`: mean ‖φ − φ_0‖.

    Source: Tomihari 2601.04670 (cosines), Tomihari & Sato 2405.16747 (distortion).
    """
    phi_OD, start_OD = at_least_float32(features), at_least_float32(start_features)
    gram_OO = einsum("od,pd->op", phi_OD, phi_OD)
    norms_O = jnp.sqrt(jnp.diagonal(gram_OO))
    cosines_OO, pairs = _cosines(gram_OO), _pair_masks(rows, groups)
    distinct = ~jnp.eye(rows.shape[0], dtype=bool)
    measures = {
        f"cosine_{kind}": mean(masked_total(cosines_OO, mask)) for kind, mask in pairs.items()
    }
    return measures | {
        "positive_pairs": mean(masked_total((gram_OO > 0) * 1.0, distinct)),
        "effective_rank": jnp.trace(gram_OO) ** 2 / jnp.sum(gram_OO**2),
        "feature_norm": jnp.mean(norms_O),
        "feature_distortion": jnp.mean(jnp.linalg.norm(phi_OD - start_OD, axis=-1)),
    }


def _cosines(gram_OO: Array) -> Array:
    """Return the cosines `[O, O]` of vectors from their Gram matrix."""
    norms_O = jnp.sqrt(jnp.diagonal(gram_OO))
    return gram_OO / jnp.maximum(norms_O[:, None] * norms_O[None, :], 1e-30)


def _pair_masks(rows: Array, groups: Array) -> dict[str, Array]:
    """Return `[O, O]` masks of pairs of distinct tokens, by whether rows and groups are equal."""
    same_row = rows[:, None] == rows[None, :]
    same_group = groups[:, None] == groups[None, :]
    return {
        "within_response": same_row & ~jnp.eye(rows.shape[0], dtype=bool),
        "across_responses": same_group & ~same_row,
        "across_prompts": ~same_group,
    }


@functools.partial(jax.jit, static_argnums=2)
def completion_cosines(features: Array, rows: Array, completions: int) -> Array:
    """Return the mean cosine of features between S completions, `[S, S]`.

    Means over pairs of tokens, on the diagonal of distinct ones; 0 where there is no such pair.

    Args:
      features, rows: `[O, D]`, and `[O]` completion of each token, in [0, S).
      completions: S.
    """
    phi_OD = at_least_float32(features)
    unit_OD = phi_OD / jnp.maximum(jnp.linalg.norm(phi_OD, axis=1, keepdims=True), 1e-30)
    sums_SD = jax.ops.segment_sum(unit_OD, rows, completions)
    counts_S = jax.ops.segment_sum(jnp.ones(rows.shape, unit_OD.dtype), rows, completions)
    squares_S = jax.ops.segment_sum(jnp.sum(unit_OD**2, axis=1), rows, completions)
    same_SS = jnp.eye(completions, dtype=unit_OD.dtype)
    pairs_SS = counts_S[:, None] * counts_S[None] - same_SS * counts_S[None]
    totals_SS = einsum("sd,td->st", sums_SD, sums_SD) - same_SS * squares_S[None]
    return jnp.where(pairs_SS > 0, totals_SS / jnp.maximum(pairs_SS, 1), 0)


@jax.jit
def cosine_variances(features: Array, rows: Array, groups: Array) -> dict[str, Array]:
    """Return the variances of the cosines that `feature_measures` averages, with its arguments.

    Returns:
      Scalars `cosine_variance_within_response`, `…_across_responses`, `…_across_prompts`: variance
      over pairs of distinct tokens (divided by their number), in [0, 1]; 0 without such pairs.

    Source: Tomihari 2601.04670.
    """
    phi_OD = at_least_float32(features)
    cosines_OO = _cosines(einsum("od,ud->ou", phi_OD, phi_OD))

    def variance(mask: Array) -> Array:
        centre = mean(masked_total(cosines_OO, mask))
        return mean(masked_total(jnp.square(cosines_OO - centre), mask))

    pairs = _pair_masks(rows, groups)
    return {f"cosine_variance_{kind}": variance(mask) for kind, mask in pairs.items()}


@jax.jit
def feature_drift(features: Array, start_features: Array) -> dict[str, Array]:
    """Measure the drift of features relative to their start.

    Args:
      features, start_features: φ_t and φ_0 `[O, D]`, no φ_0 = 0.

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


def head_sums(
    head: OutputHead,
    features: Array,
    tokens: Array,
    weights: Array,
    options: SoftmaxOptions = DEFAULT_OPTIONS,
) -> Array:
    """Return Σ_u w_u I(o, u) over all tokens u of a set at each of them, for K weightings.

    I(o, u) = g_oᵀ R(o, u) g_u = s² (⟨φ_o, φ_u⟩ [+ 1 with a bias]) ⟨g_o, g_u⟩ is the change of
    log π of token o per unit of weight on token u through the head; slopes of a soft-cap multiply
    g. The sums need no pairs: they are the effect of a step of the head along Σ_u w_u g_u φ_uᵀ.

    Args:
      head: the head's arrays.
      features, tokens: `[O, D]` and int `[O]`.
      weights: w `[O, K]`, 0 at tokens that do not count.
      options: temperature and chunk_vocabulary.

    Returns:
      `[O, K]` (nats per unit of learning rate times weight).

    Source: α ⟨φ, φ'⟩ of Deng et al. 2505.18830, whose sums leave the body part out as these do.
    """
    rows, _ = tile_count(head, options.chunk_vocabulary)
    phi_OD, weights_OK = at_least_float32(features), at_least_float32(weights)
    scores = _tile_scores(head, phi_OD, tokens, options)

    def term(number: Array) -> Array:
        g_OR = scores(slice_tile(head, rows, number))
        step_KRD = einsum("ukd,ur->krd", weights_OK[..., None] * phi_OD[:, None], g_OR)
        sums_OK = einsum("okd,od->ok", einsum("or,krd->okd", g_OR, step_KRD), phi_OD)
        if head.bias is None:
            return sums_OK
        return sums_OK + einsum("or,kr->ok", g_OR, einsum("uk,ur->kr", weights_OK, g_OR))

    sums_OK = sum_over_tiles(term, head, options.chunk_vocabulary)
    return (head.scale / options.temperature) ** 2 * sums_OK


def _tile_scores(
    head: OutputHead, phi_OD: Array, tokens_O: Array, options: SoftmaxOptions
) -> Callable[[Tile], Array]:
    """Return the map from a tile to `[O, R]` of g = e_y − π, times the slopes of a soft-cap."""
    normaliser_O = jax.vmap(lambda phi_D: log_normaliser(head, phi_D, options))(phi_OD)

    def scores(tile: Tile) -> Array:
        z_OR = tile_logits(head, tile, phi_OD, options.temperature)
        ids_R = tile.start + jnp.arange(z_OR.shape[1])
        hit_OR = (ids_R[None] == tokens_O[:, None]) & tile.fresh[None]
        g_OR = hit_OR - jnp.exp(z_OR - normaliser_O[:, None])
        if head.soft_cap is None:
            return g_OR
        slopes_OR = 1 - jnp.square(z_OR * (options.temperature / head.soft_cap))
        return jnp.where(tile.fresh[None], g_OR * slopes_OR, 0)

    return scores
