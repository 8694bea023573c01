"""The program of the step ledger: gradients of the terms, what became of them, what that did.

Samples are taken `chunk` at a time; their gradients are written out, changed as the optimizer
changed the whole gradient, and laid against the probe tokens by one of the two forms of
ntkrl.attribution.contributions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ntkrl import ntk, trees
from ntkrl.attribution import contributions as parts
from ntkrl.attribution import held
from ntkrl.ntk import GroupedContexts, as_network, features_at
from ntkrl.numerics import at_least_float32
from ntkrl.probe.signal import GradientNoise, noise_of
from ntkrl.types import Array, Params, Policy, Total

Terms = Callable[[Params, Any, Any], tuple[dict[str, Total], Any]]
Gradients = dict[str, tuple[Params, Array]]
COLUMNS = ("momentum", "decay", "optimizer")


class Way(NamedTuple):
    """How a ledger is made; static.

    policy, terms, optimizer, trained, microbatches, mesh: as in Ledger.
    members: groups of the trained leaves.
    names: of the terms.
    by: "group" or "sample".
    form: "push" or "gram".
    chunk: samples at a time.
    block: probe sequences whose gradients are written out at a time.
    columns: changes other than the samples' that are pushed at a time.
    """

    policy: Policy
    terms: Terms
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]
    microbatches: int
    mesh: Mesh | None
    members: parts.Members
    names: tuple[str, ...]
    by: str
    form: str = "push"
    chunk: int = 1
    block: int = 1
    columns: int = 1


class Given(NamedTuple):
    """What a ledger is made of.

    params, opt_state: before the step.
    batch: B rows. beside: what the terms are given with all of them.
    contexts, targets: the probe tokens, `sequences` the contexts by sequence.
    gradients, actual: as in `Ledger.read`.
    """

    params: Params
    opt_state: Any
    batch: Any
    beside: Any
    contexts: ntk.Contexts
    sequences: GroupedContexts
    targets: Array
    gradients: Gradients | None
    actual: Array | None


class Found(NamedTuple):
    """What a ledger holds, measures in the order of MEASURES, the head before the groups.

    actual: `[2, O]` measured change.
    columns: `[1 + G, 2, O, K]` of COLUMNS, after the terms where they are by group.
    samples: `[1 + G, 2, O, T, B]`, or None by group.
    noise: of the samples' gradients, or None by group.
    """

    actual: Array
    columns: Array
    samples: Array | None
    noise: GradientNoise | None


@functools.partial(jax.jit, static_argnames=("way",))
def read(way: Way, given: Given, after: Params) -> Found:
    """Account for a step."""
    network = as_network(way.policy)
    chosen, rest = trees.partition(given.params, way.trained)
    ended, _ = trees.partition(after, way.trained)
    grads_T, counts_T = _whole_gradients(way, given)
    applied = _applied(way, given, grads_T)
    terms_T = jax.vmap(applied.push)(grads_T)
    left = jax.tree.map(
        lambda new, old, terms, *others: new - old - jnp.sum(terms, axis=0) - sum(others),
        *(ended, chosen, terms_T, applied.momentum, applied.decay),
    )
    changes = jax.tree.map(lambda *rows: jnp.stack(rows), applied.momentum, applied.decay, left)
    if way.by == "group":
        changes = jax.tree.map(lambda *rows: jnp.concatenate(rows), terms_T, changes)
    phi_OD, moved = parts.linearised(network, chosen, rest, given.contexts)
    side = parts.side_of(network, given.params, phi_OD, given.targets)
    push = _first_order(way, side, moved)

    def pushed(change: Params) -> Array:
        return push(jax.tree.map(lambda leaf: leaf[None], change))[..., 0]

    # together: four times as fast as one after another on a CPU
    one_KGAO = jax.lax.map(pushed, changes, batch_size=way.columns)
    actual = given.actual
    if actual is None:
        later_OD = features_at(network, after, given.contexts)
        actual = parts.side_of(network, after, later_OD, given.targets).values - side.values
    samples, noise = None, None
    if way.by == "sample":
        samples, squares_B = by_sample(way, given, applied, counts_T, side, push)
        rows = squares_B.shape[0]  # the mean of B g_i is the gradient
        noise = noise_of(rows**2 * squares_B, _square(jax.tree.map(_summed, grads_T)))
    found = Found(actual, jnp.moveaxis(one_KGAO, 0, -1), samples, noise)
    return jax.tree.map(lambda leaf: trees.replicate(leaf, way.mesh), found)


def by_sample(
    way: Way,
    given: Given,
    applied: held.Applied,
    counts: Array,
    side: parts.Side,
    push: Callable[[Params], Array],
) -> tuple[Array, Array]:
    """Return the contributions of every sample and term `[1 + G, 2, O, T, B]`, and ‖g‖² `[B]`."""

    def changes(row: Any) -> tuple[Params, Array]:
        return sample_changes(way, given, applied, counts, row)

    def pushed(row: Any) -> tuple[Array, Array]:
        own, square = changes(row)
        return push(own), square

    if way.form == "push":
        found_B, squares_B = jax.lax.map(pushed, given.batch, batch_size=way.chunk)
        return jnp.moveaxis(found_B, 0, -1), squares_B
    blocks = _blocks(way, given, side)
    if way.block >= len(given.sequences.positions):
        # all at once: tokens alone, without the slots that shorter sequences leave empty
        one = jax.tree.map(lambda leaf: leaf[0], blocks)
        kept = side, given.sequences.slots
        found_BGAOT, squares_B = _block(way, given, changes, one, kept)
        return jnp.transpose(found_BGAOT, (1, 2, 3, 4, 0)), squares_B
    found_NBGAOT, squares_NB = jax.lax.map(lambda block: _block(way, given, changes, block), blocks)
    n, rows, groups, measures, tokens, terms = found_NBGAOT.shape
    found = jnp.transpose(found_NBGAOT, (2, 3, 0, 4, 5, 1))
    found = found.reshape(groups, measures, n * tokens, terms, rows)
    return found[:, :, given.sequences.slots], squares_NB[0]


def sample_changes(
    way: Way, given: Given, applied: held.Applied, counts: Array, row: Any
) -> tuple[Params, Array]:
    """Return what the terms of one sample changed, T in front, and its whole gradient's ‖g‖²."""
    one = jax.tree.map(lambda leaf: leaf[None], row)
    grads_T = _over(pulled(way, given, one)[0], counts)
    return jax.vmap(applied.push)(grads_T), _square(jax.tree.map(_summed, grads_T))


