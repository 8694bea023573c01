"""Cotangents of a block, taken backward through the features segment by segment.

The features are replayed forward once and their intermediate values saved; going backward, the
activations x and cotangents δ of every tapped operation are returned as GradientFactors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.jaxpr import Constant, is_inexact, scan_counts
from ntkrl.ntk.jacobian_gram import Block, cotangent
from ntkrl.ntk.network import FeatureFunction
from ntkrl.ntk.taps import ScanPlan, TapPlan, is_among
from ntkrl.types import Array, Params

Values = dict[int, Array]
"""Arrays by slot, operand number or leaf."""


class GradientFactors(NamedTuple):
    """Gradients of a leaf for A cotangents of each of S sequences.

    activations: x `[S, t, i]`, ids `[S, t]`, or None for gradients that are not factored.
    deltas: δ `[S, A, t, f]`, or the gradients `[S, A, *leaf]`.
    """

    activations: Array | None
    deltas: Array


class BlockCotangents:
    """Values saved in the forward pass of a block, and cotangents in the backward pass."""

    def __init__(self, plan: TapPlan, features: FeatureFunction, params: Params, block: Block):
        self.plan, self.traced, self.segments = plan, plan.traced, plan.segments()
        leaves, inputs = jax.tree.leaves(params), self.traced.inputs
        self.shared = dict(self.traced.constants) | dict(zip(inputs, leaves, strict=False))
        for index in sorted(plan.aliases):
            operation = self.traced.operations[index]
            (alias,) = operation.outputs
            if plan.leaf_slots[alias] not in plan.direct:
                self.shared[alias] = operation.run(lambda slot: value_of(slot, self.shared))[0]
        side = block.side
        self.counts = (side.sequences, block.size)
        data = zip(inputs[len(leaves) :], jax.tree.leaves((side.tokens, side.mask)), strict=True)
        state = {slot: leaf[:, None] for slot, leaf in data}
        self.saved: list[Values] = []
        self.carries: dict[int, list[Array]] = {}
        for number in range(len(self.segments)):
            self._forward(number, state)
        (output,) = self.traced.output_slots
        phi = state[output]

        def start(positions: Array, cotangents: Array | None) -> Array:
            indices, length = block.first + jnp.arange(block.size), phi.shape[2]
            c_ATD = jax.vmap(lambda a: cotangent(positions, cotangents, a, side, length))(indices)
            return c_ATD.astype(phi.dtype).reshape(block.size, *phi.shape[1:])

        starts = jax.vmap(start)(side.positions, side.cotangents)
        self.cotangents = {output: features.shard_cotangents(starts)}

    def is_scan(self, number: int) -> bool:
        """Test whether a segment is a scan over layers."""
        return self.segments[number][0] in self.plan.scans

    def scan(self, number: int) -> ScanPlan:
        """Return the ScanPlan of a segment that is a scan over layers."""
        return self.plan.scans[self.segments[number][0]]

    def value(self, number: int, slot: int | Constant) -> tuple[Array, bool]:
        """Return an operand of a segment, and whether it has a leading sequence axis."""
        if isinstance(slot, Constant):
            return slot.value, False
        saved = self.saved[number]
        return (saved[slot], True) if slot in saved else (self.shared[slot], False)

    def _forward(self, number: int, state: Values) -> None:
        """Run a segment on the state, and add what later segments need to it."""
        segment = self.segments[number]
        operations = [self.traced.operations[index] for index in segment]
        outputs = {slot for operation in operations for slot in operation.outputs}
        reads = {slot for operation in operations for slot in operation.reads} - outputs
        saved = {slot: state[slot] for slot in sorted(reads) if slot in state}
        self.saved.append(saved)
        if self.is_scan(number):
            results, self.carries[number] = self._forward_scan(number)
        else:
            results = jax.vmap(lambda v: replay(self.plan, segment, self.shared | v)[0])(saved)
        later = [self.traced.operations[i] for s in self.segments[number + 1 :] for i in s]
        needed = {slot for operation in later for slot in operation.reads}
        needed |= self.traced.output_slots
        state.update({slot: results[slot] for slot in outputs if slot in needed})

    def _forward_scan(self, number: int) -> tuple[Values, list[Array]]:
        operation = self.traced.operations[self.segments[number][0]]
        inner, params = self.scan(number).inner, operation.eqn.params
        consts, carries = scan_counts(operation)

        def sequence(saved: Values) -> tuple[list[Array], list[Array]]:
            values = self.shared | saved
            operands = [value_of(slot, values) for slot in operation.inputs]

            def layer(
                carry: list[Array], xs: list[Array]
            ) -> tuple[list[Array], tuple[list[Array], list[Array]]]:
                outputs, _ = replay_body(inner, [*operands[:consts], *carry, *xs], None)
                return outputs[:carries], (outputs[carries:], carry)

            start, xs = operands[consts : consts + carries], operands[consts + carries :]
            length, reverse = params["length"], params["reverse"]
            end, (ys, entered) = jax.lax.scan(layer, start, xs, length=length, reverse=reverse)
            return [*end, *ys], entered

        results, entered = jax.vmap(sequence)(self.saved[number])
        return dict(zip(operation.outputs, results, strict=True)), entered

    def add(self, slot: int, cotangents: Array) -> None:
        """Add `[S, A, …]` to the cotangents of a slot."""
        if slot in self.cotangents:
            cotangents = self.cotangents[slot] + cotangents
        self.cotangents[slot] = cotangents

    def pop(self, slots: list[int]) -> Values:
        """Remove and return the cotangents of those slots that have any."""
        return {slot: self.cotangents.pop(slot) for slot in slots if slot in self.cotangents}

    def backward(self, number: int) -> dict[int, GradientFactors]:
        """Go back through a segment without a scan; return the factors of its tapped leaves."""
        segment, plan = self.segments[number], self.plan
        operations = [self.traced.operations[index] for index in segment]
        outputs = self.pop([slot for operation in operations for slot in operation.outputs])
        reads = {slot for operation in operations for slot in operation.reads}
        direct = {
            slot: self.shared[slot]
            for slot in reads
            if slot in plan.dependent
            and slot in self.shared
            and plan.leaf_slots[slot] in plan.direct
        }
        tapped = [index for index in segment if index in plan.taps]
        if not outputs:
            return {}

        def sequence(saved: Values, cotangents: Values) -> tuple[tuple[Values, Values], Values]:
            inputs = {s: v for s, v in saved.items() if s in plan.dependent} | direct

            def replayed(inputs: Values, perturbations: Values) -> tuple[Values, Values]:
                values = self.shared | saved | inputs
                results, records = replay(plan, segment, values, perturbations)
                return {slot: results[slot] for slot in outputs}, records

            _, pull, records = jax.vjp(replayed, inputs, zeros(plan, tapped), has_aux=True)
            return jax.vmap(pull)(cotangents), records

        (inputs, deltas), records = jax.vmap(sequence)(self.saved[number], outputs)
        for slot, cotangents in inputs.items():
            self.add(slot, cotangents)
        return factor_gradients(plan, records, deltas)

    def direct(self) -> dict[int, GradientFactors]:
        """Return the gradients of the leaves that are differentiated directly."""
        return {
            leaf: GradientFactors(None, self.cotangents[slot])
            for slot, leaf in self.plan.leaf_slots.items()
            if leaf in self.plan.direct and slot in self.traced.inputs and slot in self.cotangents
        }


class ScanCotangents:
    """The backward pass of a block through a scan over layers; keys are operand numbers."""

    def __init__(self, block: BlockCotangents, number: int):
        self.block, self.plan = block, block.scan(number)
        self.operation = block.traced.operations[block.segments[number][0]]
        self.first_carry, carried = scan_counts(self.operation)
        self.first_xs = self.first_carry + carried
        self.values = [block.value(number, slot) for slot in self.operation.inputs]
        self.entered = block.carries[number]
        self.outputs = block.pop(list(self.operation.outputs))
        self.moving = [
            operand
            for operand, slot in enumerate(self.operation.inputs)
            if self._is_moving(operand, slot)
        ]

    def _is_carried(self, operand: int) -> bool:
        return self.first_carry <= operand < self.first_xs

    def _is_moving(self, operand: int, slot: int | Constant) -> bool:
        """Test whether an operand needs a cotangent."""
        inner = self.plan.inner
        if self._is_carried(operand) and is_inexact(
            inner.traced.avals[inner.traced.inputs[operand]]
        ):
            return True
        if operand in self.plan.sliced:
            return self.plan.sliced[operand] in inner.direct
        return is_among(slot, self.block.plan.dependent)

    def start(self) -> Values:
        """Return cotangents of the carry as it leaves, and zeros for operands of all layers."""
        start: Values = {}
        for operand in self.moving:
            if operand >= self.first_xs:
                continue
            output = self.operation.outputs[operand - self.first_carry]
            if self._is_carried(operand) and output in self.outputs:
                start[operand] = self.outputs[output]
                continue
            value, per_sequence = self.values[operand]
            shape = value.shape[1:] if per_sequence else value.shape
            start[operand] = jnp.zeros((*self.block.counts, *shape), value.dtype)
        return start

    def xs(self) -> dict[str, Any]:
        """Return the values that differ by layer, layers in front.

        carry: entering, per sequence. per_sequence, shared: other operands. outputs: cotangents.
        """
        sliced = dict(enumerate(self.values[self.first_xs :], start=self.first_xs))
        results = self.operation.outputs[self.first_xs - self.first_carry :]
        return {
            "carry": [jnp.moveaxis(leaf, 1, 0) for leaf in self.entered],
            "per_sequence": {k: jnp.moveaxis(v, 1, 0) for k, (v, each) in sliced.items() if each},
            "shared": {k: v for k, (v, each) in sliced.items() if not each},
            "outputs": {
                slot: jnp.moveaxis(self.outputs[slot], 2, 0)
                for slot in results
                if slot in self.outputs
            },
        }

    def layer(
        self, cotangents: Values, xs: dict[str, Any]
    ) -> tuple[Values, Values, dict[int, GradientFactors]]:
        """Go back through a layer.

        Returns:
          Cotangents as the carry enters, cotangents of the other operands that differ by layer,
          and the GradientFactors of the layer's leaves.
        """
        inner, offset = self.plan.inner, self.first_carry
        positions = {slot: n for n, slot in enumerate(self.operation.outputs)}
        leaving = {k - offset: c for k, c in cotangents.items() if self._is_carried(k)}
        leaving |= {positions[slot]: c for slot, c in xs["outputs"].items()}
        consts = dict(enumerate(self.values[:offset]))
        per_sequence = dict(enumerate(xs["carry"], start=offset)) | xs["per_sequence"]
        per_sequence |= {k: v for k, (v, each) in consts.items() if each}
        shared = {k: v for k, (v, each) in consts.items() if not each} | xs["shared"]

        def sequence(
            per_sequence: Values, cotangents: Values
        ) -> tuple[tuple[Values, Values], Values]:
            operands = per_sequence | shared

            def replayed(moved: Values, perturbations: Values) -> tuple[Values, Values]:
                values = operands | moved
                arguments = [values[k] for k in sorted(values)]
                outputs, records = replay_body(inner, arguments, perturbations)
                return {n: outputs[n] for n in cotangents}, records

            moving = {operand: operands[operand] for operand in self.moving}
            perturbations = zeros(inner, list(inner.taps))
            _, pull, records = jax.vjp(replayed, moving, perturbations, has_aux=True)
            return jax.vmap(pull)(cotangents), records

        (moved, deltas), records = jax.vmap(sequence)(per_sequence, leaving)
        factors = factor_gradients(inner, records, deltas)
        for operand, leaf in self.plan.sliced.items():
            if operand in moved:
                factors[leaf] = GradientFactors(None, moved.pop(operand))
        by_layer = {k: c for k, c in moved.items() if k >= self.first_xs}
        entering = {
            k: c if self._is_carried(k) else cotangents[k] + c
            for k, c in moved.items()
            if k < self.first_xs
        }
        return entering, by_layer, factors

    def finish(self, cotangents: Values, by_layer: Values) -> None:
        """Add the cotangents of the scan's operands to those of their slots."""
        sliced = {operand: jnp.moveaxis(c, 0, 2) for operand, c in by_layer.items()}
        for operand, c in (cotangents | sliced).items():
            slot = self.operation.inputs[operand]
            if is_among(slot, self.block.plan.dependent):
                self.block.add(slot, c)


