"""Analysis of a traced network: the operations in which the layer-wise algorithm taps its leaves.

A leaf that enters one matrix product (or one table lookup) is *tapped* there: its gradient is
Σ_t x_t δ_tᵀ with x the other operand and δ the cotangent of the result, so that inner products of
gradients are products of two small Gram matrices and the gradient itself is never formed. Leaves
of a scan over layers are tapped inside it, layer by layer. Every other leaf (biases, norms, any
leaf used twice or in another way) is differentiated directly, which is exact as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp

from ntkrl.jaxpr import Constant, Operation, TracedFunction, flatten, is_inexact, scan_counts
from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.jacobian_gram import SequenceCotangents
from ntkrl.ntk.network import FeatureFunction, trace_features
from ntkrl.ntk.parts import Weights
from ntkrl.types import Array, Params

# these leave a gradient unchanged (EXACT), or unchanged up to the order of its entries
EXACT = frozenset({"convert_element_type", "copy"})
REORDERED = EXACT | {"transpose", "reshape", "squeeze", "expand_dims"}


class Tap(NamedTuple):
    """The only use of a leaf whose gradient factors.

    leaf: index of the leaf.
    operand: its operand number in the operation; for "dot" 0 or 1.
    kind: "dot" or "gather".
    """

    leaf: int
    operand: int
    kind: str

    def activation(self, operation: Operation, operands: list[Any]) -> Array:
        """Return x `[t, i]` of a product, or the ids `[t]` of a lookup."""
        if self.kind == "gather":
            return operands[1].reshape(-1)
        contracted = tuple(operation.eqn.params["dimension_numbers"][0][1 - self.operand])
        x = operands[1 - self.operand]
        free = tuple(axis for axis in range(x.ndim) if axis not in contracted)
        width = math.prod(x.shape[axis] for axis in contracted)
        return jnp.transpose(x, (*free, *contracted)).reshape(-1, width)

    def delta(self, operation: Operation, cotangent: Array) -> Array:
        """Return δ `[A, t, f]` of cotangents `[A, *result]`."""
        params, axes = operation.eqn.params, range(1, cotangent.ndim)
        if self.kind == "gather":
            columns = tuple(axis + 1 for axis in params["dimension_numbers"].offset_dims)
        else:  # the result's axes are the free ones of operand 0, then those of operand 1
            contracted = params["dimension_numbers"][0][self.operand]
            width = len(operation.operand_shape(self.operand)) - len(contracted)
            columns = tuple(axes[:width] if self.operand == 0 else axes[len(axes) - width :])
        rows = tuple(axis for axis in axes if axis not in columns)
        size = math.prod(cotangent.shape[axis] for axis in columns)
        ordered = jnp.transpose(cotangent, (0, *rows, *columns))
        return ordered.reshape(cotangent.shape[0], -1, size)


@dataclasses.dataclass(frozen=True, eq=False)
class TapPlan:
    """The use a traced function makes of its leaves.

    traced: the function.
    leaf_slots: `{slot: leaf}` slots of leaves, also in another shape or dtype.
    aliases: operations (by index) that only produce such slots.
    taps: `{operation: Tap}`.
    scans: `{operation: ScanPlan}` scans over layers that some leaf belongs to.
    direct: leaves that are differentiated directly.
    dependent: slots that depend on a leaf.
    """

    traced: TracedFunction
    leaf_slots: dict[int, int]
    aliases: frozenset[int]
    taps: dict[int, Tap]
    scans: dict[int, ScanPlan]
    direct: frozenset[int]
    dependent: frozenset[int]

    def signature(self) -> list[Any]:
        """Return the taps in order, equal for plans that can be contracted with each other."""
        entries: list[Any] = []
        for segment in self.segments():
            for index in segment:
                if index in self.taps:
                    entries.append((len(entries), self.taps[index]))
                elif index in self.scans:
                    inner = self.scans[index].inner
                    entries.append((sorted(inner.taps.values()), sorted(inner.direct)))
        return [*entries, sorted(self.direct), len(self.segments())]

    def segments(self) -> list[list[int]]:
        """Return the operations in segments, each scan over layers in a separate segment."""
        segments: list[list[int]] = [[]]
        for index, operation in enumerate(self.traced.operations):
            if index in self.aliases and self.leaf_slots[operation.outputs[0]] not in self.direct:
                continue
            if index in self.scans:
                segments += [[index], []]
            else:
                segments[-1].append(index)
        return [segment for segment in segments if segment]


class ScanPlan(NamedTuple):
    """A scan over layers.

    inner: TapPlan of its body; leaves keep their indices.
    sliced: `{operand: leaf}` operands of the scan that are leaves used nowhere else.
    """

    inner: TapPlan
    sliced: dict[int, int]


class _Use(NamedTuple):
    """A use of a leaf.

    operation: index of the operation.
    operand: operand number in it.
    unchanged: True where the leaf arrives in its shape and order.
    """

    operation: int
    operand: int
    unchanged: bool


MayTap = Callable[[int, bool], bool]
"""`(leaf, inside a scan) -> bool`, whether its weight allows a tap."""


def plan_taps(
    features: FeatureFunction,
    params: Params,
    side: SequenceCotangents | Contexts,
    weights: Weights,
) -> TapPlan:
    """Return the TapPlan of one sequence of a side."""
    leaves = features.leaves(params)
    traced = trace_features(features.network, params, side.tokens, side.mask)
    slots = [slot for slot, used in zip(traced.inputs, features.used, strict=False) if used]

    def may_tap(leaf: int, sliced: bool) -> bool:
        """Test whether the leaf's weight is a single number, or a number per layer."""
        if weights is None or weights[leaf].size == 1:
            return True
        return sliced and weights[leaf].size == leaves[leaf].shape[0]

    return _plan(traced, {slot: leaf for leaf, slot in enumerate(slots)}, may_tap, False)


