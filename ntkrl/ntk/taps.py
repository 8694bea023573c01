"""Where a program uses its parameters: the plan of the layer-wise algorithm.

A leaf that enters one matrix product (or one table lookup) is *tapped* there: its gradient is
Σ_t x_t δ_tᵀ with x the other operand and δ the cotangent of the result, so that inner products of
gradients are products of two small Gram matrices and the gradient itself is never built. Leaves of
a scan over layers are tapped inside it, layer by layer. Every other leaf (biases, norms, anything
used twice or in some other way) is differentiated as it is, which is exact as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from ntkrl.jaxpr import Constant, Operation, TracedFunction, flatten, is_inexact, scan_counts
from ntkrl.types import Array

# a gradient is the same up to order of entries after these, and up to nothing after the first two
EXACT = frozenset({"convert_element_type", "copy"})
REORDERED = EXACT | {"transpose", "reshape", "squeeze", "expand_dims"}


class Tap(NamedTuple):
    """One use of a leaf whose gradient factors.

    leaf: index of the leaf.
    operand: which operand of the step it is; for "dot" 0 or 1.
    kind: "dot" or "gather".
    """

    leaf: int
    operand: int
    kind: str

    def activation(self, step: Operation, operands: list[Any]) -> Array:
        """Return x `[t, i]` of a product, or the ids `[t]` of a lookup."""
        if self.kind == "gather":
            return operands[1].reshape(-1)
        contracted = tuple(step.eqn.params["dimension_numbers"][0][1 - self.operand])
        x = operands[1 - self.operand]
        free = tuple(axis for axis in range(x.ndim) if axis not in contracted)
        width = math.prod(x.shape[axis] for axis in contracted)
        return jnp.transpose(x, (*free, *contracted)).reshape(-1, width)

    def delta(self, step: Operation, cotangent: Array) -> Array:
        """Return δ `[A, t, f]` of cotangents `[A, *result]`."""
        params, axes = step.eqn.params, range(1, cotangent.ndim)
        if self.kind == "gather":
            columns = tuple(axis + 1 for axis in params["dimension_numbers"].offset_dims)
        else:  # the result's axes are the free ones of operand 0, then those of operand 1
            contracted = params["dimension_numbers"][0][self.operand]
            width = step.eqn.invars[self.operand].aval.ndim - len(contracted)
            columns = tuple(axes[:width] if self.operand == 0 else axes[len(axes) - width :])
        rows = tuple(axis for axis in axes if axis not in columns)
        size = math.prod(cotangent.shape[axis] for axis in columns)
        ordered = jnp.transpose(cotangent, (0, *rows, *columns))
        return ordered.reshape(cotangent.shape[0], -1, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a program uses the leaves it owns.

    program: the program.
    owned: `{slot: leaf}` slots that are leaves, or the same leaf in another shape or dtype.
    aliases: steps (by index) that only make such slots.
    taps: `{step: Tap}`.
    scans: `{step: ScanPlan}` scans over layers that some leaf belongs to.
    plain: leaves differentiated as they are.
    dependent: slots that depend on a leaf.
    """

    program: TracedFunction
    owned: dict[int, int]
    aliases: frozenset[int]
    taps: dict[int, Tap]
    scans: dict[int, ScanPlan]
    plain: frozenset[int]
    dependent: frozenset[int]

    def signature(self) -> list[Any]:
        """Describe which leaf is contracted how and in which order, to compare two plans."""
        found: list[Any] = []
        for run in self.segments():
            for index in run:
                if index in self.taps:
                    found.append((len(found), self.taps[index]))
                elif index in self.scans:
                    inner = self.scans[index].inner
                    found.append((sorted(inner.taps.values()), sorted(inner.plain)))
        return [*found, sorted(self.plain), len(self.segments())]

    def segments(self) -> list[list[int]]:
        """Return the steps in runs, each scan over layers a run of its own."""
        runs: list[list[int]] = [[]]
        for index, step in enumerate(self.program.operations):
            if index in self.aliases and self.owned[step.outputs[0]] not in self.plain:
                continue
            if index in self.scans:
                runs += [[index], []]
            else:
                runs[-1].append(index)
        return [run for run in runs if run]