def value_of(operand: int | Constant, values: Values) -> Any:
    """Return the value of an operand."""
    return operand.value if isinstance(operand, Constant) else values[operand]


def replay(
    plan: TapPlan, segment: list[int], values: Values, perturbations: Values | None = None
) -> tuple[Values, Values]:
    """Run operations; add perturbations to tapped results and record their activations."""
    values, records = dict(values), {}
    for index in segment:
        operation = plan.traced.operations[index]
        results = operation.run(lambda slot: value_of(slot, values))
        if perturbations is not None and index in plan.taps:
            operands = [value_of(slot, values) for slot in operation.inputs]
            records[index] = plan.taps[index].activation(operation, operands)
            results[0] = results[0] + perturbations[index]
        values.update(zip(operation.outputs, results, strict=True))
    return values, records


def replay_body(
    plan: TapPlan, operands: list[Any], perturbations: Values | None
) -> tuple[list[Any], Values]:
    """Run the body of a scan."""
    traced = plan.traced
    values = traced.constants | dict(zip(traced.inputs, operands, strict=True))
    values, records = replay(plan, list(range(len(traced.operations))), values, perturbations)
    return [value_of(slot, values) for slot in traced.outputs], records


def zeros(plan: TapPlan, tapped: list[int]) -> Values:
    """Return zero perturbations of tapped results; their cotangents are δ."""
    operations = plan.traced.operations
    avals = {index: plan.traced.avals[operations[index].outputs[0]] for index in tapped}
    return {index: jnp.zeros(aval.shape, aval.dtype) for index, aval in avals.items()}


def factor_gradients(plan: TapPlan, records: Values, deltas: Values) -> dict[int, GradientFactors]:
    """Arrange activations and cotangents of tapped results by leaf."""
    factors = {}
    for index, delta in deltas.items():
        tap, operation = plan.taps[index], plan.traced.operations[index]
        arranged = jax.vmap(lambda c, tap=tap, o=operation: tap.delta(o, c))(delta)
        factors[tap.leaf] = GradientFactors(records[index], arranged)
    return factors
