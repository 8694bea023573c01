"""How straight a path parameters take over checkpoints, and where the line leads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32
from ntkrl.types import Array, Params


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
