"""The linear map of a ledger from a gradient to its change of the params.

`linearize_update` writes an update as P g + Q s + R θ of gradient g, state s and params θ.
Operations that are linear in one of the three are kept; the result of any other (a square, a root,
a norm, a product of two operands that both depend on it) is a constant at its realised value. With
c the realised clip factor and η_t the learning rate:

    sgd         P = −η_t c                                   Q: −η_t μ × the previous trace
    adam(w)     P = −η_t c (1−β₁)/(1−β₁ᵗ) / (√v̂_t + ε)       Q: −η_t β₁/(1−β₁ᵗ) m_{t−1} / (√v̂_t + ε)
    adafactor   P = −η_t c / (√v̂_t max(1, rms))              no first moment
    muon        P = −η_t c a N, N the realised polynomial of M Mᵀ that Newton–Schulz multiplies
                the momentum M by, a the share of g in M     Q: the same N, on the previous M

and R: −η_t λ θ of the weight decay, to rounding. An optimizer that uses its gradient in no linear
way (signs) is all remainder.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntkrl.jaxpr import Constant, Operation, TracedFunction, flatten, scan_counts, trace
from ntkrl.types import Array, Params

# primitives that are linear in all operands together, or in one of them
ADDITIVE = frozenset(
    "add add_any sub neg reduce_sum cumsum convert_element_type copy reshape squeeze expand_dims "
    "transpose rev broadcast_in_dim slice concatenate pad sharding_constraint".split()
)
PRODUCTS = frozenset({"mul", "dot_general"})


class LinearizedUpdate(NamedTuple):
    """An optimizer's update as the sum P g + Q s + R θ.

    from_gradient: P, the linear map from a gradient to its change of the params.
    momentum: Q s, the change by the optimizer state.
    decay: R θ, the change by the params themselves.
    """

    from_gradient: Callable[[Params], Params]
    momentum: Params
    decay: Params


def linearize_update(
    optimizer: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params
) -> LinearizedUpdate:
    """Linearize the update of a gradient at the state and params (trained leaves) before it."""
    arguments = (grads, opt_state, params)
    traced = trace(optimizer.update, *arguments)
    leaves, treedef = jax.tree.leaves(arguments), jax.tree.structure(grads)
    first = len(jax.tree.leaves(grads))
    last = len(leaves) - first
    # the moments of a state are its entries that depend on gradients: no counts, no settings
    moments = _depend_on(traced, set(traced.inputs[:first]))[first:]
    state = [first + number for number, is_moment in enumerate(moments) if is_moment]

    def linear_in(indices: Sequence[int]) -> Callable[[Sequence[Array]], Params]:
        def update(operands: list[Array]) -> list[Array]:
            values = dict(enumerate(leaves)) | dict(zip(indices, operands, strict=True))
            flags = [number in indices for number in values]
            return _evaluate(traced, list(values.values()), flags)[0][:first]

        change = jax.linearize(update, [leaves[number] for number in indices])[1]
        return lambda operands: jax.tree.unflatten(treedef, change(operands))

    from_gradient = linear_in(range(first))
    return LinearizedUpdate(
        lambda tree: from_gradient(jax.tree.leaves(tree)),
        linear_in(state)([leaves[number] for number in state]),
        linear_in(range(last, len(leaves)))(leaves[last:]),
    )


def with_realised_factors(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Return the optimizer with derivatives through the linear operations of its update alone.

    Linear in gradients, state and params together; others, such as √v and the clip factor, are
    constants at their realised values. Its values are unchanged.
    """

    def update(grads: Params, opt_state: Any, params: Params | None = None) -> tuple[Params, Any]:
        arguments = (grads, opt_state, params)
        traced = trace(optimizer.update, *arguments)
        leaves = jax.tree.leaves(arguments)
        results, _ = _evaluate(traced, leaves, [True] * len(leaves))
        return jax.tree.unflatten(jax.tree.structure((grads, opt_state)), results)

    return optax.GradientTransformation(optimizer.init, update)


