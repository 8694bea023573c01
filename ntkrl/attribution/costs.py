"""Estimated cost of each algorithm of the samples' contributions.

With f the FLOPs of a sample's gradients and changes, J those of one JVP over the probe set, r those
of the gradients of one probe sequence's P tokens, θ the trained parameters in the features' role, B
samples, T terms, G groups that hold some of θ, S probe sequences in n blocks:

    jvp    B f + B T G J
    vjp    n B f + S r + B T 2 (2 S P) θ, with O in place of S P where n = 1

and 2 B T O V D more in both for a trained head. The other columns are T + 3 JVPs by group, three by
sample. f, J and r are counted in the traced programs, matrix products alone; memory is an upper
bound.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from ntkrl import ntk, trees
from ntkrl.attribution import decomposition, linear_maps, optimizer_maps
from ntkrl.attribution.decomposition import AttributionInputs, AttributionSpec, OptimizerStep
from ntkrl.jaxpr import flops, trace, value_counts
from ntkrl.numerics import GIB
from ntkrl.types import Array, Params

ALGORITHMS = ("jvp", "vjp")
MAX_CHUNK = {"jvp": 8, "vjp": 32}
"""Samples at a time: more are no faster, and fill caches (measured on two CPU cores)."""
TOKEN_GRADIENT_SLOWDOWN = 6
"""Time per FLOP of single tokens' gradients over that of other products (measured there too)."""


@dataclasses.dataclass(frozen=True)
class LedgerEstimate(ntk.Estimate):
    """The cost of "jvp" or "vjp", for `chunk` samples at a time.

    block: probe sequences whose gradients are written out at a time (vjp).
    token_flops: FLOPs of single tokens' gradients.
    """

    block: int
    token_flops: float

    @property
    def time(self) -> float:
        """The FLOPs, those of single tokens' gradients weighted by TOKEN_GRADIENT_SLOWDOWN."""
        return self.flops + self.token_flops * (TOKEN_GRADIENT_SLOWDOWN - 1)


class _Counts(NamedTuple):
    """Counts of the traced programs.

    sample, jvp, tokens: FLOPs f, J, r. head: FLOPs of the head for one change.
    values, layer: values computed for one probe sequence, and within one layer of it.
    sample_values: values computed for a sample.
    """

    sample: int
    jvp: int
    tokens: int
    head: int
    values: int
    layer: int
    sample_values: int


def estimates(
    spec: AttributionSpec, inputs: AttributionInputs, memory_gib: float
) -> dict[str, LedgerEstimate]:
    """Return the estimate of each algorithm; "vjp" only where features move at all."""
    params = inputs.step.before.params
    trained, _ = trees.partition(params, spec.trained)
    body, _ = trees.partition(trained, spec.groups.body)
    trained_size, body_size = (sum(v.size for v in jax.tree.leaves(t)) for t in (trained, body))
    n = _counts(spec, inputs, body_size > 0)
    count, width = inputs.sequences.positions.shape
    rows, terms = jax.tree.leaves(inputs.step.batch)[0].shape[0], len(spec.names)
    item = max(4, *(leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))
    numbers, tokens = memory_gib * GIB / item, inputs.targets.shape[0]
    output = (1 + len(spec.groups.names)) * 2 * tokens * terms * rows
    # a gradient and its change; logits of the probe tokens
    change = 2 * trained_size + tokens * spec.policy.vocab_size

    def fitting(budget: float, each: int, most: int) -> int:
        return int(max(1, min(most, budget // each)))

    def estimate(algorithm: str, chunk: int, block: int, work: int, memory: int) -> LedgerEstimate:
        token_flops = float(count * n.tokens) if algorithm == "vjp" else 0.0
        return LedgerEstimate(
            *(algorithm, chunk, work + token_flops, int(item * memory), item * output),
            *(block, token_flops),
        )

    fixed, each = output + count * n.values, n.sample_values + terms * (change + count * n.layer)
    chunk = fitting(numbers - fixed, each, min(rows, MAX_CHUNK["jvp"]))
    work = rows * (n.sample + terms * n.head + terms * len(spec.groups.moving) * n.jvp)
    by_algorithm = {"jvp": estimate("jvp", chunk, count, work, fixed + chunk * each)}
    if body_size:
        sequence, each = 2 * width * body_size, n.sample_values + terms * change
        fixed = output + n.values + 2 * width * n.layer
        block = fitting((numbers - fixed) / 2, sequence, count)
        chunk = fitting(numbers - fixed - block * sequence, each, min(rows, MAX_CHUNK["vjp"]))
        blocks = -(-count // block)
        slots = tokens if blocks == 1 else blocks * block * width
        work = rows * (blocks * n.sample + terms * n.head) + 4 * slots * body_size * rows * terms
        memory = fixed + block * sequence + chunk * each
        by_algorithm["vjp"] = estimate("vjp", chunk, block, work, memory)
    return by_algorithm


def _counts(spec: AttributionSpec, inputs: AttributionInputs, has_body: bool) -> _Counts:
    network, sequences, step = ntk.as_network(spec.policy), inputs.sequences, inputs.step
    trained, frozen = trees.partition(step.before.params, spec.trained)

    def row(tree: Any) -> Any:
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype), tree)

    def features(trained: Params, frozen: Params, tokens: Array, mask: Array) -> Array:
        return network.read(trees.merge(trained, frozen), tokens, mask)

    def features_jvp(trained: Params, change: Params, *fixed: Any) -> Array:
        return jax.jvp(lambda leaves: features(leaves, *fixed), (trained,), (change,))[1]

    def token_gradients(trained: Params, frozen: Params, sequence: Any) -> list[Array]:
        return linear_maps.probe_gradients(network, spec.groups, trained, frozen, sequence)

    def sample_gradients(params: Params, batch: Any, reference: Any) -> Params:
        before = dataclasses.replace(step.before, params=params)
        sample = OptimizerStep(before, params, batch, reference)
        return decomposition.term_gradients(spec, sample, batch)[0]

    def change(grads: Params, state: Any, params: Params) -> Params:
        update = optimizer_maps.linearize_update(spec.optimizer, grads, state, params)
        return update.from_gradient(grads)

    batch, tokens, mask = row(step.batch), row(sequences.tokens), row(sequences.mask)
    forward = trace(features, trained, frozen, tokens, mask)
    jvp = trace(features_jvp, trained, trained, frozen, tokens, mask)
    arguments = step.before.params, batch, step.reference
    sample, terms = trace(sample_gradients, *arguments), trace(spec.terms, *arguments)
    update = trained, step.before.opt_state, trained
    changes = flops(trace(change, *update)) - flops(trace(spec.optimizer.update, *update))
    values, layer = value_counts(forward)
    token_flops, width = 0, spec.policy.feature_size
    if has_body:
        dtype, shape = jax.tree.leaves(trained)[0].dtype, (1, sequences.positions.shape[1])
        positions = jax.ShapeDtypeStruct(shape, int)
        cotangents = jax.ShapeDtypeStruct((*shape, 2, width), dtype)
        sequence = tokens, mask, positions, cotangents
        token_flops = flops(trace(token_gradients, trained, frozen, sequence))
    head = 2 * spec.policy.vocab_size * width * inputs.targets.shape[0]
    return _Counts(
        sample=flops(sample) + len(spec.names) * changes,
        jvp=inputs.contexts.tokens.shape[0] * (flops(jvp) - flops(forward)),
        tokens=token_flops,
        head=head * (spec.policy.head_weight in trees.names(trained)),
        values=values,
        layer=layer,
        sample_values=value_counts(terms)[0],
    )
