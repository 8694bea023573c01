"""Estimated cost of each form of the samples' contributions, and the choice between them.

With f the FLOPs of a sample's gradients and changes, J those of one JVP over the probe set, r those
of the gradients of one probe sequence's P tokens, θ the trained parameters in the features' role, B
samples, T terms, G groups that hold some of θ, S probe sequences in n blocks:

    jvp    B f + B T G J
    vjp    n B f + S r + B T 2 (2 S P) θ, with O in place of S P where n = 1

and 2 B T O V D more in both for a trained head. The other columns are T + 3 JVPs by group, three by
sample. f, J and r are counted in the traced programs, matrix products alone; memory is an upper
bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from ntkrl import trees
from ntkrl.attribution import decomposition, linear_maps
from ntkrl.attribution.decomposition import AttributionInputs, AttributionSpec, OptimizerStep
from ntkrl.jaxpr import Program, flatten, flops, trace
from ntkrl.ntk.network import as_network
from ntkrl.types import Array, Params

FORMS = ("jvp", "vjp")
GIB = 2**30
MAX_CHUNK = {"jvp": 8, "vjp": 32}
"""Samples at a time: more are no faster, and fill caches (measured on two CPU cores)."""
TOKEN_GRADIENT_SLOWDOWN = 6
"""Time per FLOP of single tokens' gradients over that of other products (measured there too)."""


class Estimate(NamedTuple):
    """The cost of a form.

    form: "jvp" or "vjp".
    chunk: samples at a time.
    block: probe sequences whose gradients are written out at a time (vjp).
    flops: of matrix products.
    time: the flops, weighted by their relative time; forms are chosen by it.
    bytes: working memory beyond params and state.
    """

    form: str
    chunk: int
    block: int
    flops: float
    time: float
    bytes: int


class _Counts(NamedTuple):
    """Counts of the traced programs.

    sample, jvp, rows: FLOPs f, J, r. head: FLOPs of the head for one change.
    values, layer: values computed for one probe sequence, and within one layer of it.
    sample_values: values computed for a sample.
    """

    sample: int
    jvp: int
    rows: int
    head: int
    values: int
    layer: int
    sample_values: int


