"""Jaxprs as flat lists of operations, and the costs read from them.

Calls (`jit`, `remat`, …) are inlined and every value is numbered, so that a traced function can be
analysed, replayed with perturbations, and its FLOPs and intermediate values counted.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# calls that are inlined; functions with custom derivatives stay closed
INLINED = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint"}
)


class Constant(NamedTuple):
    """A literal operand."""

    value: Any


class Operation(NamedTuple):
    """One primitive application.

    eqn: its jaxpr equation (`eqn.primitive.name`, `eqn.params`).
    inputs: slot of each operand, or a Constant.
    outputs: slots of the results.
    """

    eqn: JaxprEqn
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def reads(self) -> set[int]:
        """Slots among the operands."""
        return {slot for slot in self.inputs if not isinstance(slot, Constant)}

    def operand_shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of an operand."""
        aval: Any = self.eqn.invars[number].aval
        return aval.shape

    def run(self, read: Callable[[int | Constant], Any]) -> list[Any]:
        """Return the results; `read` maps an operand to its value."""
        primitive = self.eqn.primitive
        with self.eqn.ctx.manager:
            results = primitive.bind(
                *(read(slot) for slot in self.inputs),
                **primitive.get_bind_params(self.eqn.params),
            )
        return list(results) if primitive.multiple_results else [results]


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction:
    """A function as operations in order; `avals[slot]` is the shape and dtype of a slot."""

    inputs: tuple[int, ...]
    constants: dict[int, Any]
    operations: tuple[Operation, ...]
    outputs: tuple[int | Constant, ...]
    avals: tuple[Any, ...]

    @property
    def output_slots(self) -> set[int]:
        """Slots among the outputs."""
        return {slot for slot in self.outputs if not isinstance(slot, Constant)}

    def live(self) -> set[int]:
        """Return the slots that some output depends on."""
        needed = self.output_slots
        for operation in reversed(self.operations):
            if needed & set(operation.outputs):
                needed |= operation.reads
        return needed


def trace(function: Callable[..., Any], *arguments: Any) -> TracedFunction:
    """Trace a function of arrays (or their shapes); dead operations are left out."""
    traced = flatten(jax.make_jaxpr(function)(*arguments))
    live = traced.live()
    operations = tuple(o for o in traced.operations if live & set(o.outputs))
    return dataclasses.replace(traced, operations=operations)


def flatten(closed: ClosedJaxpr) -> TracedFunction:
    """Convert a jaxpr to a TracedFunction."""
    operations: list[Operation] = []
    avals: list[Any] = []
    constants: dict[int, Any] = {}

    def fresh(variables: Sequence[Any]) -> tuple[int, ...]:
        avals.extend(variable.aval for variable in variables)
        return tuple(range(len(avals) - len(variables), len(avals)))

    def walk(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int | Constant]) -> list[Any]:
        slots: dict[Any, int | Constant] = dict(zip(jaxpr.invars, inputs, strict=True))
        const_slots = fresh(jaxpr.constvars)
        constants.update(zip(const_slots, consts, strict=True))
        slots.update(zip(jaxpr.constvars, const_slots, strict=True))

        def operand(atom: Any) -> int | Constant:
            return Constant(atom.val) if isinstance(atom, Literal) else slots[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(operand(atom) for atom in eqn.invars)
            if eqn.primitive.name in INLINED:
                inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
                closed = isinstance(inner, ClosedJaxpr)
                body, body_consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
                slots.update(zip(eqn.outvars, walk(body, body_consts, operands), strict=True))
                continue
            outputs = fresh(eqn.outvars)
            operations.append(Operation(eqn, operands, outputs))
            slots.update(zip(eqn.outvars, outputs, strict=True))
        return [operand(atom) for atom in jaxpr.outvars]

    inputs = fresh(closed.jaxpr.invars)
    outputs = walk(closed.jaxpr, closed.consts, inputs)
    return TracedFunction(inputs, constants, tuple(operations), tuple(outputs), tuple(avals))


def flops(traced: TracedFunction) -> int:
    """Count the FLOPs of matrix products, a scan's body as often as it runs."""
    total = 0
    for operation in traced.operations:
        params = operation.eqn.params
        if operation.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = operation.operand_shape(0)
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * traced.avals[operation.outputs[0]].size
        elif operation.name in ("grouped_product", "grouped_outer"):  # ntkrl.models.grouped
            (rows, width), other = operation.operand_shape(0), operation.operand_shape(1)
            total += 2 * rows * width * other[-1]
        elif operation.name == "scan":
            total += params["length"] * flops(flatten(params["jaxpr"]))
        elif operation.name == "shard_map":
            inner = flatten(ClosedJaxpr(params["jaxpr"], ()))
            total += params["mesh"].size * flops(inner)
    return total


def value_counts(traced: TracedFunction) -> tuple[int, int]:
    """Count the numbers computed on the way.

    Returns:
      `(all, within one iteration of the largest scan)`; without a scan both are the same.
    """
    total = sum(traced.avals[slot].size for o in traced.operations for slot in o.outputs)
    largest = 0
    for operation in traced.operations:
        if operation.name == "scan":
            iteration, _ = value_counts(flatten(operation.eqn.params["jaxpr"]))
            total += iteration * operation.eqn.params["length"]
            largest = max(largest, iteration)
    return total, largest or total


def scan_counts(operation: Operation) -> tuple[int, int]:
    """Return the numbers of constant and of carried operands of a scan."""
    params = operation.eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()  # JAX 0.11 on
    return len(consts), len(carried)


def is_traced(tree: Any) -> bool:
    """Test whether some leaf is a tracer, so that its values are not available."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_inexact(value: Any) -> bool:
    """Test whether a value (or aval) is floating point or complex, so that it has derivatives."""
    return jnp.issubdtype(value.dtype, jnp.inexact)
