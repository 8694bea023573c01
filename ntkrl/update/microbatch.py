"""A loss over chunks of rows whose logits are made once.

The gradient of a loss on token statistics needs the logits twice, to read the statistics and to
pull them back. Making them again costs a third more products; keeping them all costs tokens × V.
Here a chunk of whole completions goes through the loss and back before the next begins: the loss
of completions is a sum, so the gradient of each chunk is known up to the factor on the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ntkrl.numerics import primal
from ntkrl.softmax import Head, TokenStatistics, logit_statistics, logits
from ntkrl.types import Array, Total, UpdateBatch
from ntkrl.update.loss import Measures

Totals = Total | dict[str, Total]
"""Of a loss, or of each of its terms by name."""
Loss = Callable[[TokenStatistics, UpdateBatch], tuple[Totals, Measures]]


def split_rows(tree: Any, parts: int) -> Any:
    """Cut arrays `[B, …]` in `parts` along the rows: `[parts, ⌈B/parts⌉, …]`, zeros at the end.

    Part k takes rows k, k + parts, …: rows that lie spread over devices stay so in every part.
    """

    def cut(leaf: Array) -> Array:
        rows = -(-leaf.shape[0] // parts)
        padding = [(0, rows * parts - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.moveaxis(jnp.pad(leaf, padding).reshape(rows, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(cut, tree)


def join_rows(values: Array, rows: int) -> Array:
    """Undo `split_rows` of one array."""
    return jnp.moveaxis(values, 0, 1).reshape(-1, *values.shape[2:])[:rows]


def add(left: tuple[Totals, Measures], right: tuple[Totals, Measures]) -> tuple[Totals, Measures]:
    """Add the losses and measures of two parts of a batch."""
    total, totals = jax.tree.map(jnp.add, (left[0], left[1].totals), (right[0], right[1].totals))
    maxima = jax.tree.map(jnp.maximum, left[1].maxima, right[1].maxima)
    return total, Measures(totals, maxima)


def scan_microbatches(
    read: Callable[[Any], tuple[Any, Any]], parts: Any, combine: Callable[[Any, Any], Any]
) -> tuple[Any, Any]:
    """Read every part in turn.

    Args:
      read: `part -> (found, own)`.
      parts: from `split_rows`.
      combine: adds what is found of two parts; zeros begin.

    Returns:
      What was found of all together, and `own` of each, stacked.
    """
    shapes, _ = jax.eval_shape(read, jax.tree.map(lambda leaf: leaf[0], parts))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def turn(sums: Any, part: Any) -> tuple[Any, Any]:
        found, own = read(part)
        return combine(sums, found), own

    return jax.lax.scan(turn, nothing, parts)


def add_pulled(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    """Add `((Totals, Measures), gradients)` of two parts of a batch."""
    return add(left[0], right[0]), jax.tree.map(jnp.add, left[1], right[1])


def loss_by_rows(
    loss: Loss, temperature: float, parts: int, head: Head, features: Array, batch: UpdateBatch
) -> tuple[Totals, Measures]:
    """Return what `loss` says of a batch, reading `parts` chunks of its rows one after another.

    Differentiable in head and features, through the sums of the Totals alone.

    Args:
      loss: of completions; its Totals and Measures must add up over them.
      temperature: divides the logits; > 0.
      parts: chunks ≥ 1.
      head: the head's arrays.
      features: `[B, C, D]` that predict each completion token.
      batch: UpdateBatch.
    """
    plain = batch.replace(features=None, ref_features=None)
    return _whole((loss, temperature, parts), head, features, plain)


def sums_of(totals: Totals) -> list[Array]:
    """Return the sum of a Total, or those of each, in the order of their names."""
    if isinstance(totals, Total):
        return [totals.total]
    return [totals[name].total for name in sorted(totals)]


def _part(
    loss: Loss, temperature: float, head: Head, phi: Array, batch: UpdateBatch
) -> tuple[Totals, Measures]:
    targets = batch.tokens[:, -batch.completion_mask.shape[1] :]
    return loss(logit_statistics(logits(head, phi) / temperature, targets), batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(
    static: tuple[Loss, float, int], head: Head, features: Array, batch: UpdateBatch
) -> tuple[Totals, Measures]:
    loss, temperature, parts = static
    if parts == 1:
        return _part(loss, temperature, head, features, batch)
    cut = split_rows((features, batch), parts)
    return scan_microbatches(lambda part: (_part(loss, temperature, head, *part), None), cut, add)[
        0
    ]


def _forward(static: tuple[Loss, float, int], head: Any, features: Any, batch: Any) -> Any:
    loss, temperature, parts = static
    (head, for_head), (features, for_phi) = primal(head), primal(features)
    batch, _ = primal(batch)
    moved = tuple(number for number, wanted in enumerate((for_head, for_phi)) if wanted)

    def pull(part: tuple[Array, UpdateBatch]) -> Any:
        given = (head, part[0])

        def value(*own: Any) -> tuple[list[Array], tuple[Totals, Measures]]:
            whole = dict(enumerate(given)) | dict(zip(moved, own, strict=True))
            found = _part(loss, temperature, whole[0], whole[1], part[1])
            return sums_of(found[0]), found

        values, back, found = jax.vjp(value, *(given[n] for n in moved), has_aux=True)
        pulled = [dict(zip(moved, back(unit), strict=True)) for unit in _units(values)]
        of_head, of_phi = ([one[n] if n in moved else None for one in pulled] for n in (0, 1))
        return (found, of_head), of_phi

    cut = split_rows((features, batch), parts)
    (found, d_head), d_phi = scan_microbatches(pull, cut, add_pulled)
    return found, (d_head, jax.tree.map(lambda leaf: join_rows(leaf, features.shape[0]), d_phi))


def _units(values: list[Array]) -> list[list[Array]]:
    """Return the cotangents that pick out each of some scalars."""
    one = [jnp.ones_like(value) for value in values]
    still = [jnp.zeros_like(value) for value in values]
    return [[*still[:n], one[n], *still[n + 1 :]] for n in range(len(values))]


def _backward(static: Any, residuals: Any, given: Any) -> tuple[Any, Any, None]:
    factors = sums_of(given[0])

    def joined(*pulled: Array) -> Array:
        parts = (
            factor * own
            for factor, own in zip(factors, pulled, strict=True)
            if not isinstance(factor, SymbolicZero)
        )
        return sum(parts).astype(pulled[0].dtype)

    head, phi = (jax.tree.map(joined, *of_terms) for of_terms in residuals)
    return head, phi, None


_whole.defvjp(_forward, _backward, symbolic_zeros=True)
