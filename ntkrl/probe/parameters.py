"""Geometry of parameter changes: sparsity, rank, the head's matrix, paths over checkpoints."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.softmax import OutputHead, slice_tile, tile_count
from ntkrl.types import Array, Params

ENTRIES = 4096
"""Parameters that are recorded through a run."""
ITERATIONS = 500
"""Steps of the power iteration, at most."""


@jax.jit
def update_sparsity(before: Params, after: Params, tolerance: float = 1e-5) -> dict[str, Array]:
    """Return the shares of entries that an update changed in bfloat16, and left unchanged.

    Args:
      before, after: params on either side.
      tolerance: an entry is unchanged where |θ_after − θ_before| ≤ tolerance; ≥ 0.

    Returns:
      `bf16_visible`, the share whose bfloat16 rounding differs, and `unchanged`; both in [0, 1].

    Source: Zhu et al. 2511.08567 (visible in bfloat16); Mukherjee et al. 2505.11711 (update
    sparsity at 1e-5).
    """
    first, second = trees.named_leaves(before), trees.named_leaves(after)
    by_leaf = {name: _sparsity(first[name], second[name], tolerance) for name in first}
    size = sum(leaf.size for leaf in first.values())
    return {
        kind: sum(by_leaf[name][kind] * (leaf.size / size) for name, leaf in first.items())
        for kind in ("bf16_visible", "unchanged")
    }


def _sparsity(before: Array, after: Array, tolerance: float) -> dict[str, Array]:
    here, there = at_least_float32(before), at_least_float32(after)
    flags = {
        "bf16_visible": before.astype(jnp.bfloat16) != after.astype(jnp.bfloat16),
        "unchanged": jnp.abs(there - here) <= tolerance,
    }
    # mean of row means: a float32 count of single entries stops at 2^24
    return {name: jnp.mean(jnp.mean(jnp.atleast_1d(flag), axis=-1)) for name, flag in flags.items()}


@jax.jit
def sample_entries(params: Params) -> Array:
    """Return ENTRIES entries `[n]` (all where there are fewer) at fixed, evenly spread indices."""
    leaves = jax.tree.leaves(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    indices = np.unique(np.linspace(0, ends[-1] - 1, ENTRIES).round().astype(np.int64))
    entries = []
    for leaf, end in zip(leaves, ends, strict=True):
        start = end - leaf.size
        of_leaf = indices[(start <= indices) & (indices < end)] - start
        entries.append(at_least_float32(leaf[np.unravel_index(of_leaf, leaf.shape)]))
    return jnp.concatenate(entries)


class SingularTriple(NamedTuple):
    """The leading singular triple of a matrix `[M, N]`: value σ, left u `[M]`, right v `[N]`."""

    value: Array
    left: Array
    right: Array


@jax.jit
def leading_direction(matrix: Array) -> SingularTriple:
    """Return the leading singular triple of `[M, N]` by power iteration from a fixed start.

    At most ITERATIONS, fewer once v moves by less than √ε. The error of σ is the square of
    the vectors'; where σ₁ and σ₂ nearly agree the vectors mix both pairs. σ = 0 and any unit v for
    a matrix of zeros.
    """
    matrix = at_least_float32(matrix)
    tolerance = float(jnp.finfo(matrix.dtype).eps) ** 0.5

    def unit(vector: Array) -> Array:
        return vector / jnp.maximum(jnp.linalg.norm(vector), jnp.finfo(vector.dtype).tiny)

    def iterate(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        right_N, _, count = state
        left_M = unit(einsum("mn,n->m", matrix, right_N))
        new_N = unit(einsum("mn,m->n", matrix, left_M))
        return new_N, jnp.linalg.norm(new_N - right_N), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > tolerance) & (state[2] < ITERATIONS)

    start_N = unit(jax.random.normal(jax.random.key(0), matrix.shape[1:], matrix.dtype))
    far = jnp.full((), jnp.inf, matrix.dtype)
    right_N, _, _ = jax.lax.while_loop(unfinished, iterate, (start_N, far, jnp.int32(0)))
    image_M = einsum("mn,n->m", matrix, right_N)
    return SingularTriple(jnp.linalg.norm(image_M), unit(image_M), right_N)


@jax.jit
def update_rank(change: Array, leading: SingularTriple) -> dict[str, Array]:
    """Measure the rank of a matrix's change.

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
    """Return `update_rank` of every matrix by its leaf's name, the mean over stacked ones.

    Args:
      before, after: params on either side; leaves of two or three axes count.

    Returns:
      `(measures, leading)` by name; the leading directions of L stacked matrices (or of a single
      one) have L in front.
    """

    def measure(change_MN: Array) -> tuple[dict[str, Array], SingularTriple]:
        triple = leading_direction(change_MN)
        return update_rank(change_MN, triple), triple

    first, second = trees.named_leaves(before), trees.named_leaves(after)
    measures, leading = {}, {}
    for name, leaf in first.items():
        if leaf.ndim in (2, 3):
            change = at_least_float32(second[name]) - at_least_float32(leaf)
            by_layer, leading[name] = jax.vmap(measure)(change.reshape(-1, *change.shape[-2:]))
            measures[name] = jax.tree.map(jnp.mean, by_layer)
    return measures, leading


