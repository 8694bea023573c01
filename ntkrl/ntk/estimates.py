"""Cost estimates of the algorithms for Γ, and the choice between them.

With F the FLOPs of one forward pass over a sequence, P the parameters that features depend on, A
and B cotangents of the two sides, S their sequences, t and f a tapped product's positions and
outputs:

    jvp_vjp     B (2 F + 2 F S_o)                        chunk (P + S_o layer)
    jacobian    (A + B blocks) 2 F + 2 A B P             2 chunk (P + layer)
    layerwise   (A + B) F + Σ 2 f (A B t + S_u A t²)     2 chunk (Σ t f + max t f)
    traces      (A + B) F + Σ 2 f D (O t) (U t)          2 chunk (Σ t f + max t f)

A "layer" is all values computed within one; the second factor 2 is 1 where a symmetric Γ is
computed in a single block, of which S (S + 1)/2 pairs of sequences are contracted; of n blocks
n (n + 1)/2 pairs are. The cheapest algorithm whose smallest chunk fits the budget is chosen.
FLOPs are those of matrix products; memory agrees with the compiler's count within a factor of
three (tested).
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from ntkrl.jaxpr import flops, value_counts
from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.jacobian_gram import GramInputs
from ntkrl.ntk.network import FeatureFunction, Leaves
from ntkrl.ntk.parts import Weights
from ntkrl.ntk.taps import TapPlan, plan_taps
from ntkrl.numerics import GIB
from ntkrl.types import Params

WORKING_FRACTION = 0.25
"""Fraction of the memory for cotangents of a tied table's lookup that go backward together."""