def _plan(traced: TracedFunction, inputs: dict[int, int], may_tap: MayTap, nested: bool) -> TapPlan:
    """Choose for every leaf how its gradients are contracted; `nested` inside a scan of layers."""
    slots, exact = dict(inputs), dict.fromkeys(inputs, True)
    uses: dict[int, list[_Use]] = {leaf: [] for leaf in inputs.values()}
    aliases, dependent = set(), set(inputs)
    for index, operation in enumerate(traced.operations):
        operands = {n: slot for n, slot in enumerate(operation.inputs) if is_among(slot, slots)}
        if operation.reads & dependent:
            dependent |= {slot for slot in operation.outputs if is_inexact(traced.avals[slot])}
        if operands and len(operation.inputs) == 1 and operation.name in REORDERED:
            (source,), alias = operands.values(), operation.outputs[0]
            slots[alias] = slots[source]
            exact[alias] = exact[source] and operation.name in EXACT
            aliases.add(index)
            continue
        for n, slot in operands.items():
            uses[slots[slot]].append(_Use(index, n, exact[slot]))
    taps: dict[int, Tap] = {}
    sliced: dict[int, dict[int, int]] = {}
    returned = {slots[slot] for slot in traced.output_slots if slot in slots}
    for leaf, places in uses.items():
        if len(places) != 1 or leaf in returned:
            continue
        ((index, operand, unchanged),) = places
        operation = traced.operations[index]
        if _is_sliced(operation, operand) and unchanged and not nested:
            sliced.setdefault(index, {})[operand] = leaf
        elif may_tap(leaf, nested) and (kind := _kind(operation, operand, unchanged, slots)):
            taps[index] = Tap(leaf, operand, kind)
    scans = {}
    for index, leaves in sliced.items():
        body = flatten(traced.operations[index].eqn.params["jaxpr"])
        inner = {body.inputs[operand]: leaf for operand, leaf in leaves.items()}
        scans[index] = ScanPlan(_plan(body, inner, may_tap, True), leaves)
    planned = {tap.leaf for tap in taps.values()}
    planned |= {leaf for leaves in sliced.values() for leaf in leaves.values()}
    return TapPlan(
        traced,
        slots,
        frozenset(aliases),
        taps,
        scans,
        frozenset(uses) - planned,
        frozenset(dependent),
    )


def is_among(operand: int | Constant, slots: Container[int]) -> TypeGuard[int]:
    """Test whether an operand is one of some slots."""
    return not isinstance(operand, Constant) and operand in slots


def _is_sliced(operation: Operation, operand: int) -> bool:
    return operation.name == "scan" and operand >= sum(scan_counts(operation))


def _kind(operation: Operation, operand: int, unchanged: bool, slots: Container[int]) -> str | None:
    """Return the kind of Tap, None where the leaf's gradient does not factor."""
    params = operation.eqn.params
    if operation.name == "dot_general":
        mixed = is_among(operation.inputs[1 - operand], slots)
        batched = bool(params["dimension_numbers"][1][0])
        return None if mixed or batched else "dot"
    if operation.name == "gather" and operand == 0 and unchanged:
        numbers, table = params["dimension_numbers"], operation.operand_shape(0)
        by_row = tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        full = not numbers.operand_batching_dims and params["slice_sizes"] == (1, *table[1:])
        return "gather" if by_row and full else None
    return None
