"""One side of the layer-wise algorithm: features replayed forward, cotangents taken backward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.jaxpr import Constant, is_inexact, scan_counts
from ntkrl.ntk import taps
from ntkrl.ntk.blocks import Block
from ntkrl.ntk.body import Body
from ntkrl.ntk.contract import Factors
from ntkrl.ntk.directions import cotangent
from ntkrl.types import Array, Params


class Side:
    """One side of a block: values saved on the way forward, cotangents on the way back."""

    def __init__(self, plan: taps.Plan, body: Body, params: Params, block: Block):
        self.plan, self.program = plan, plan.program
        self.runs = plan.segments()
        leaves = jax.tree.leaves(params)
        self.common = dict(self.program.constants)
        self.common |= dict(zip(self.program.inputs, leaves, strict=False))
        for index in sorted(plan.aliases):
            step = self.program.operations[index]
            if plan.owned[step.outputs[0]] not in plan.plain:
                self.common[step.outputs[0]] = step.run(lambda slot: self.common[slot])[0]
        side = block.side
        self.counts = (side.sequences, block.count)
        data = jax.tree.leaves((side.tokens, side.mask))
        self.state = {
            slot: leaf[:, None]
            for slot, leaf in zip(self.program.inputs[len(leaves) :], data, strict=True)
        }
        self.saved: list[dict[int, Array]] = []
        self.carries: dict[int, list[Array]] = {}
        for number in range(len(self.runs)):
            self._forward(number)
        (output,) = self.program.outputs
        phi = self.state[output]

        def start(positions: Array, vectors: Array | None) -> Array:
            indices = block.first + jnp.arange(block.count)
            length = phi.shape[2]
            c_ATD = jax.vmap(lambda a: cotangent(positions, vectors, a, side, length))(indices)
            return c_ATD.astype(phi.dtype).reshape(block.count, *phi.shape[1:])

        starts = jax.vmap(start)(side.positions, side.vectors)
        self.cotangents = {output: body.spread(starts)}

    def scan(self, number: int) -> taps.ScanPlan | None:
        """Return the scan over layers that a run is, or None."""
        index = self.runs[number][0]
        return self.plan.scans[index] if index in self.plan.scans else None

    def value(self, number: int, slot: int | Constant) -> tuple[Array, bool]:
        """Return an operand of a run, and whether it has a sequence axis in front."""
        if isinstance(slot, Constant):
            return slot.value, False
        held = self.saved[number]
        return (held[slot], True) if slot in held else (self.common[slot], False)

    def _forward(self, number: int) -> None:
        run = self.runs[number]
        steps = [self.program.operations[index] for index in run]
        made = {slot for step in steps for slot in step.outputs}
        reads = {slot for step in steps for slot in step.reads} - made
        held = {slot: self.state[slot] for slot in sorted(reads) if slot in self.state}
        self.saved.append(held)
        if self.scan(number) is None:
            results = jax.vmap(lambda v: replay(self.plan, run, self.common | v)[0])(held)
        else:
            results, self.carries[number] = self._forward_scan(number)
        later = {
            s
            for rest in self.runs[number + 1 :]
            for i in rest
            for s in self.program.operations[i].reads
        }
        later |= set(self.program.outputs)
        self.state |= {slot: results[slot] for slot in made if slot in later}

    def _forward_scan(self, number: int) -> tuple[dict[int, Array], list[Array]]:
        step, inner = self.program.operations[self.runs[number][0]], self.scan(number).inner
        params = step.eqn.params
        consts, carries = scan_counts(step)

        def sequence(held: dict[int, Array]) -> tuple[list[Array], list[Array]]:
            def look(slot: int | Constant) -> Array:
                return slot.value if isinstance(slot, Constant) else (self.common | held)[slot]

            operands = [look(slot) for slot in step.inputs]

            def layer(carry: list[Array], xs: list[Array]):
                outputs, _ = call(inner, [*operands[:consts], *carry, *xs], None)
                return outputs[:carries], (outputs[carries:], carry)

            start, xs = operands[consts : consts + carries], operands[consts + carries :]
            kept = {"length": params["length"], "reverse": params["reverse"]}
            end, (ys, entered) = jax.lax.scan(layer, start, xs, **kept)
            return [*end, *ys], entered

        results, entered = jax.vmap(sequence)(self.saved[number])
        return dict(zip(step.outputs, results, strict=True)), entered

    def add(self, slot: int, cotangents: Array) -> None:
        """Add `[S, A, …]` to the cotangents of a slot."""
        held = self.cotangents[slot] if slot in self.cotangents else None
        self.cotangents[slot] = cotangents if held is None else held + cotangents

    def taken(self, slots: list[int]) -> dict[int, Array]:
        """Remove and return the cotangents of those slots that have any."""
        return {slot: self.cotangents.pop(slot) for slot in slots if slot in self.cotangents}

    def backward(self, number: int) -> dict[int, Factors]:
        """Go back through a run of plain steps; return the factors of what is tapped there."""
        run, plan = self.runs[number], self.plan
        steps = [self.program.operations[index] for index in run]
        outputs = self.taken([slot for step in steps for slot in step.outputs])
        reads = {slot for step in steps for slot in step.reads}
        shared = {s: self.common[s] for s in reads if s in plan.dependent and s in self.common}
        shared = {s: v for s, v in shared.items() if plan.owned[s] in plan.plain}
        tapped = [index for index in run if index in plan.taps]
        if not outputs:
            return {}

        def sequence(held: dict[int, Array], given: dict[int, Array]):
            moving = {s: v for s, v in held.items() if s in plan.dependent} | shared

            def replayed(moved: dict[int, Array], nudges: dict[int, Array]):
                env, records = replay(plan, run, self.common | held | moved, nudges)
                return {slot: env[slot] for slot in outputs}, records

            _, pull, records = jax.vjp(replayed, moving, nudged(plan, tapped), has_aux=True)
            return jax.vmap(pull)(given), records

        (moved, deltas), records = jax.vmap(sequence)(self.saved[number], outputs)
        for slot, cotangents in moved.items():
            self.add(slot, cotangents)
        return factors_of(plan, records, deltas)

    def plain(self) -> dict[int, Factors]:
        """Return the gradients of the leaves that are differentiated as they are."""
        return {
            leaf: Factors(None, self.cotangents[slot])
            for slot, leaf in self.plan.owned.items()
            if leaf in self.plan.plain and slot in self.program.inputs and slot in self.cotangents
        }


class ScanBack:
    """The way back of one side through a scan over layers; operands are told by their number."""

    def __init__(self, side: Side, number: int):
        self.side, self.number = side, number
        self.step = side.program.operations[side.runs[number][0]]
        self.plan = side.scan(number)
        self.first_carry, carried = scan_counts(self.step)
        self.first_xs = self.first_carry + carried
        self.values = [side.value(number, slot) for slot in self.step.inputs]
        self.given = side.taken(list(self.step.outputs))
        inner = self.plan.inner.program
        self.moving = [
            operand
            for operand, slot in enumerate(self.step.inputs)
            if (operand in self.plan.sliced and self.plan.sliced[operand] in self.plan.inner.plain)
            or (operand not in self.plan.sliced and _among(slot, side.plan.dependent))
            or (
                self.first_carry <= operand < self.first_xs
                and is_inexact(inner.avals[inner.inputs[operand]])
            )
        ]

    def _carried(self, operand: int) -> bool:
        return self.first_carry <= operand < self.first_xs

    def start(self) -> dict[int, Array]:
        """Return cotangents of the carry as it leaves, and zeros for what is shared by layers."""
        found = {}
        for operand in self.moving:
            if operand >= self.first_xs:
                continue
            output = self.step.outputs[operand - self.first_carry]
            if self._carried(operand) and output in self.given:
                found[operand] = self.given[output]
                continue
            value, own = self.values[operand]
            shape = value.shape[1:] if own else value.shape
            found[operand] = jnp.zeros((*self.side.counts, *shape), value.dtype)
        return found

    def xs(self) -> dict[str, Any]:
        """Return what differs from layer to layer, layers in front."""
        entered = self.side.carries[self.number]
        apart = {
            operand: (value, own)
            for operand, (value, own) in enumerate(self.values)
            if operand >= self.first_xs
        }
        outputs = self.step.outputs[self.first_xs - self.first_carry :]
        return {
            "carry": [jnp.moveaxis(leaf, 1, 0) for leaf in entered],
            "own": {k: jnp.moveaxis(value, 1, 0) for k, (value, own) in apart.items() if own},
            "shared": {k: value for k, (value, own) in apart.items() if not own},
            "made": {
                slot: jnp.moveaxis(self.given[slot], 2, 0) for slot in outputs if slot in self.given
            },
        }

    def layer(self, cotangents: dict[int, Array], xs: dict[str, Any]):
        """Go back through one layer.

        Returns:
          cotangents as the carry enters, cotangents of the other operands that differ by layer,
          and the Factors of the layer's leaves.
        """
        inner, offset = self.plan.inner, self.first_carry
        positions = {slot: n for n, slot in enumerate(self.step.outputs)}
        leaving = {k - offset: c for k, c in cotangents.items() if self._carried(k)}
        leaving |= {positions[slot]: c for slot, c in xs["made"].items()}
        own = dict(enumerate(xs["carry"], start=offset)) | xs["own"]
        own |= {k: v for k, (v, mine) in enumerate(self.values[:offset]) if mine}
        shared = {k: v for k, (v, mine) in enumerate(self.values[:offset]) if not mine}
        shared |= xs["shared"]

        def sequence(own: dict[int, Array], given: dict[int, Array]):
            operands = own | shared

            def replayed(moved: dict[int, Array], nudges: dict[int, Array]):
                whole = operands | moved
                outputs, records = call(inner, [whole[k] for k in sorted(whole)], nudges)
                return {n: outputs[n] for n in given}, records

            moving = {operand: operands[operand] for operand in self.moving}
            nudges = nudged(inner, list(inner.taps))
            _, pull, records = jax.vjp(replayed, moving, nudges, has_aux=True)
            return jax.vmap(pull)(given), records

        (moved, deltas), records = jax.vmap(sequence)(own, leaving)
        factors = factors_of(inner, records, deltas)
        for operand, leaf in self.plan.sliced.items():
            if operand in moved:
                factors[leaf] = Factors(None, moved.pop(operand))
        apart = {k: c for k, c in moved.items() if k >= self.first_xs}
        before = {
            k: c if self._carried(k) else cotangents[k] + c
            for k, c in moved.items()
            if k < self.first_xs
        }
        return before, apart, factors

    def finish(self, cotangents: dict[int, Array], apart: dict[int, Array]) -> None:
        """Hand the cotangents of the scan's operands to the values they came from."""
        whole = cotangents | {k: jnp.moveaxis(c, 0, 2) for k, c in apart.items()}
        for operand, c in whole.items():
            slot = self.step.inputs[operand]
            if _among(slot, self.side.plan.dependent):
                self.side.add(slot, c)


