"""Inner products of gradients from the small matrices they are made of.

For a tapped leaf ∇_a = Σ_t x_t δ_{a,t}ᵀ, hence ⟨∇_a, ∇_b⟩ = Σ_{t,s} ⟨x_t, x_s⟩ ⟨δ_{a,t}, δ_{b,s}⟩.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import HIGHEST, einsum
from ntkrl.types import Array


class Factors(NamedTuple):
    """Gradients of one leaf for A directions of each of S sequences.

    activations: x `[S, t, i]`, ids `[S, t]`, or None for gradients as they are.
    deltas: δ `[S, A, t, f]`, or the gradients `[S, A, *leaf]`.
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
    first, second = (jnp.asarray(side) for side in pairs)

    def over_pairs(found: Callable[[Array, Array], Array]) -> Array:
        return jax.lax.map(lambda ij: found(*ij), (first, second))

    # a loop for every leaf, so that its δ can go before the next leaf's is made
    terms = []
    for leaf, left in observed.items():
        if left.activations is not None:
            term = over_pairs(functools.partial(_tapped, left, updated[leaf]))
            terms.append(term * weights[leaf].reshape(()) if leaf in weights else term)
    if len(terms) < len(observed):
        terms.append(over_pairs(functools.partial(_plain, observed, updated, weights)))
    return sum(terms)


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


def _plain(
    observed: dict[int, Factors],
    updated: dict[int, Factors],
    weights: dict[int, Array],
    i: Array,
    j: Array,
) -> Array:
    """Contract the gradients of all leaves that are not tapped, in one product for them all."""
    return _inner(_concatenated(observed, i, weights), _concatenated(updated, j, {}))


def _concatenated(factors: dict[int, Factors], sequence: Array, weights: dict[int, Array]) -> Array:
    """Return the gradients `[A, P]` of all leaves that are not tapped."""
    flat = []
    for leaf, found in factors.items():
        if found.activations is not None:
            continue
        deltas = found.deltas[sequence]
        if leaf in weights:
            weight = weights[leaf]
            deltas = deltas * (weight[None] if weight.ndim else weight)
        flat.append(deltas.reshape(deltas.shape[0], -1))
    return jnp.concatenate(flat, axis=1)


def _tapped(observed: Factors, updated: Factors, i: Array, j: Array) -> Array:
    x_TI, x_SI = observed.activations[i], updated.activations[j]
    here_ATF, there_BSF = observed.deltas[i], updated.deltas[j]
    wide = jnp.promote_types(here_ATF.dtype, jnp.float32)
    if x_TI.ndim == 1:
        alike_ST = (x_SI[:, None] == x_TI[None, :]).astype(wide)
    else:
        alike_ST = einsum("si,ti->st", x_SI, x_TI, preferred_element_type=wide)
    # one small product per direction: as a single large one, its operands would be transposed
    each_AST = jnp.broadcast_to(alike_ST[None], (here_ATF.shape[0], *alike_ST.shape))
    mixed_ASF = jnp.matmul(each_AST, here_ATF.astype(wide), precision=HIGHEST)
    flat = [array.reshape(array.shape[0], -1) for array in (mixed_ASF, there_BSF.astype(wide))]
    return _inner(*flat)


def _inner(here_AP: Array, there_BP: Array) -> Array:
    wide = jnp.promote_types(here_AP.dtype, jnp.float32)
    return einsum("ap,bp->ab", here_AP, there_BP, preferred_element_type=wide)
