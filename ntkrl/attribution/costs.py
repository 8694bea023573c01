"""What each form of the samples' contributions costs, and which is taken.

With f the FLOPs of a sample's gradients and changes, J those of one JVP over the probe set, r those
of the gradients of one probe sequence's P tokens, θ the trained numbers in the features' role, B
samples, T terms, G groups that hold some of θ, S probe sequences in n blocks:

    push    B f + B T G J
    gram    n B f + S r + B T 2 (2 S P) θ, with O in place of S P where n = 1

and 2 B T O V D more in both for a trained head. The columns that are no sample's are T + 3 JVPs
by group, three by sample; the gradients that they need the step hands out, at a pass backward for
each term beyond the first. f, J and r are counted in the traced programs; work counts matrix
products. Memory is reckoned from above.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from ntkrl import trees
from ntkrl.attribution import accounts, held
from ntkrl.attribution import contributions as parts
from ntkrl.attribution.accounts import Given, Way
from ntkrl.jaxpr import flops, trace, value_counts
from ntkrl.ntk import as_network
from ntkrl.numerics import GIB
from ntkrl.types import Array, Params

FORMS = ("push", "gram")
MOST = {"push": 8, "gram": 32}
"""Samples at a time: more are no faster, and fill caches (measured on two CPU cores)."""
SLOWER = 6
"""How much longer FLOPs of single tokens' gradients take than others (measured there too)."""


class Estimate(NamedTuple):
    """What a form will cost.

    form: "push" or "gram".
    chunk: samples at a time.
    block: probe sequences whose gradients are written out at a time (gram).
    flops: of matrix products.
    time: flops, but those of single tokens' gradients SLOWER times; forms are chosen by it.
    bytes: working memory beyond params and state.
    """

    form: str
    chunk: int
    block: int
    flops: float
    time: float
    bytes: int


class Sizes(NamedTuple):
    """Counts read off the traced programs.

    sample, push, rows: FLOPs f, J, r.
    head: FLOPs of the head for one change.
    values, layer: numbers made in reading one probe sequence, and within one layer of it.
    read: numbers made in reading a sample.
    trained, body: trained numbers, and those in the features' role.
    """

    sample: int
    push: int
    rows: int
    head: int
    values: int
    layer: int
    read: int
    trained: int
    body: int


def estimates(way: Way, given: Given, memory_gib: float) -> dict[str, Estimate]:
    """Return the Estimate of each form; `gram` only where features move at all."""
    s = _sizes(way, given)
    count, width = given.sequences.positions.shape
    rows, terms = jax.tree.leaves(given.batch)[0].shape[0], len(way.names)
    moving = len({group for own in way.members.used for group in own})
    item = max(4, *(leaf.dtype.itemsize for leaf in jax.tree.leaves(given.params)))
    tokens = given.targets.shape[0]
    output = (1 + len(way.members.names)) * 2 * tokens * terms * rows
    # a gradient and its change; logits of the probe tokens
    change = 2 * s.trained + tokens * way.policy.vocab_size
    fixed, each = output + count * s.values, s.read + terms * (change + count * s.layer)
    chunk = _fitting(memory_gib * GIB / item - fixed, each, min(rows, MOST["push"]))
    work = float(rows * (s.sample + terms * s.head + terms * moving * s.push))
    found = {
        "push": Estimate(
            *("push", chunk, count),
            flops=work,
            time=work,
            bytes=int(item * (fixed + chunk * each)),
        )
    }
    if s.body:
        sequence, each = 2 * width * s.body, s.read + terms * change
        fixed = output + s.values + 2 * width * s.layer
        room = memory_gib * GIB / item - fixed
        block = _fitting(room / 2, sequence, count)
        chunk = _fitting(room - block * sequence, each, min(rows, MOST["gram"]))
        blocks = -(-count // block)
        slots = tokens if blocks == 1 else blocks * block * width
        work = rows * (blocks * s.sample + terms * s.head) + 4 * slots * s.body * rows * terms
        found["gram"] = Estimate(
            *("gram", chunk, block),
            flops=float(work + count * s.rows),
            time=float(work + count * s.rows * SLOWER),
            bytes=int(item * (fixed + block * sequence + chunk * each)),
        )
    return found


def choose(found: dict[str, Estimate], form: str, memory_gib: float) -> Estimate:
    """Return the estimate of the form to take; push where the features do not move."""
    if form != "auto" and form in found:
        return found[form]
    fitting = [one for one in found.values() if one.bytes <= memory_gib * GIB]
    if fitting:
        return min(fitting, key=lambda one: one.time)
    return min(found.values(), key=lambda one: one.bytes)


def _fitting(room: float, each: int, most: int) -> int:
    return int(max(1, min(most, room // each)))


def _sizes(way: Way, given: Given) -> Sizes:
    network, (_, width) = as_network(way.policy), given.sequences.positions.shape
    chosen, rest = trees.partition(given.params, way.trained)
    body, _ = trees.partition(chosen, way.members.body)
    batch, tokens, mask = map(_first, (given.batch, given.sequences.tokens, given.sequences.mask))

    def read(chosen: Params, rest: Params, tokens: Array, mask: Array) -> Array:
        return network.read(trees.merge(chosen, rest), tokens, mask)

    def push(chosen: Params, change: Params, *fixed: Any) -> Array:
        return jax.jvp(lambda c: read(c, *fixed), (chosen,), (change,))[1]

    def rows(chosen: Params, rest: Params, *sequence: Array) -> list[Array]:
        return parts.gradients(network, way.members, chosen, rest, sequence)

    def terms(chosen: Params, rest: Params, batch: Any, beside: Any) -> Any:
        return way.terms(trees.merge(chosen, rest), batch, beside)

    def sample(chosen: Params, rest: Params, batch: Any, beside: Any) -> Params:
        own = given._replace(params=trees.merge(chosen, rest), beside=beside)
        return accounts.pulled(way, own, batch)[0]

    def change(grads: Params, state: Any, params: Params) -> Params:
        return held.applied(way.optimizer, grads, state, params).push(grads)

    reading = trace(read, chosen, rest, tokens, mask)
    forward, (values, layer) = flops(reading), value_counts(reading)
    step = chosen, given.opt_state, chosen
    changing = flops(trace(change, *step)) - flops(trace(way.optimizer.update, *step))
    kind = jax.tree.leaves(chosen)[0].dtype
    positions = jax.ShapeDtypeStruct((1, width), int)
    pull = jax.ShapeDtypeStruct((1, width, 2, way.policy.feature_size), kind)
    trained, moving = (sum(v.size for v in jax.tree.leaves(tree)) for tree in (chosen, body))
    head = way.policy.vocab_size * way.policy.feature_size * given.targets.shape[0]
    sequences = given.contexts.mask.shape[0]
    return Sizes(
        sample=flops(trace(sample, chosen, rest, batch, given.beside)) + len(way.names) * changing,
        push=sequences * (flops(trace(push, chosen, chosen, rest, tokens, mask)) - forward),
        rows=flops(trace(rows, chosen, rest, tokens, mask, positions, pull)) if moving else 0,
        head=2 * head * (way.policy.head_weight in trees.names(chosen)),
        values=values,
        layer=layer,
        read=value_counts(trace(terms, chosen, rest, batch, given.beside))[0],
        trained=trained,
        body=moving,
    )


def _first(tree: Any) -> Any:
    """Return the shapes of one row."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype), tree)
