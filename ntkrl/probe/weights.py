"""The geometry of weight changes: how many entries move, and in how many directions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params

ENTRIES = 4096
"""Weights that are followed through a run."""


@jax.jit
def update_sparsity(
    before: Params, after: Params, tolerance: float = 1e-5
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """Return the share of entries that an update moved, as seen in bfloat16, and left alone.

    Args:
      before, after: params on either side.
      tolerance: an entry is unchanged where |θ_after − θ_before| ≤ tolerance; ≥ 0.

    Returns:
      `(over all entries, by name of the leaf)`: scalars `bf16_visible`, the share whose bfloat16
      rounding differs, and `unchanged`; both in [0, 1].

    Source: Zhu et al. 2511.08567 (visible in bfloat16); Mukherjee et al. 2505.11711 (update
    sparsity at 1e-5).
    """
    first, second = trees.named_leaves(before), trees.named_leaves(after)
    by_leaf = {name: _sparsity(first[name], second[name], tolerance) for name in first}
    size = sum(leaf.size for leaf in first.values())
    overall = {
        kind: sum(by_leaf[name][kind] * (leaf.size / size) for name, leaf in first.items())
        for kind in ("bf16_visible", "unchanged")
    }
    return overall, by_leaf


@jax.jit
def some_entries(params: Params) -> Array:
    """Return ENTRIES entries (all where there are fewer) from the same places at every call.

    Args:
      params: any tree.

    Returns:
      `[n]`, places evenly spread over all entries, leaf by leaf.
    """
    leaves = jax.tree.leaves(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    places = np.unique(np.linspace(0, ends[-1] - 1, ENTRIES).round().astype(np.int64))
    found = []
    for leaf, end in zip(leaves, ends, strict=True):
        own = places[(end - leaf.size <= places) & (places < end)] - (end - leaf.size)
        found.append(at_least_float32(leaf[np.unravel_index(own, leaf.shape)]))
    return jnp.concatenate(found)


def _sparsity(before: Array, after: Array, tolerance: float) -> dict[str, Array]:
    here, there = at_least_float32(before), at_least_float32(after)
    same = {
        "bf16_visible": before.astype(jnp.bfloat16) != after.astype(jnp.bfloat16),
        "unchanged": jnp.abs(there - here) <= tolerance,
    }
    # by rows first: a float32 count of single entries stops at 2^24
    return {name: jnp.mean(jnp.mean(jnp.atleast_1d(hit), axis=-1)) for name, hit in same.items()}


class Leading(NamedTuple):
    """The leading singular triple of a matrix `[M, N]`: value σ, left u `[M]`, right v `[N]`."""

    value: Array
    left: Array
    right: Array


@jax.jit
def leading_direction(matrix: Array, iterations: int = 500) -> Leading:
    """Return the leading singular triple by power iteration from a fixed start.

    σ comes out to the square of the vectors' error. Where σ₁ and σ₂ nearly agree, iterations run
    out and the vectors are some mixture of both pairs.

    Args:
      matrix: `[M, N]`; stacked layers by vmap.
      iterations: at most so many, ≥ 1; fewer once v moves by less than √ε.

    Returns:
      Leading; σ = 0 and any unit v for a matrix of zeros.
    """
    matrix = at_least_float32(matrix)
    enough = float(jnp.finfo(matrix.dtype).eps) ** 0.5

    def unit(vector: Array) -> Array:
        return vector / jnp.maximum(jnp.linalg.norm(vector), jnp.finfo(vector.dtype).tiny)

    def turn(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        right_N, _, done = state
        left_M = unit(einsum("mn,n->m", matrix, right_N))
        new_N = unit(einsum("mn,m->n", matrix, left_M))
        return new_N, jnp.linalg.norm(new_N - right_N), done + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > enough) & (state[2] < iterations)

    start_N = unit(jax.random.normal(jax.random.key(0), matrix.shape[1:], matrix.dtype))
    far = jnp.full((), jnp.inf, matrix.dtype)
    right_N, _, _ = jax.lax.while_loop(unfinished, turn, (start_N, far, jnp.int32(0)))
    image_M = einsum("mn,n->m", matrix, right_N)
    return Leading(jnp.linalg.norm(image_M), unit(image_M), right_N)


@jax.jit
def update_rank(change: Array, leading: Leading) -> dict[str, Array]:
    """Return in how many directions a matrix moved.

    Args:
      change: ΔW `[M, N]`, not 0 (NaN otherwise).
      leading: its leading triple, from `leading_direction`.

    Returns:
      Scalars: `change_norm` ‖ΔW‖_F; `stable_rank` ‖ΔW‖_F²/σ₁²; `effective_rank`
      (Σσ²)²/Σσ⁴, between 1 and the rank; `leading_energy` σ₁²/Σσ², in (0, 1].

    Source: 2511.08567 and 2601.04537 (which quantities); the participation ratio is that of
    `feature_measures`.
    """
    change = at_least_float32(change)
    wide = change.T if change.shape[0] > change.shape[1] else change
    norm = jnp.linalg.norm(wide)
    # divided before it is squared: fourth powers of small steps underflow
    gram = einsum("mn,kn->mk", wide, wide) / norm**2
    energy = jnp.square(leading.value / norm)
    return {
        "change_norm": norm,
        "stable_rank": 1 / energy,
        "effective_rank": 1 / jnp.sum(jnp.square(gram)),
        "leading_energy": energy,
    }


@jax.jit
def update_ranks(
    before: Params, after: Params
) -> tuple[dict[str, dict[str, Array]], dict[str, Leading]]:
    """Return `update_rank` of every matrix by its leaf's name, of stacked ones the mean over them.

    Args:
      before, after: params on either side; leaves of two or three axes count.

    Returns:
      `(measures, leading)` by name; the leading directions of L stacked matrices (or of one) have
      L in front.
    """

    def one(change_MN: Array) -> tuple[dict[str, Array], Leading]:
        leading = leading_direction(change_MN)
        return update_rank(change_MN, leading), leading

    first, second = trees.named_leaves(before), trees.named_leaves(after)
    found, leading = {}, {}
    for name, leaf in first.items():
        if leaf.ndim in (2, 3):
            change = at_least_float32(second[name]) - at_least_float32(leaf)
            of_each, leading[name] = jax.vmap(one)(change.reshape(-1, *change.shape[-2:]))
            found[name] = jax.tree.map(jnp.mean, of_each)
    return found, leading


def direction_cosine(first: Leading, second: Leading) -> Array:
    """Return ⟨u vᵀ, u' v'ᵀ⟩ = (u·u')(v·v') of two leading directions, a scalar in [−1, 1].

    Free of the sign that a pair (u, v) leaves open; −1 where the change turned round.
    """
    return jnp.vdot(first.left, second.left) * jnp.vdot(first.right, second.right)
