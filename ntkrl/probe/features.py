"""How alike and how large features are, and how far they have moved."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum, masked_total, mean
from ntkrl.types import Array


@jax.jit
def feature_measures(
    features: Array, start_features: Array, rows: Array, groups: Array
) -> dict[str, Array]:
    """Summarise the features of O probe tokens.

    Args:
      features: `[O, D]` now.
      start_features: `[O, D]` before training.
      rows: `[O]` completion each token belongs to.
      groups: `[O]` prompt each token belongs to.

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
    cosines_OO, pairs = cosines_of(gram_OO), kinds_of_pairs(rows, groups)
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


def cosines_of(gram_OO: Array) -> Array:
    """Return the cosines `[O, O]` of vectors from their Gram matrix."""
    norms_O = jnp.sqrt(jnp.diagonal(gram_OO))
    return gram_OO / jnp.maximum(norms_O[:, None] * norms_O[None, :], 1e-30)


def kinds_of_pairs(rows: Array, groups: Array) -> dict[str, Array]:
    """Return `[O, O]` masks of pairs of distinct tokens, by what the two have in common."""
    same_row = rows[:, None] == rows[None, :]
    same_group = groups[:, None] == groups[None, :]
    return {
        "within_response": same_row & ~jnp.eye(rows.shape[0], dtype=bool),
        "across_responses": same_group & ~same_row,
        "across_prompts": ~same_group,
    }


@functools.partial(jax.jit, static_argnums=2)
def completion_cosines(features: Array, rows: Array, completions: int) -> Array:
    """Return the mean cosine of features between completions, `[S, S]`.

    Args:
      features: `[O, D]`.
      rows: `[O]` completion each token belongs to, in [0, S).
      completions: S.

    Returns:
      Means over pairs of tokens, on the diagonal of distinct ones; 0 where there is no such pair.
    """
    phi_OD = at_least_float32(features)
    unit_OD = phi_OD / jnp.maximum(jnp.linalg.norm(phi_OD, axis=1, keepdims=True), 1e-30)
    sums_SD = jax.ops.segment_sum(unit_OD, rows, completions)
    counts_S = jax.ops.segment_sum(jnp.ones(rows.shape, unit_OD.dtype), rows, completions)
    own_S = jax.ops.segment_sum(jnp.sum(unit_OD**2, axis=1), rows, completions)
    same_SS = jnp.eye(completions, dtype=unit_OD.dtype)
    pairs_SS = counts_S[:, None] * counts_S[None] - same_SS * counts_S[None]
    totals_SS = einsum("sd,td->st", sums_SD, sums_SD) - same_SS * own_S[None]
    return totals_SS / jnp.maximum(pairs_SS, 1)