def estimates(
    spec: AttributionSpec, inputs: AttributionInputs, memory_gib: float
) -> dict[str, Estimate]:
    """Return the Estimate of each form; "vjp" only where features move at all."""
    trained, _ = trees.partition(inputs.step.before.params, spec.trained)
    body, _ = trees.partition(trained, spec.groups.body)
    trained_size, body_size = map(_size, (trained, body))
    s = _counts(spec, inputs, trained, body_size > 0)
    count, width = inputs.sequences.positions.shape
    rows, terms = jax.tree.leaves(inputs.step.batch)[0].shape[0], len(spec.names)
    item = max(4, *(leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs.step.before.params)))
    tokens = inputs.targets.shape[0]
    output = (1 + len(spec.groups.names)) * 2 * tokens * terms * rows
    # a gradient and its change; logits of the probe tokens
    change = 2 * trained_size + tokens * spec.policy.vocab_size
    fixed, each = output + count * s.values, s.sample_values + terms * (change + count * s.layer)
    chunk = _fitting(memory_gib * GIB / item - fixed, each, min(rows, MAX_CHUNK["jvp"]))
    work = float(rows * (s.sample + terms * s.head + terms * len(spec.groups.moving) * s.jvp))
    memory = int(item * (fixed + chunk * each))
    by_form = {"jvp": Estimate("jvp", chunk, count, flops=work, time=work, bytes=memory)}
    if body_size:
        sequence, each = 2 * width * body_size, s.sample_values + terms * change
        fixed = output + s.values + 2 * width * s.layer
        budget = memory_gib * GIB / item - fixed
        block = _fitting(budget / 2, sequence, count)
        chunk = _fitting(budget - block * sequence, each, min(rows, MAX_CHUNK["vjp"]))
        blocks = -(-count // block)
        slots = tokens if blocks == 1 else blocks * block * width
        work = rows * (blocks * s.sample + terms * s.head) + 4 * slots * body_size * rows * terms
        by_form["vjp"] = Estimate(
            *("vjp", chunk, block),
            flops=float(work + count * s.rows),
            time=float(work + count * s.rows * TOKEN_GRADIENT_SLOWDOWN),
            bytes=int(item * (fixed + block * sequence + chunk * each)),
        )
    return by_form


def choose(by_form: dict[str, Estimate], form: str, memory_gib: float) -> Estimate:
    """Return the estimate of `form`; for "auto" or an absent one that of the fastest that fits."""
    if form != "auto" and form in by_form:
        return by_form[form]
    fitting = [estimate for estimate in by_form.values() if estimate.bytes <= memory_gib * GIB]
    if fitting:
        return min(fitting, key=lambda estimate: estimate.time)
    return min(by_form.values(), key=lambda estimate: estimate.bytes)


def _fitting(budget: float, each: int, most: int) -> int:
    return int(max(1, min(most, budget // each)))


def _size(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _counts(
    spec: AttributionSpec, inputs: AttributionInputs, trained: Params, has_body: bool
) -> _Counts:
    network, sequences, step = as_network(spec.policy), inputs.sequences, inputs.step
    _, frozen = trees.partition(step.before.params, spec.trained)
    batch, tokens, mask = map(_first_row, (step.batch, sequences.tokens, sequences.mask))

    def features(trained: Params, frozen: Params, tokens: Array, mask: Array) -> Array:
        return network.read(trees.merge(trained, frozen), tokens, mask)

    def features_jvp(trained: Params, change: Params, *fixed: Any) -> Array:
        return jax.jvp(lambda leaves: features(leaves, *fixed), (trained,), (change,))[1]

    def token_gradients(trained: Params, frozen: Params, *sequence: Array) -> list[Array]:
        return linear_maps.probe_gradients(network, spec.groups, trained, frozen, sequence)

    def terms(trained: Params, frozen: Params, batch: Any, reference: Any) -> Any:
        return spec.terms(trees.merge(trained, frozen), batch, reference)

    def gradients(params: Params, batch: Any, reference: Any) -> Params:
        before = step.before.replace(params=params)
        return decomposition.term_gradients(
            spec, OptimizerStep(before, None, None, reference), batch
        )[0]

    def change(grads: Params, state: Any, params: Params) -> Params:
        return linear_maps.linearize_update(spec.optimizer, grads, state, params).from_gradient(
            grads
        )

    traced = trace(features, trained, frozen, tokens, mask)
    values, layer = _made(traced)
    update = trained, step.before.opt_state, trained
    change_flops = flops(trace(change, *update)) - flops(trace(spec.optimizer.update, *update))
    jvp_flops = flops(trace(features_jvp, trained, trained, frozen, tokens, mask)) - flops(traced)
    sample_flops = flops(trace(gradients, step.before.params, batch, step.reference))
    token_flops = 0
    if has_body:
        dtype, width = jax.tree.leaves(trained)[0].dtype, sequences.positions.shape[1]
        positions = jax.ShapeDtypeStruct((1, width), int)
        cotangents = jax.ShapeDtypeStruct((1, width, 2, spec.policy.feature_size), dtype)
        sequence = tokens, mask, positions, cotangents
        token_flops = flops(trace(token_gradients, trained, frozen, *sequence))
    head = 2 * spec.policy.vocab_size * spec.policy.feature_size * inputs.targets.shape[0]
    return _Counts(
        sample=sample_flops + len(spec.names) * change_flops,
        jvp=inputs.contexts.mask.shape[0] * jvp_flops,
        rows=token_flops,
        head=head * (spec.policy.head_weight in trees.names(trained)),
        values=values,
        layer=layer,
        sample_values=_made(trace(terms, trained, frozen, batch, step.reference))[0],
    )


def _first_row(tree: Any) -> Any:
    """Return the shapes of one row."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype), tree)


def _made(program: Program) -> tuple[int, int]:
    """Count the numbers that steps make, and those within one turn of the largest scan."""
    total, inside = 0, 0
    for step in program.steps:
        total += sum(program.avals[slot].size for slot in step.outputs)
        if step.eqn.primitive.name == "scan":
            turn, _ = _made(flatten(step.eqn.params["jaxpr"]))
            total, inside = total + turn * step.eqn.params["length"], max(inside, turn)
    return total, inside if inside else total
