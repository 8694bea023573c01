"""Which road to take to Γ: estimated work and memory of each, and the choice between them.

With F the FLOPs of one forward pass over a sequence, P the parameters that features depend on, A
and B directions of the two sides, S their sequences, t and f a tapped product's positions and
outputs:

    products    B (2 F + 2 F S_o)                        chunk (P + S_o layer)
    jacobians   (A + B blocks) 2 F + 2 A B P             2 chunk (P + layer)
    layers      (A + B) F + Σ 2 f (A B t + S_u A t²)     2 chunk (Σ t f + max t f)

A "layer" is all numbers made within one; the second factor 2 is one where a symmetric Γ is made of
a single block. The cheapest road whose smallest chunk fits the budget is taken. Work counts matrix
products; memory agrees with the compiler's own count within a factor of three (tested).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax

from ntkrl.jaxpr import Program, flatten, flops
from ntkrl.ntk import gradients
from ntkrl.ntk.body import Body
from ntkrl.ntk.directions import Directions
from ntkrl.ntk.layers import layers, plan_for
from ntkrl.ntk.taps import Plan
from ntkrl.types import Array, Params

ROADS = ("products", "jacobians", "layers")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a call will cost.

    road: "products", "jacobians" or "layers".
    chunk: directions of a side taken at a time.
    flops: of matrix products.
    bytes: working memory beyond the params, outputs included, of all devices together.
    output_bytes: of the result.
    """

    road: str
    chunk: int
    flops: float
    bytes: int
    output_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.road}, {self.chunk} directions at a time: {self.flops:.2e} FLOPs, "
            f"{self.bytes / GIB:.3g} GiB ({self.output_bytes / GIB:.3g} GiB of it the result)"
        )


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
    whole = _made(program)
    inner, times = [], []
    for step in program.steps:
        if step.eqn.primitive.name == "scan":
            inner.append(_made(flatten(step.eqn.params["jaxpr"])))
            times.append(step.eqn.params["length"])
    values = whole + sum(i * n for i, n in zip(inner, times, strict=True))
    found = _tapped(plan, 1)
    for index, scan in plan.scans.items():
        found += _tapped(scan.inner, program.steps[index].eqn.params["length"])
    size = sum(leaf.size for leaf in leaves)
    return Sizes(flops(program), size, plain, values, max(inner, default=whole), tuple(found))


def _made(program: Program) -> int:
    """Count the numbers that steps make."""
    return sum(program.avals[slot].size for step in program.steps for slot in step.outputs)


def _tapped(plan: Plan, times: int) -> list[tuple[int, int, int]]:
    found = []
    for index, tap in plan.taps.items():
        step = plan.program.steps[index]
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
    """Return the Estimate of every road that can be taken.

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
        "products": s.params + observed.sequences * s.layer,
        "jacobians": s.params + s.layer,
        "layers": s.tapped + s.params_plain,
    }
    fixed = {
        "products": (observed.sequences + 1) * s.values // 2,
        "jacobians": (observed.sequences + other.sequences) * s.values,
        "layers": (observed.sequences + other.sequences) * s.layer,
    }
    mixing = sum(2 * t * t * f * n for t, f, n in s.taps) * a * other.sequences
    inner = sum(2 * t * f * n for t, f, n in s.taps) * a * b
    found = {}
    for road in ROADS:
        if road == "layers" and not (alike and _layered(weights, leaves)):
            continue
        left = (budget - output - item * fixed[road]) // item
        one_block = updated is None and a * per_side[road] <= left
        sides = 1 if one_block or road == "products" else 2
        most = max(1, min(max(a, b), left // max(1, sides * per_side[road])))
        size = most if chunk is None else min(chunk, max(a, b))
        if size < a and road != "products":
            sides = 2
        blocks = -(-a // size)
        work = {
            "products": b * 2 * s.forward * (1 + observed.sequences),
            "jacobians": (a + b * blocks) * 2 * s.forward + 2 * a * b * s.params,
            "layers": (a * -(-b // size) + b * blocks) * s.forward + mixing + inner,
        }[road]
        halved = work / 2 if updated is None and road != "products" else work
        memory = output + item * (fixed[road] + size * sides * per_side[road])
        found[road] = Estimate(road, int(size), float(halved), int(memory), int(output))
    return found


def choose(found: dict[str, Estimate], road: str, budget: int) -> Estimate:
    """Return the estimate of the road to take.

    Raises:
      ValueError: a road was asked for that cannot be taken.
    """
    if road != "auto":
        if road not in found:
            raise ValueError(
                f"road {road!r} cannot be taken with weights that differ within a matrix (a "
                f"preconditioner); take {' or '.join(map(repr, found))}, or 'auto'."
            )
        return found[road]
    fitting = [estimate for estimate in found.values() if estimate.bytes <= budget]
    if fitting:
        return min(fitting, key=lambda estimate: estimate.flops)
    return min(found.values(), key=lambda estimate: estimate.bytes)


def _layered(weights: tuple[Array, ...] | None, leaves: list[Array]) -> bool:
    """Whether weights are one number per leaf or layer, for every leaf that could be tapped."""
    return weights is None or all(
        weight.size in (1, leaf.shape[0]) or leaf.ndim < 2
        for weight, leaf in zip(weights, leaves, strict=True)
        if leaf.ndim
    )


@functools.partial(jax.jit, static_argnames=("body", "road", "chunk", "forward_mode"))
def gram(
    body: Body,
    params: Params,
    observed: Directions,
    updated: Directions | None,
    weights: Any,
    road: str,
    chunk: int,
    forward_mode: bool,
) -> Array:
    """Return Γ `[S_o·A_o, S_u·A_u]` by the given road; `updated` None for a symmetric one."""
    if road == "products":
        arguments = (body, params, observed, updated, weights, chunk, forward_mode)
        return gradients.products(*arguments)
    if road == "jacobians":
        return gradients.jacobians(body, params, observed, updated, weights, chunk)
    return layers(body, params, observed, updated, weights, chunk)