ALGORITHMS = ("jvp_vjp", "jacobian", "layerwise")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted cost of a computation by one algorithm.

    algorithm: its name.
    chunk: cotangents or samples computed at a time.
    flops: FLOPs of matrix products.
    bytes: working memory beyond the params, results included, of all devices together.
    output_bytes: memory of the result.
    """

    algorithm: str
    chunk: int
    flops: float
    bytes: int
    output_bytes: int

    @property
    def time(self) -> float:
        """Relative run time, by which algorithms are compared: the FLOPs."""
        return self.flops

    def __str__(self) -> str:
        return (
            f"{self.algorithm}, {self.chunk} cotangents at a time: {self.flops:.2e} FLOPs, "
            f"{self.bytes / GIB:.3g} GiB ({self.output_bytes / GIB:.3g} GiB of it the result)"
        )


AnyEstimate = TypeVar("AnyEstimate", bound=Estimate)


def cheapest(estimates: Iterable[AnyEstimate], budget: float) -> AnyEstimate:
    """Return the fastest estimate within the budget of bytes; the smallest where none fits."""
    candidates = list(estimates)
    fitting = [estimate for estimate in candidates if estimate.bytes <= budget]
    if fitting:
        return min(fitting, key=lambda estimate: estimate.time)
    return min(candidates, key=lambda estimate: estimate.bytes)


class _NetworkCounts(NamedTuple):
    """Counts from the traced features of one sequence.

    forward: FLOPs.
    params: parameters that features depend on.
    direct: those of them that are not tapped, of a single layer where stacked.
    values: numbers computed on the way.
    layer: numbers computed within one layer, or all of them without a scan.
    taps: `(t, f, times)` of every tapped product.
    """

    forward: int
    params: int
    direct: int
    values: int
    layer: int
    taps: list[tuple[int, int, int]]

    @property
    def tapped(self) -> int:
        """Numbers in memory per cotangent: all δ, and the one that is being contracted."""
        sizes = [t * f for t, f, _ in self.taps]
        return sum(sizes) + max(sizes, default=0)


def _counts(plan: TapPlan, leaves: Leaves) -> _NetworkCounts:
    direct = sum(leaves[leaf].size for leaf in plan.direct)
    taps = _tap_sizes(plan, 1)
    for index, scan in plan.scans.items():
        direct += sum(leaves[leaf].size // leaves[leaf].shape[0] for leaf in scan.inner.direct)
        taps += _tap_sizes(scan.inner, plan.traced.operations[index].eqn.params["length"])
    params = sum(leaf.size for leaf in leaves)
    return _NetworkCounts(flops(plan.traced), params, direct, *value_counts(plan.traced), taps)


def _tap_sizes(plan: TapPlan, times: int) -> list[tuple[int, int, int]]:
    sizes = []
    for index, tap in plan.taps.items():
        operation = plan.traced.operations[index]
        result = plan.traced.avals[operation.outputs[0]]
        if tap.kind == "gather":
            width = result.shape[-1]
        else:
            contracted = operation.eqn.params["dimension_numbers"][0][tap.operand]
            shape = operation.operand_shape(tap.operand)
            width = math.prod(n for axis, n in enumerate(shape) if axis not in contracted)
        sizes.append((result.size // width, width, times))
    return sizes


def estimate_algorithms(
    features: FeatureFunction, inputs: GramInputs, budget: int, chunk: int | None
) -> dict[str, Estimate]:
    """Return the Estimate of every algorithm that applies.

    Args:
      features: the features as a function of the used leaves.
      inputs: the Γ to compute.
      budget: bytes that the working memory should stay below.
      chunk: cotangents at a time; None for as many as the budget allows.
    """
    leaves, symmetric = features.leaves(inputs.params), inputs.updated is None
    observed, updated, weights = inputs.observed, inputs.columns, inputs.weights
    plan = plan_taps(features, inputs.params, observed, weights)
    counts = _counts(plan, leaves)
    layerwise = _uniform_within_layers(weights, leaves)
    if not symmetric:
        other = plan_taps(features, inputs.params, updated, None)
        layerwise = layerwise and plan.signature() == other.signature()
    a, b = (side.sequences * side.per_sequence for side in (observed, updated))
    item = max(leaf.dtype.itemsize for leaf in leaves)
    output = a * b * max(item, 4)
    per_cotangent = {
        "jvp_vjp": counts.params + observed.sequences * counts.layer,
        "jacobian": counts.params + counts.layer,
        "layerwise": counts.tapped + counts.direct,
    }
    fixed = {
        "jvp_vjp": (observed.sequences + 1) * counts.values // 2,
        "jacobian": (observed.sequences + updated.sequences) * counts.values,
        "layerwise": (observed.sequences + updated.sequences) * counts.layer,
    }
    mixing = sum(2 * t * t * f * n for t, f, n in counts.taps) * a * updated.sequences
    inner = sum(2 * t * f * n for t, f, n in counts.taps) * a * b
    estimates = {}
    for name in ALGORITHMS:
        if name == "layerwise" and not layerwise:
            continue
        available = (budget - output - item * fixed[name]) // item
        single_block = symmetric and a * per_cotangent[name] <= available
        sides = 1 if single_block or name == "jvp_vjp" else 2
        largest = max(1, min(max(a, b), available // max(1, sides * per_cotangent[name])))
        size = largest if chunk is None else min(chunk, max(a, b))
        if size < a and name != "jvp_vjp":
            sides = 2
        work = _work(name, counts, inputs, size, mixing + inner)
        memory = output + item * (fixed[name] + size * sides * per_cotangent[name])
        estimates[name] = Estimate(name, int(size), float(work), int(memory), int(output))
    return estimates


def _work(
    name: str, counts: _NetworkCounts, inputs: GramInputs, size: int, contraction: int
) -> float:
    """Return the FLOPs of an algorithm in blocks of `size` cotangents.

    Args:
      name: the algorithm.
      counts: of the network.
      inputs: the Γ to compute.
      size: cotangents at a time.
      contraction: FLOPs of the layer-wise contraction of all pairs of cotangents.
    """
    observed, updated, forward = inputs.observed, inputs.columns, counts.forward
    a, b = (side.sequences * side.per_sequence for side in (observed, updated))
    if name == "jvp_vjp":
        return b * 2 * forward * (1 + observed.sequences)
    blocks, symmetric = -(-a // size), inputs.updated is None
    if symmetric and blocks == 1:
        pairs = (observed.sequences + 1) / (2 * observed.sequences)
        gradients = a * 2 * forward + 2 * a * b * counts.params
        return gradients if name == "jacobian" else a * forward + contraction * pairs
    if name == "jacobian":
        work = (a + b * blocks) * 2 * forward + 2 * a * b * counts.params
    else:
        work = (a * -(-b // size) + b * blocks) * forward + contraction
    return work * (blocks + 1) / (2 * blocks) if symmetric else work


def estimate_traces(
    features: FeatureFunction, params: Params, observed: Contexts, updated: Contexts, budget: int
) -> Estimate:
    """Return the Estimate of `traces.leaf_traces`.

    Args:
      features: the features as a function of the used leaves.
      params: the params.
      observed, updated: the contexts, the same object for a symmetric kernel.
      budget: bytes that the working memory should stay below.
    """
    leaves = features.leaves(params)
    counts = _counts(plan_taps(features, params, observed, None), leaves)
    width, symmetric = features.network.weight(params).shape[1], updated is observed
    contexts = observed.count if symmetric else observed.count + updated.count
    size = max(4, leaves[0].dtype.itemsize)
    per_cotangent = 2 * size * (counts.tapped + counts.direct)
    fixed = size * contexts * counts.layer
    chunk = max(1, min(contexts * width, (budget - fixed) // per_cotangent))
    positions = sum(2 * t * t * f * n for t, f, n in counts.taps)
    work = contexts * width * counts.forward
    work += positions * width * observed.count * updated.count
    return Estimate("traces", int(chunk), float(work), int(fixed + chunk * per_cotangent), 0)


def estimate_lookup(
    features: FeatureFunction, params: Params, contexts: Contexts, cotangents: int, budget: int
) -> Estimate:
    """Return the Estimate of `tied.lookup_products`, one backward pass per cotangent.

    Args:
      features: the features as a function of the tied table alone.
      params: the params.
      contexts: the updated contexts.
      cotangents: of each context.
      budget: bytes that the working memory should stay below.
    """
    plan = plan_taps(features, params, contexts, None)
    _, layer = value_counts(plan.traced)
    chunk = max(1, min(cotangents, int(WORKING_FRACTION * budget) // (4 * layer)))
    work = contexts.count * (1 + cotangents) * flops(plan.traced)
    return Estimate("lookup", chunk, float(work), 4 * layer * chunk, 0)


def choose(estimates: dict[str, Estimate], algorithm: str, budget: int) -> Estimate:
    """Return the estimate of an algorithm, or of the cheapest for "auto".

    Raises:
      ValueError: an algorithm that does not apply.
    """
    if algorithm == "auto":
        return cheapest(estimates.values(), budget)
    if algorithm not in estimates:
        raise ValueError(
            f"algorithm {algorithm!r} cannot be used with weights that differ within a matrix "
            f"(a preconditioner); use {' or '.join(map(repr, estimates))}, or 'auto'."
        )
    return estimates[algorithm]


def _uniform_within_layers(weights: Weights, leaves: Leaves) -> bool:
    """Test for a single weight per leaf or layer, in every leaf that could be tapped."""
    return weights is None or all(
        weight.size in (1, leaf.shape[0]) or leaf.ndim < 2
        for weight, leaf in zip(weights, leaves, strict=True)
        if leaf.ndim
    )
