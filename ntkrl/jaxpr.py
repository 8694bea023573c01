"""A traced function as a straight line of operations: calls inlined, every value numbered.

The layer-wise road reads which operation uses which parameter from it, and replays it with
perturbations added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# calls whose insides are read as if written in place; custom derivatives stay closed
INLINED = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint"}
)


class Constant(NamedTuple):
    """An operand that is a number in the program."""

    value: Any


class Step(NamedTuple):
    """One operation.

    eqn: what it is (`eqn.primitive.name`, `eqn.params`).
    inputs: slot of each operand, or a Constant.
    outputs: slots of the results.
    """

    eqn: JaxprEqn
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]

    @property
    def reads(self) -> set[int]:
        """Slots among the operands."""
        return {slot for slot in self.inputs if not isinstance(slot, Constant)}

    def run(self, read: Callable[[int | Constant], Any]) -> list[Any]:
        """Return the results, given how to look an operand up."""
        primitive = self.eqn.primitive
        with self.eqn.ctx.manager:
            found = primitive.bind(
                *(read(slot) for slot in self.inputs),
                **primitive.get_bind_params(self.eqn.params),
            )
        return list(found) if primitive.multiple_results else [found]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Steps in order; `avals[slot]` is the shape and dtype of a slot."""

    inputs: tuple[int, ...]
    constants: dict[int, Any]
    steps: tuple[Step, ...]
    outputs: tuple[int | Constant, ...]
    avals: tuple[Any, ...]

    def live(self) -> set[int]:
        """Return the slots that some output depends on."""
        needed = {slot for slot in self.outputs if not isinstance(slot, Constant)}
        for step in reversed(self.steps):
            if needed & set(step.outputs):
                needed |= step.reads
        return needed


def trace(function: Callable[..., Any], *arguments: Any) -> Program:
    """Trace a function of arrays (or their shapes); steps that no output needs are left out."""
    program = flatten(jax.make_jaxpr(function)(*arguments))
    live = program.live()
    steps = tuple(step for step in program.steps if live & set(step.outputs))
    return dataclasses.replace(program, steps=steps)


def flatten(closed: ClosedJaxpr) -> Program:
    """Write a jaxpr as a Program."""
    steps: list[Step] = []
    avals: list[Any] = []
    constants: dict[int, Any] = {}

    def fresh(variables: Sequence[Any]) -> tuple[int, ...]:
        avals.extend(variable.aval for variable in variables)
        return tuple(range(len(avals) - len(variables), len(avals)))

    def walk(jaxpr: Jaxpr, values: Sequence[Any], inputs: Sequence[int | Constant]) -> list[Any]:
        slots: dict[Any, int | Constant] = dict(zip(jaxpr.invars, inputs, strict=True))
        held = fresh(jaxpr.constvars)
        constants.update(zip(held, values, strict=True))
        slots.update(zip(jaxpr.constvars, held, strict=True))

        def look(atom: Any) -> int | Constant:
            return Constant(atom.val) if isinstance(atom, Literal) else slots[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(look(atom) for atom in eqn.invars)
            if eqn.primitive.name in INLINED:
                inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
                closed = isinstance(inner, ClosedJaxpr)
                body, held_values = (inner.jaxpr, inner.consts) if closed else (inner, ())
                results = walk(body, held_values, operands)
            else:
                results = fresh(eqn.outvars)
                steps.append(Step(eqn, operands, results))
            slots.update(zip(eqn.outvars, results, strict=True))
        return [look(atom) for atom in jaxpr.outvars]

    inputs = fresh(closed.jaxpr.invars)
    outputs = walk(closed.jaxpr, closed.consts, inputs)
    return Program(inputs, constants, tuple(steps), tuple(outputs), tuple(avals))


def flops(program: Program) -> int:
    """Count the FLOPs of matrix products, those inside scans as often as they run."""
    total = 0
    for step in program.steps:
        name, params = step.eqn.primitive.name, step.eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = 1
            for axis in contracted:
                inner *= step.eqn.invars[0].aval.shape[axis]
            total += 2 * inner * step.eqn.outvars[0].aval.size
        elif name == "scan":
            total += params["length"] * flops(flatten(params["jaxpr"]))
    return total


def scan_counts(step: Step) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many are carried."""
    params = step.eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()  # JAX 0.11 on
    return len(consts), len(carried)


def is_traced(tree: Any) -> bool:
    """Tell whether some leaf is being traced, so that values cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_inexact(value: Any) -> bool:
    """Tell whether a value (or aval) can carry a derivative."""
    return jnp.issubdtype(value.dtype, jnp.inexact)