def with_finite_roots(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer with derivative 0, not ∞, of √v where v = 0; its values are unchanged.

    There all gradients so far were 0, as those of tokens that have not occurred.
    """

    def update(grads: Params, opt_state: Any, params: Params | None = None) -> tuple[Params, Any]:
        arguments = (grads, opt_state, params)
        traced = trace(optimizer.update, *arguments)
        inputs = zip(traced.inputs, jax.tree.leaves(arguments), strict=True)
        values = {**traced.constants, **dict(inputs)}

        def read(slot: int | Constant) -> Any:
            return slot.value if isinstance(slot, Constant) else values[slot]

        for operation in traced.operations:
            if operation.name == "sqrt":
                square = read(operation.inputs[0])
                root = jnp.sqrt(jnp.where(square > 0, square, 1))
                results = [jnp.where(square > 0, root, jnp.sqrt(jax.lax.stop_gradient(square)))]
            else:
                results = operation.run(read)
            values |= zip(operation.outputs, results, strict=True)
        results = [read(slot) for slot in traced.outputs]
        return jax.tree.unflatten(jax.tree.structure((grads, opt_state)), results)

    return optax.GradientTransformation(optimizer.init, update)


def _depend_on(traced: TracedFunction, slots: set[int]) -> list[bool]:
    """Flag the results that depend on some of the inputs."""
    for operation in traced.operations:
        if operation.reads & slots:
            slots = slots | set(operation.outputs)
    return [not isinstance(slot, Constant) and slot in slots for slot in traced.outputs]


def _evaluate(
    traced: TracedFunction, inputs: Sequence[Any], flags: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Evaluate a function, with gradients stopped where it is not linear in the flagged inputs.

    Returns:
      The results, and flags of those that are linear in the flagged inputs.
    """
    values = {**traced.constants, **dict(zip(traced.inputs, inputs, strict=True))}
    linear = {slot for slot, flag in zip(traced.inputs, flags, strict=True) if flag}

    def read(slot: int | Constant) -> Any:
        return slot.value if isinstance(slot, Constant) else values[slot]

    def is_flagged(slot: int | Constant) -> bool:
        return not isinstance(slot, Constant) and slot in linear

    for operation in traced.operations:
        flags = [is_flagged(slot) for slot in operation.inputs]
        if any(flags) and operation.name == "scan":
            results, flags = _unroll_scan(
                operation, [read(slot) for slot in operation.inputs], flags
            )
        else:
            results = operation.run(read)
            keeps = any(flags) and _is_linear(operation, flags)
            if any(flags) and not keeps:
                results = jax.lax.stop_gradient(results)
            flags = [keeps] * len(results)
        values |= zip(operation.outputs, results, strict=True)
        linear |= {slot for slot, flag in zip(operation.outputs, flags, strict=True) if flag}
    return [read(slot) for slot in traced.outputs], [is_flagged(slot) for slot in traced.outputs]


def _is_linear(operation: Operation, flags: Sequence[bool]) -> bool:
    name = operation.name
    if name in PRODUCTS:
        return sum(flags) == 1
    # a quotient is linear in its numerator, a selection in its cases
    if name == "div":
        return not flags[1]
    if name == "integer_pow":
        return operation.eqn.params["y"] == 1
    return name in ADDITIVE or (name == "select_n" and not flags[0])


def _unroll_scan(
    operation: Operation, values: Sequence[Any], flags: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Run a scan unrolled: which of its carry is linear may change between iterations."""
    params = operation.eqn.params
    body, (first, carried) = flatten(params["jaxpr"]), scan_counts(operation)
    last = first + carried
    carry, flags, outputs = list(values[first:last]), list(flags), []
    order = range(params["length"])
    for index in reversed(order) if params["reverse"] else order:
        operands = [*values[:first], *carry, *(x[index] for x in values[last:])]
        results, linear = _evaluate(body, operands, flags)
        carry, flags[first:last] = results[:carried], linear[:carried]
        outputs.append((results[carried:], linear[carried:]))
    if params["reverse"]:
        outputs.reverse()
    stacked = [jnp.stack(values) for values in zip(*(o[0] for o in outputs), strict=True)]
    linear = [any(flags) for flags in zip(*(o[1] for o in outputs), strict=True)]
    return [*carry, *stacked], [*flags[first:last], *linear]