class ScanPlan(NamedTuple):
    """A scan over layers.

    inner: Plan of its body; leaves keep their indices.
    sliced: `{operand: leaf}` operands of the scan that are leaves used nowhere else.
    """

    inner: Plan
    sliced: dict[int, int]


def plan(
    program: TracedFunction,
    owned: dict[int, int],
    may_tap: Callable[[int, bool], bool],
    nested: bool = False,
) -> Plan:
    """Decide for every leaf how its gradients are contracted.

    Args:
      program: the traced features.
      owned: `{slot: leaf}` inputs that are leaves.
      may_tap: `(leaf, within a scan) -> bool`, whether its weight allows a tap.
      nested: True inside a scan over layers, where scans are taken as they are.
    """
    slots = dict(owned)
    exact = dict.fromkeys(owned, True)
    aliases = set()
    uses: dict[int, list[tuple[int, int]]] = {leaf: [] for leaf in owned.values()}
    dependent = set(owned)
    for index, step in enumerate(program.operations):
        mine = [n for n, s in enumerate(step.inputs) if not isinstance(s, Constant) and s in slots]
        if step.reads & dependent:
            dependent |= {slot for slot in step.outputs if is_inexact(program.avals[slot])}
        name = step.eqn.primitive.name
        if mine and len(step.inputs) == 1 and name in REORDERED:
            slots[step.outputs[0]] = slots[step.inputs[0]]
            exact[step.outputs[0]] = exact[step.inputs[0]] and name in EXACT
            aliases.add(index)
            continue
        for n in mine:
            uses[slots[step.inputs[n]]].append((index, n))
    taps: dict[int, Tap] = {}
    sliced: dict[int, dict[int, int]] = {}
    returned = {slots[s] for s in program.outputs if not isinstance(s, Constant) and s in slots}
    for leaf, found in uses.items():
        if len(found) != 1 or leaf in returned:
            continue
        ((index, operand),) = found
        step = program.operations[index]
        whole = exact[step.inputs[operand]]
        if _is_slice(step, operand) and whole and not nested:
            sliced.setdefault(index, {})[operand] = leaf
        elif may_tap(leaf, nested) and (kind := _kind(step, operand, whole, slots)):
            taps[index] = Tap(leaf, operand, kind)
    held = {tap.leaf for tap in taps.values()} | {v for o in sliced.values() for v in o.values()}
    return Plan(
        program,
        slots,
        frozenset(aliases),
        taps,
        {
            index: _scan_plan(program.operations[index], leaves, may_tap)
            for index, leaves in sliced.items()
        },
        frozenset(uses) - held,
        frozenset(dependent),
    )


def _scan_plan(
    step: Operation, leaves: dict[int, int], may_tap: Callable[[int, bool], bool]
) -> ScanPlan:
    inner = flatten(step.eqn.params["jaxpr"])
    owned = {inner.inputs[operand]: leaf for operand, leaf in leaves.items()}
    return ScanPlan(plan(inner, owned, may_tap, nested=True), leaves)


def _is_slice(step: Operation, operand: int) -> bool:
    if step.eqn.primitive.name != "scan":
        return False
    return operand >= sum(scan_counts(step))


def _kind(step: Operation, operand: int, whole: bool, slots: dict[int, int]) -> str | None:
    """Return how the step uses a leaf, None where its gradient does not factor."""
    name, params = step.eqn.primitive.name, step.eqn.params
    if name == "dot_general":
        other = step.inputs[1 - operand]
        mixed = not isinstance(other, Constant) and other in slots
        batched = bool(params["dimension_numbers"][1][0])
        return None if mixed or batched else "dot"
    if name == "gather" and operand == 0 and whole:
        numbers, table = params["dimension_numbers"], step.eqn.invars[0].aval.shape
        rows = tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        plain = not numbers.operand_batching_dims and params["slice_sizes"] == (1, *table[1:])
        return "gather" if rows and plain else None
    return None
