"""Cost estimates of the algorithms for Γ, and the choice between them.

With F the FLOPs of one forward pass over a sequence, P the parameters that features depend on, A
and B directions of the two sides, S their sequences, t and f a tapped product's positions and
outputs:

    jvp_vjp     B (2 F + 2 F S_o)                        chunk (P + S_o layer)
    jacobian    (A + B blocks) 2 F + 2 A B P             2 chunk (P + layer)
    layerwise   (A + B) F + Σ 2 f (A B t + S_u A t²)     2 chunk (Σ t f + max t f)

A "layer" is all values computed within one; the second factor 2 is 1 where a symmetric Γ is
computed in a single block. The cheapest algorithm whose smallest chunk fits the budget is chosen.
FLOPs are those of matrix products; memory agrees with the compiler's count within a factor of
three (tested).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import jax

from ntkrl.jaxpr import flops, value_counts
from ntkrl.ntk import gradients
from ntkrl.ntk.body import Body
from ntkrl.ntk.directions import Directions
from ntkrl.ntk.layers import layers, plan_for
from ntkrl.ntk.taps import Plan
from ntkrl.numerics import GIB
from ntkrl.types import Array, Params

ALGORITHMS = ("jvp_vjp", "jacobian", "layerwise")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted cost of a computation by one algorithm.

    algorithm: its name.
    chunk: directions or samples computed at a time.
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
            f"{self.algorithm}, {self.chunk} directions at a time: {self.flops:.2e} FLOPs, "
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


class Sizes(NamedTuple):
    """Counts read off the traced features of one sequence.

    forward: FLOPs.
    params: parameters that features depend on.
    params_plain: those of them that are not tapped, of one layer where stacked.
    values: numbers made on the way.
    layer: numbers made within one layer, or all of them without a scan.
    taps: `(t, f, times)` of every tapped product.
    """

    forward: int
    params: int
    params_plain: int
    values: int
    layer: int
    taps: tuple[tuple[int, int, int], ...]

    @property
    def tapped(self) -> int:
        """Numbers held per direction: all δ, and the one that is being contracted."""
        held = [t * f for t, f, _ in self.taps]
        return sum(held) + max(held, default=0)


def sizes(plan: Plan, leaves: list[Array]) -> Sizes:
    """Read the counts off a plan."""
    program, plain = plan.program, sum(leaves[leaf].size for leaf in plan.plain)
    for scan in plan.scans.values():
        plain += sum(leaves[leaf].size // leaves[leaf].shape[0] for leaf in scan.inner.plain)
    values, layer = value_counts(program)
    found = _tapped(plan, 1)
    for index, scan in plan.scans.items():
        found += _tapped(scan.inner, program.operations[index].eqn.params["length"])
    size = sum(leaf.size for leaf in leaves)
    return Sizes(flops(program), size, plain, values, layer, tuple(found))


def _tapped(plan: Plan, times: int) -> list[tuple[int, int, int]]:
    found = []
    for index, tap in plan.taps.items():
        step = plan.program.operations[index]
        result = plan.program.avals[step.outputs[0]]
        if tap.kind == "gather":
            width = result.shape[-1]
        else:
            contracted = step.eqn.params["dimension_numbers"][0][tap.operand]
            shape = step.eqn.invars[tap.operand].aval.shape
            width = math.prod(n for axis, n in enumerate(shape) if axis not in contracted)
        found.append((result.size // width, width, times))
    return found


def estimates(
    body: Body,
    params: Params,
    observed: Directions,
    updated: Directions | None,
    weights: tuple[Array, ...] | None,
    budget: int,
    chunk: int | None,
) -> dict[str, Estimate]:
    """Return the Estimate of every algorithm that can be taken.

    Args:
      body, params, observed, updated, weights: as for `gram`.
      budget: bytes that the working memory should stay below.
      chunk: directions at a time; None for as many as the budget allows.
    """
    leaves = body.leaves(params)
    plan = plan_for(body, params, observed, weights)
    s = sizes(plan, leaves)
    other = observed if updated is None else updated
    alike = updated is None or plan.signature() == plan_for(body, params, other, None).signature()
    a, b = (side.sequences * side.per_sequence for side in (observed, other))
    item = max(leaf.dtype.itemsize for leaf in leaves)
    output = a * b * max(item, 4)
    per_side = {
        "jvp_vjp": s.params + observed.sequences * s.layer,
        "jacobian": s.params + s.layer,
        "layerwise": s.tapped + s.params_plain,
    }
    fixed = {
        "jvp_vjp": (observed.sequences + 1) * s.values // 2,
        "jacobian": (observed.sequences + other.sequences) * s.values,
        "layerwise": (observed.sequences + other.sequences) * s.layer,
    }
    mixing = sum(2 * t * t * f * n for t, f, n in s.taps) * a * other.sequences
    inner = sum(2 * t * f * n for t, f, n in s.taps) * a * b
    found = {}
    for algorithm in ALGORITHMS:
        if algorithm == "layerwise" and not (alike and _layered(weights, leaves)):
            continue
        left = (budget - output - item * fixed[algorithm]) // item
        one_block = updated is None and a * per_side[algorithm] <= left
        sides = 1 if one_block or algorithm == "jvp_vjp" else 2
        most = max(1, min(max(a, b), left // max(1, sides * per_side[algorithm])))
        size = most if chunk is None else min(chunk, max(a, b))
        if size < a and algorithm != "jvp_vjp":
            sides = 2
        blocks = -(-a // size)
        work = {
            "jvp_vjp": b * 2 * s.forward * (1 + observed.sequences),
            "jacobian": (a + b * blocks) * 2 * s.forward + 2 * a * b * s.params,
            "layerwise": (a * -(-b // size) + b * blocks) * s.forward + mixing + inner,
        }[algorithm]
        halved = work / 2 if updated is None and algorithm != "jvp_vjp" else work
        memory = output + item * (fixed[algorithm] + size * sides * per_side[algorithm])
        found[algorithm] = Estimate(algorithm, int(size), float(halved), int(memory), int(output))
    return found


def choose(found: dict[str, Estimate], algorithm: str, budget: int) -> Estimate:
    """Return the estimate of the algorithm to take.

    Raises:
      ValueError: a algorithm was asked for that cannot be taken.
    """
    if algorithm != "auto":
        if algorithm not in found:
            raise ValueError(
                f"algorithm {algorithm!r} cannot be taken with weights that differ within a "
                f"matrix (a preconditioner); take {' or '.join(map(repr, found))}, or 'auto'."
            )
        return found[algorithm]
    return cheapest(found.values(), budget)


def _layered(weights: tuple[Array, ...] | None, leaves: list[Array]) -> bool:
    """Whether weights are one number per leaf or layer, for every leaf that could be tapped."""
    return weights is None or all(
        weight.size in (1, leaf.shape[0]) or leaf.ndim < 2
        for weight, leaf in zip(weights, leaves, strict=True)
        if leaf.ndim
    )


@functools.partial(jax.jit, static_argnames=("body", "algorithm", "chunk", "forward_mode"))
def gram(
    body: Body,
    params: Params,
    observed: Directions,
    updated: Directions | None,
    weights: Any,
    algorithm: str,
    chunk: int,
    forward_mode: bool,
) -> Array:
    """Return Γ `[S_o·A_o, S_u·A_u]` by the given algorithm; `updated` None for a symmetric one."""
    if algorithm == "jvp_vjp":
        arguments = (body, params, observed, updated, weights, chunk, forward_mode)
        return gradients.products(*arguments)
    if algorithm == "jacobian":
        return gradients.jacobians(body, params, observed, updated, weights, chunk)
    return layers(body, params, observed, updated, weights, chunk)