def _among(slot: int | Constant, slots: frozenset[int]) -> bool:
    return not isinstance(slot, Constant) and slot in slots


def replay(
    plan: taps.Plan, run: list[int], env: dict[int, Any], nudges: dict[int, Array] | None = None
) -> tuple[dict[int, Any], dict[int, Array]]:
    """Run steps; add a nudge to each tapped result and record the other operand."""
    env, records = dict(env), {}
    read = lambda slot: slot.value if isinstance(slot, Constant) else env[slot]  # noqa: E731
    for index in run:
        step = plan.program.operations[index]
        results = step.run(read)
        if nudges is not None and index in plan.taps:
            operands = [read(slot) for slot in step.inputs]
            records[index] = plan.taps[index].activation(step, operands)
            results[0] = results[0] + nudges[index]
        env.update(zip(step.outputs, results, strict=True))
    return env, records


def call(
    plan: taps.Plan, operands: list[Any], nudges: dict[int, Array] | None
) -> tuple[list[Any], dict[int, Array]]:
    """Run the body of a scan."""
    program = plan.program
    env = program.constants | dict(zip(program.inputs, operands, strict=True))
    env, records = replay(plan, list(range(len(program.operations))), env, nudges)
    outputs = [s.value if isinstance(s, Constant) else env[s] for s in program.outputs]
    return outputs, records


def nudged(plan: taps.Plan, tapped: list[int]) -> dict[int, Array]:
    """Return zeros to add to tapped results; their cotangents are δ."""
    avals = {
        index: plan.program.avals[plan.program.operations[index].outputs[0]] for index in tapped
    }
    return {index: jnp.zeros(aval.shape, aval.dtype) for index, aval in avals.items()}


def factors_of(
    plan: taps.Plan, records: dict[int, Array], deltas: dict[int, Array]
) -> dict[int, Factors]:
    """Arrange activations and cotangents of tapped results by leaf."""
    found = {}
    for index, delta in deltas.items():
        tap, step = plan.taps[index], plan.program.operations[index]
        arranged = jax.vmap(lambda c, tap=tap, step=step: tap.delta(step, c))(delta)
        found[tap.leaf] = Factors(records[index], arranged)
    return found
