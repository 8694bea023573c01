"""How alike and how large features are, and how far they have moved."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, masked_total, mean
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
    gram_OO = phi_OD @ phi_OD.T
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
