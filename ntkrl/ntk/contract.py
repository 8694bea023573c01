"""Inner products of gradients from the small matrices they are made of.

For a tapped leaf ∇_a = Σ_t x_t δ_{a,t}ᵀ, hence ⟨∇_a, ∇_b⟩ = Σ_{t,s} ⟨x_t, x_s⟩ ⟨δ_{a,t}, δ_{b,s}⟩.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import einsum
from ntkrl.types import Array


class Factors(NamedTuple):
    """Gradients of one leaf for A directions of each of S sequences.

    activations: x `[S, t, i]`, ids `[S, t]`, or None for gradients as they are.
    deltas: δ `[S, A, f, t]`, or the gradients `[S, A, *leaf]`.
    """

    activations: Array | None
    deltas: Array


def sequence_pairs(observed: int, updated: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (s, s') to compute; None for a symmetric Γ, of which half is."""
    if updated is None:
        return np.triu_indices(observed)
    first, second = np.indices((observed, updated))
    return first.ravel(), second.ravel()


def contracted(
    pairs: tuple[np.ndarray, np.ndarray],
    observed: dict[int, Factors],
    updated: dict[int, Factors],
    weights: dict[int, Array],
) -> Array:
    """Sum ⟨∇_a, w ∇_b⟩ over leaves, for every pair of sequences.

    Args:
      pairs: indices of S_o and S_u sequences.
      observed, updated: `{leaf: Factors}` of both sides.
      weights: `{leaf: w}`, scalars for tapped leaves; missing ones are 1.

    Returns:
      `[pairs, A_o, A_u]`, float32 or better.
    """

    def pair(indices: tuple[Array, Array]) -> Array:
        i, j = indices
        here, there = _concatenated(observed, i, weights), _concatenated(updated, j, {})
        terms = [] if here is None else [_inner(here, there)]
        for leaf, left in observed.items():
            if left.activations is None:
                continue
            right = updated[leaf]
            term = _tapped(
                left.activations[i], right.activations[j], left.deltas[i], right.deltas[j]
            )
            terms.append(term * weights[leaf].reshape(()) if leaf in weights else term)
        return sum(terms)

    first, second = pairs
    if len(first) == 1:
        return pair((first[0], second[0]))[None]
    return jax.lax.map(pair, (jnp.asarray(first), jnp.asarray(second)))


def unpacked(filled: Array, observed: int, updated: int | None) -> Array:
    """Put `[pairs, A_o, A_u]` in order as `[S_o, A_o, S_u, A_u]`."""
    if updated is not None:
        square = filled.reshape(observed, updated, *filled.shape[1:])
        return jnp.transpose(square, (0, 2, 1, 3))
    first, second = sequence_pairs(observed, None)
    place = np.zeros((observed, observed), int)
    place[first, second] = place[second, first] = np.arange(len(first))
    upper = np.triu(np.ones_like(place, bool))[..., None, None]
    square = jnp.where(upper, filled[place], jnp.swapaxes(filled, 1, 2)[place])
    return jnp.transpose(square, (0, 2, 1, 3))


def _concatenated(
    factors: dict[int, Factors], sequence: Array, weights: dict[int, Array]
) -> Array | None:
    """Return the gradients `[A, P]` of all leaves that are not tapped, one product for them all."""
    flat = []
    for leaf, found in factors.items():
        if found.activations is not None:
            continue
        deltas = found.deltas[sequence]
        if leaf in weights:
            weight = weights[leaf]
            deltas = deltas * (weight[None] if weight.ndim else weight)
        flat.append(deltas.reshape(deltas.shape[0], -1))
    return jnp.concatenate(flat, axis=1) if flat else None


def _inner(here_AP: Array, there_BP: Array) -> Array:
    wide = jnp.promote_types(here_AP.dtype, jnp.float32)
    return einsum("ap,bp->ab", here_AP, there_BP, preferred_element_type=wide)


def _tapped(x_TI: Array, x_SI: Array, here_AFT: Array, there_BFS: Array) -> Array:
    wide = jnp.promote_types(here_AFT.dtype, jnp.float32)
    if x_TI.ndim == 1:
        alike_TS = (x_TI[:, None] == x_SI[None, :]).astype(wide)
    else:
        alike_TS = einsum("ti,si->ts", x_TI, x_SI, preferred_element_type=wide)
    # two plain matrix products, as the positions come last
    mixed_AFS = einsum("aft,ts->afs", here_AFT.astype(wide), alike_TS)
    there_BFS = there_BFS.astype(wide)
    return _inner(
        mixed_AFS.reshape(mixed_AFS.shape[0], -1), there_BFS.reshape(there_BFS.shape[0], -1)
    )