def _summed(leaf: Array) -> Array:
    return jnp.sum(leaf, axis=0)


def _square(tree: Params) -> Array:
    return sum(jnp.sum(jnp.square(at_least_float32(leaf))) for leaf in jax.tree.leaves(tree))


def _first_order(
    way: Way, side: parts.Side, moved: Callable[[Params], Array]
) -> Callable[[Params], Array]:
    """Return the map from K changes to `[1 + G, 2, O, K]`, by JVPs."""
    network = as_network(way.policy)
    push = parts.pusher(way.members, moved, side)
    return lambda changes: jnp.concatenate(
        [parts.by_head(network, side, changes)[None], push(changes)]
    )


def _blocks(way: Way, given: Given, side: parts.Side) -> tuple[Any, parts.Side]:
    """Return the probe set by blocks of sequences, and the side of their slots."""
    sequences, (count, width) = given.sequences, given.sequences.positions.shape
    blocks = -(-count // way.block)
    room = blocks * way.block

    def cut(leaf: Array) -> Array:
        # sequences at the end are repeated with cotangents of zero
        padding = [(0, room - count)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding, mode="edge").reshape(blocks, way.block, *leaf.shape[1:])

    def laid(values_O: Array) -> Array:
        empty = jnp.zeros((room * width, *values_O.shape[1:]), values_O.dtype)
        whole = empty.at[sequences.slots].set(values_O)
        return whole.reshape(blocks, way.block * width, *values_O.shape[1:])

    head, body = (
        jnp.moveaxis(laid(jnp.moveaxis(leaf, 1, 0)), 2, 1) for leaf in (side.head, side.body)
    )
    own = parts.Side(laid(side.values.T), laid(side.features), head, body)
    return tuple(map(cut, (sequences.tokens, sequences.mask, sequences.positions))), own


def _block(
    way: Way,
    given: Given,
    changes: Callable[[Any], tuple[Params, Array]],
    block: tuple[Any, parts.Side],
    kept: tuple[parts.Side, Array] | None = None,
) -> tuple[Array, Array]:
    """Return `[B, 1 + G, 2, slots, T]` of a block of probe sequences, or of kept tokens of it.

    And `[B]` ‖g‖² of the samples' gradients. kept: their side and slots.
    """
    (tokens, mask, positions), side = block
    network = as_network(way.policy)
    chosen, rest = trees.partition(given.params, way.trained)
    pull_SPAD = jnp.moveaxis(side.body, 0, 1).reshape(*positions.shape, *side.body.shape[::2])
    sequences = (tokens, mask, positions, pull_SPAD)
    rows = parts.gradients(network, way.members, chosen, rest, sequences)
    if kept is not None:
        side, slots_O = kept
        rows = [
            leaf.reshape(-1, 2, *leaf.shape[1:])[slots_O].reshape(-1, *leaf.shape[1:])
            for leaf in rows
        ]

    def sample(row: Any) -> tuple[Array, Array]:
        own, square = changes(row)
        head_AOT = parts.by_head(network, side, own)
        body_GRT = parts.against(way.members, rows, own)
        body_GOAT = body_GRT.reshape(len(body_GRT), -1, *head_AOT.shape[::2])
        return jnp.concatenate([head_AOT[None], jnp.moveaxis(body_GOAT, 2, 1)]), square

    return jax.lax.map(sample, given.batch, batch_size=way.chunk)


def _applied(way: Way, given: Given, grads: Params) -> held.Applied:
    whole = jax.tree.map(_summed, grads)
    chosen, _ = trees.partition(given.params, way.trained)
    return held.applied(way.optimizer, whole, given.opt_state, chosen)


def _whole_gradients(way: Way, given: Given) -> tuple[Params, Array]:
    """Return the gradients of the terms' means, T in front, and what they were divided by."""
    if given.gradients is not None:
        grads, counts = zip(*(given.gradients[name] for name in way.names), strict=True)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads), jnp.maximum(
            jnp.stack(counts), 1
        )

    def cut(leaf: Array) -> Array:
        return leaf.reshape(way.microbatches, -1, *leaf.shape[1:])

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, pulled(way, given, part)), None

    batches = jax.tree.map(cut, given.batch)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes = jax.eval_shape(lambda part: pulled(way, given, part), first)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, counts_T), _ = jax.lax.scan(add, nothing, batches)
    counts_T = jnp.maximum(counts_T, 1)
    return _over(grads, counts_T), counts_T


def _over(grads: Params, counts: Array) -> Params:
    return jax.tree.map(
        lambda leaf: (leaf / counts.reshape(-1, *(1,) * (leaf.ndim - 1))).astype(leaf.dtype), grads
    )


def pulled(way: Way, given: Given, rows: Any) -> tuple[Params, Array]:
    """Return gradients of the terms' sums over rows, and their counts, T in front."""
    chosen, rest = trees.partition(given.params, way.trained)

    def totals(chosen: Params) -> tuple[Array, Array]:
        found, _ = way.terms(trees.merge(chosen, rest), rows, given.beside)
        sums, counts = zip(*(found[name] for name in way.names), strict=True)
        return jnp.stack(sums), jnp.stack(counts)

    sums_T, pull, counts_T = jax.vjp(totals, chosen, has_aux=True)
    return jax.vmap(pull)(jnp.eye(len(way.names), dtype=sums_T.dtype))[0], counts_T
