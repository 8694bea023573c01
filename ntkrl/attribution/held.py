"""What an optimizer did with a gradient, as a linear map: every factor held at what it really was.

An update is followed operation by operation. What depends on the gradient (or on the state, or on
the params: one at a time) is kept where the operation is linear in it. Where an operation is not
(a square, a root, a norm, a product of two things that both depend on it), its result is held: a
number that was what it was. So an update becomes u = P g + Q s + R θ with realised P, Q, R, and
what they do not add up to is a remainder. With c the realised clip factor and η_t the rate:

    sgd         P = −η_t c                                   Q: −η_t μ × the trace before
    adam(w)     P = −η_t c (1−β₁)/(1−β₁ᵗ) / (√v̂_t + ε)       Q: −η_t β₁/(1−β₁ᵗ) m_{t−1} / (√v̂_t + ε)
    adafactor   P = −η_t c / (√v̂_t max(1, rms))              no first moment
    muon        P = −η_t c a N, N the realised polynomial of M Mᵀ that Newton–Schulz multiplies
                the momentum M by, a the share of g in M     Q: the same N, on what M had before

and R: −η_t λ θ of the weight decay. For these five the remainder is rounding. An optimizer that
uses its gradient in no linear way (signs) is all remainder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntkrl.jaxpr import Constant, Operation, TracedFunction, flatten, scan_counts, trace
from ntkrl.types import Array, Params

ADDITIVE = frozenset(
    "add add_any sub neg reduce_sum cumsum convert_element_type copy reshape squeeze expand_dims "
    "transpose rev broadcast_in_dim slice concatenate pad sharding_constraint".split()
)
PRODUCTS = frozenset({"mul", "dot_general"})


class Applied(NamedTuple):
    """The parts of an update.

    push: map of a gradient to its change of the params, linear.
    momentum: change by the optimizer's state from before.
    decay: change by the params themselves.
    """

    push: Callable[[Params], Params]
    momentum: Params
    decay: Params


def applied(
    optimizer: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params
) -> Applied:
    """Return what an update is made of, at the gradient it was made with.

    Args:
      optimizer: the transformation.
      grads: tree like `params`, the gradient that was applied.
      opt_state: the state before.
      params: the trained leaves before.
    """
    given = (grads, opt_state, params)
    program = trace(optimizer.update, *given)
    leaves, treedef = jax.tree.leaves(given), jax.tree.structure(grads)
    first, last = treedef.num_leaves, len(leaves) - treedef.num_leaves
    # of the state, what has gradients in it: neither counts nor settings kept there
    moments = _depend(program, set(program.inputs[:first]))[first:]
    state = [first + number for number, moment in enumerate(moments) if moment]

    def linear(where: Sequence[int]) -> Callable[[Sequence[Array]], Params]:
        def held(moving: list[Array]) -> list[Array]:
            values = dict(enumerate(leaves)) | dict(zip(where, moving, strict=True))
            flags = [number in where for number in values]
            return _run(program, list(values.values()), flags)[0][:first]

        change = jax.linearize(held, [leaves[number] for number in where])[1]
        return lambda moving: jax.tree.unflatten(treedef, change(moving))

    from_grads = linear(range(first))
    return Applied(
        lambda tree: from_grads(jax.tree.leaves(tree)),
        linear(state)([leaves[number] for number in state]),
        linear(range(last, len(leaves)))(leaves[last:]),
    )


def _depend(program: TracedFunction, slots: set[int]) -> list[bool]:
    """Tell which results depend on some of the inputs."""
    for step in program.operations:
        if step.reads & slots:
            slots = slots | set(step.outputs)
    return [not isinstance(slot, Constant) and slot in slots for slot in program.outputs]


def _run(
    program: TracedFunction, values: Sequence[Any], carried: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Run a program; return results, and which of them carry what is followed."""
    found = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
    carrying = {slot for slot, yes in zip(program.inputs, carried, strict=True) if yes}

    def read(slot: int | Constant) -> Any:
        return slot.value if isinstance(slot, Constant) else found[slot]

    def carries(slot: int | Constant) -> bool:
        return not isinstance(slot, Constant) and slot in carrying

    for step in program.operations:
        flags = [carries(slot) for slot in step.inputs]
        if any(flags) and step.eqn.primitive.name == "scan":
            results, kept = _unrolled(step, [read(slot) for slot in step.inputs], flags)
        else:
            results = step.run(read)
            keeps = any(flags) and _is_linear(step, flags)
            kept = [keeps] * len(results)
            if any(flags) and not keeps:
                results = jax.lax.stop_gradient(results)
        found |= zip(step.outputs, results, strict=True)
        carrying |= {slot for slot, yes in zip(step.outputs, kept, strict=True) if yes}
    return [read(slot) for slot in program.outputs], [carries(slot) for slot in program.outputs]


def _is_linear(step: Operation, carried: Sequence[bool]) -> bool:
    name = step.eqn.primitive.name
    if name in PRODUCTS:
        return sum(carried) == 1
    # a quotient in its numerator, a choice in what is chosen from
    if name == "div":
        return not carried[1]
    if name == "integer_pow":
        return step.eqn.params["y"] == 1
    return name in ADDITIVE or (name == "select_n" and not carried[0])


def _unrolled(
    step: Operation, values: Sequence[Any], carried: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Run a scan turn by turn, as what is kept may change from one to the next."""
    params = step.eqn.params
    inner, (first, carried_over) = flatten(params["jaxpr"]), scan_counts(step)
    last = first + carried_over
    carry, flags, turns = list(values[first:last]), list(carried), []
    order = range(params["length"])
    for turn in reversed(order) if params["reverse"] else order:
        here = [*values[:first], *carry, *(x[turn] for x in values[last:])]
        results, kept = _run(inner, here, flags)
        carry, flags[first:last] = results[: last - first], kept[: last - first]
        turns.append((results[last - first :], kept[last - first :]))
    if params["reverse"]:
        turns.reverse()
    made, kept = ([*zip(*column, strict=True)] for column in zip(*turns, strict=True))
    return [*carry, *map(jnp.stack, made)], [*flags[first:last], *map(any, kept)]
