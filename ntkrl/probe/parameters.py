"""Geometry of weight updates: sparsity, rank, the head's matrix, paths over checkpoints."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.softmax import Head
from ntkrl.softmax.tiles import Tiling, cut, tile_count
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
def sample_entries(params: Params) -> Array:
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


class SingularTriple(NamedTuple):
    """The leading singular triple of a matrix `[M, N]`: value σ, left u `[M]`, right v `[N]`."""

    value: Array
    left: Array
    right: Array


@jax.jit
def leading_direction(matrix: Array, iterations: int = 500) -> SingularTriple:
    """Return the leading singular triple by power iteration from a fixed start.

    σ comes out to the square of the vectors' error. Where σ₁ and σ₂ nearly agree, iterations run
    out and the vectors are some mixture of both pairs.

    Args:
      matrix: `[M, N]`; stacked layers by vmap.
      iterations: at most so many, ≥ 1; fewer once v moves by less than √ε.

    Returns:
      SingularTriple; σ = 0 and any unit v for a matrix of zeros.
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
    return SingularTriple(jnp.linalg.norm(image_M), unit(image_M), right_N)


@jax.jit
def update_rank(change: Array, leading: SingularTriple) -> dict[str, Array]:
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
) -> tuple[dict[str, dict[str, Array]], dict[str, SingularTriple]]:
    """Return `update_rank` of every matrix by its leaf's name, of stacked ones the mean over them.

    Args:
      before, after: params on either side; leaves of two or three axes count.

    Returns:
      `(measures, leading)` by name; the leading directions of L stacked matrices (or of one) have
      L in front.
    """

    def one(change_MN: Array) -> tuple[dict[str, Array], SingularTriple]:
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


def direction_cosine(first: SingularTriple, second: SingularTriple) -> Array:
    """Return ⟨u vᵀ, u' v'ᵀ⟩ = (u·u')(v·v') of two leading directions, a scalar in [−1, 1].

    Free of the sign that a pair (u, v) leaves open; −1 where the change turned round.
    """
    return jnp.vdot(first.left, second.left) * jnp.vdot(first.right, second.right)