def direction_cosine(first: SingularTriple, second: SingularTriple) -> Array:
    """Return ⟨u vᵀ, u' v'ᵀ⟩ = (u·u')(v·v') in [−1, 1]; −1 where the change reversed."""
    return jnp.vdot(first.left, second.left) * jnp.vdot(first.right, second.right)


@functools.partial(jax.jit, static_argnums=(2,))
def classifier_measures(
    weight: Array, start: Array, chunk_vocabulary: int = 4096
) -> dict[str, Array]:
    """Measure W and W − W_0; beside a block of rows, only two D×D Gram matrices exist.

    Args:
      weight: W `[V, D]`.
      start: W_0 `[V, D]`, of any dtype.
      chunk_vocabulary: rows at a time, ≥ 1.

    Returns:
      Scalars: `head_norm` ‖W‖_F, `head_distance` ‖W − W_0‖_F,
      `head_row_norm` and `head_row_norm_max` mean and largest row norm, `head_stable_rank`
      ‖W‖_F²/‖W‖_2² and `head_distance_stable_rank` the same of W − W_0 (in [1, min(V, D)]; NaN
      where W has not moved).

    Source: Tomihari & Sato 2405.16747 (norms), Tomihari 2601.04670.
    """
    head, start_head = OutputHead(weight), OutputHead(start)
    rows, count = tile_count(head, chunk_vocabulary)
    zeros_DD = jnp.zeros((weight.shape[1],) * 2, jnp.promote_types(weight.dtype, jnp.float32))

    def add(grams: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        tile, start_tile = slice_tile(head, rows, number), slice_tile(start_head, rows, number)
        here_RD = jnp.where(tile.fresh[:, None], at_least_float32(tile.weight), 0)
        there_RD = jnp.where(tile.fresh[:, None], at_least_float32(start_tile.weight), 0)
        moved_RD = here_RD - there_RD
        gram_DD = grams[0] + einsum("rd,re->de", here_RD, here_RD)
        moved_DD = grams[1] + einsum("rd,re->de", moved_RD, moved_RD)
        return (gram_DD, moved_DD), jnp.linalg.norm(here_RD, axis=1)

    numbers = jnp.arange(count, dtype=jnp.int32)
    (gram_DD, moved_DD), norms = jax.lax.scan(add, (zeros_DD, zeros_DD), numbers)
    # the last block starts early enough to fit; its repeated rows are zeros
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
    }


class LineSums(NamedTuple):
    """Running sums for a linear regression of every entry of a tree on the step.

    number, times, squares: n, Σ t, Σ t², t the step less `start_step`.
    start_step, start: step and values of the first checkpoint.
    values, products, value_squares: trees of Σ w, Σ t w, Σ w², w the value less `start`.
    """

    number: Array
    times: Array
    squares: Array
    start_step: Array
    start: Params
    values: Params
    products: Params
    value_squares: Params


def start_line(tree: Params, step: Array | float) -> LineSums:
    """Return the sums of a first checkpoint: any tree, for instance log-probs `[O]`, at a step."""
    start = jax.tree.map(at_least_float32, tree)
    zero = jnp.zeros(())
    blank = jax.tree.map(jnp.zeros_like, start)
    return LineSums(zero + 1, zero, zero, jnp.asarray(step), start, blank, blank, blank)


@jax.jit
def extend_line(sums: LineSums, tree: Params, step: Array | float) -> LineSums:
    """Return the sums with another checkpoint, of the structure of the first, at a step."""
    t = (step - sums.start_step).astype(sums.times.dtype)
    moved = jax.tree.map(lambda leaf, start: at_least_float32(leaf) - start, tree, sums.start)
    return sums._replace(
        number=sums.number + 1,
        times=sums.times + t,
        squares=sums.squares + t**2,
        values=jax.tree.map(jnp.add, sums.values, moved),
        products=jax.tree.map(lambda total, w: total + t * w, sums.products, moved),
        value_squares=jax.tree.map(lambda total, w: total + w**2, sums.value_squares, moved),
    )


@jax.jit
def line_fit(sums: LineSums) -> tuple[Params, dict[str, Array]]:
    """Return R² of the linear regression of every entry on the step.

    R² = S_tw²/(S_tt S_ww), S the centred sums of squares and products.

    Args:
      sums: of three checkpoints or more at different steps (two always fit).

    Returns:
      `(tree of R² in [0, 1], scalars)`; entries that never moved have 0 and do not count in the
      scalars: `linearity` mean R² of the entries that moved, `linearity_pooled` the share of all
      their variance over the steps that the lines explain.

    Source: 2601.04537.
    """
    spread = sums.squares - sums.times**2 / sums.number

    def centred(values: Array, products: Array, squares: Array) -> tuple[Array, Array]:
        across = products - sums.times * values / sums.number
        variance = squares - values**2 / sums.number
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
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, tree))