@functools.partial(jax.jit, static_argnums=(2,))
def classifier_measures(
    weight: Array, start: Array, chunk_vocabulary: int = 4096
) -> tuple[dict[str, Array], Array]:
    """Measure W and W − W_0; beside a block of rows, only two D×D Gram matrices are made.

    Args:
      weight: W `[V, D]`.
      start: W_0 `[V, D]`, of any dtype.
      chunk_vocabulary: rows taken at a time, ≥ 1.

    Returns:
      `(scalars, row norms [V])`. Scalars: `head_norm` ‖W‖_F, `head_distance` ‖W − W_0‖_F,
      `head_row_norm` and `head_row_norm_max` mean and largest row norm, `head_stable_rank`
      ‖W‖_F²/‖W‖_2² and `head_distance_stable_rank` the same of W − W_0 (in [1, min(V, D)]; NaN
      where nothing moved).

    Source: Tomihari & Sato 2405.16747 (norms), Tomihari 2601.04670.
    """
    head = Head(weight)
    rows, count = tile_count(head, Tiling(1.0, chunk_vocabulary, 0))
    width = weight.shape[1]
    wide = jnp.promote_types(weight.dtype, jnp.float32)

    def add(grams: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        tile, other = cut(head, rows, number), cut(Head(start), rows, number)
        here_RD = jnp.where(tile.fresh[:, None], at_least_float32(tile.weight), 0)
        there_RD = jnp.where(tile.fresh[:, None], at_least_float32(other.weight), 0)
        parts = here_RD, here_RD - there_RD
        grams = tuple(g + einsum("rd,re->de", p, p) for g, p in zip(grams, parts, strict=True))
        return grams, jnp.linalg.norm(here_RD, axis=1)

    zeros_DD = jnp.zeros((width, width), wide)
    numbers = jnp.arange(count, dtype=jnp.int32)
    (gram_DD, moved_DD), norms = jax.lax.scan(add, (zeros_DD, zeros_DD), numbers)
    # the last block was moved back to fit, its rows seen before zeroed
    last = norms[-1][count * rows - weight.shape[0] :]
    norms_V = jnp.concatenate([norms[:-1].ravel(), last])
    square, moved_square = jnp.trace(gram_DD), jnp.trace(moved_DD)
    return {
        "head_norm": jnp.sqrt(square),
        "head_distance": jnp.sqrt(moved_square),
        "head_row_norm": jnp.mean(norms_V),
        "head_row_norm_max": jnp.max(norms_V),
        "head_stable_rank": square / leading_direction(gram_DD).value,
        "head_distance_stable_rank": moved_square / leading_direction(moved_DD).value,
    }, norms_V


class LineSums(NamedTuple):
    """Running sums for a straight line through every entry of a tree over checkpoints.

    Everything is counted from the first checkpoint, where sums of squares would otherwise drown
    what moved. Three trees of the params' size beside the first one.

    count, times, squares: n, Σ t, Σ t².
    start: the first checkpoint; start_step: its step.
    values, products, value_squares: trees of Σ w, Σ t w, Σ w².
    """

    count: Array
    times: Array
    squares: Array
    start_step: Array
    start: Params
    values: Params
    products: Params
    value_squares: Params


def start_line(tree: Params, step: Array | float) -> LineSums:
    """Start the sums with a first checkpoint; any tree will do, for instance log-probs `[O]`.

    Args:
      tree: params.
      step: the optimizer step they belong to.
    """
    start = jax.tree.map(at_least_float32, tree)
    zero = jnp.zeros(())
    blank = jax.tree.map(jnp.zeros_like, start)
    return LineSums(zero + 1, zero, zero, jnp.asarray(step), start, blank, blank, blank)


@jax.jit
def extend_line(sums: LineSums, tree: Params, step: Array | float) -> LineSums:
    """Add a checkpoint to the sums.

    Args:
      sums: from `start_line` or this function.
      tree: params of the structure of the first.
      step: the optimizer step they belong to.
    """
    t = (step - sums.start_step).astype(sums.times.dtype)
    moved = jax.tree.map(lambda leaf, start: at_least_float32(leaf) - start, tree, sums.start)
    return sums._replace(
        count=sums.count + 1,
        times=sums.times + t,
        squares=sums.squares + t**2,
        values=jax.tree.map(jnp.add, sums.values, moved),
        products=jax.tree.map(lambda total, w: total + t * w, sums.products, moved),
        value_squares=jax.tree.map(lambda total, w: total + w**2, sums.value_squares, moved),
    )


@jax.jit
def line_fit(sums: LineSums) -> tuple[Params, dict[str, Array]]:
    """Return R² of the straight line in the step through every entry.

    R² = S_tw²/(S_tt S_ww), S the centred sums of squares and products.

    Args:
      sums: of three checkpoints or more at different steps (two always lie on a line).

    Returns:
      `(tree of R² in [0, 1], scalars)`; entries that never moved have 0 and do not count in the
      scalars: `linearity` mean R² of the entries that moved, `linearity_pooled` the share of all
      their variance over the steps that the lines explain.

    Source: 2601.04537.
    """
    spread = sums.squares - sums.times**2 / sums.count

    def centred(values: Array, products: Array, squares: Array) -> tuple[Array, Array]:
        across = products - sums.times * values / sums.count
        variance = squares - values**2 / sums.count
        return jnp.minimum(across**2 / spread, variance), variance

    parts = jax.tree.map(centred, sums.values, sums.products, sums.value_squares)
    explained, variance = jax.tree.transpose(
        jax.tree.structure(sums.values), jax.tree.structure((0, 0)), parts
    )
    fits = jax.tree.map(
        lambda e, v: jnp.where(v > 0, e / jnp.where(v > 0, v, 1), 0), explained, variance
    )
    sizes = [jnp.sum(v > 0, dtype=jnp.float32) for v in jax.tree.leaves(variance)]
    return fits, {
        "linearity": _sum(fits) / sum(sizes),
        "linearity_pooled": _sum(explained) / _sum(variance),
    }


def _sum(tree: Params) -> Array:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))


def extrapolate(
    first: Params, second: Params, first_step: float, second_step: float, step: float
) -> Params:
    """Return θ_a + (t − a)/(b − a) (θ_b − θ_a), the line through two checkpoints at step t.

    Args:
      first, second: θ_a and θ_b.
      first_step, second_step: a and b (steps), different.
      step: t (steps).

    Returns:
      A tree in the dtypes of θ_a.

    Raises:
      ValueError: a = b.

    Source: 2601.04537.
    """
    if first_step == second_step:
        raise ValueError(f"a line needs checkpoints of two steps, not of {first_step} twice.")
    share = (step - first_step) / (second_step - first_step)

    def line(a: Array, b: Array) -> Array:
        wide = at_least_float32(a)
        return (wide + share * (at_least_float32(b) - wide)).astype(a.dtype)

    return jax.tree.map(line, first, second)
