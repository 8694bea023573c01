"""Construction of kernels from checked arguments, and of their programs from abstract ones."""

from collections.abc import Callable
from typing import Any

import jax

from ntkrl.jaxpr import is_traced
from ntkrl.ntk import parts
from ntkrl.ntk.contexts import Contexts, check_contexts
from ntkrl.ntk.kernel import Kernel
from ntkrl.ntk.network import (
    Network,
    as_network,
    check_params,
    check_policy_head,
    feature_function,
)
from ntkrl.ntk.problem import KernelOptions, Problem
from ntkrl.types import Array, Params, Policy


def kernel(
    model: Policy | Network,
    params: Params,
    observed: Contexts,
    updated: Contexts | None = None,
    **options: Any,
) -> Kernel:
    """Return the kernel between observed and updated contexts, lazily.

    Args:
      model: a Policy, or an `ntk.Network` of your own.
      params: its params tree, floating point, one dtype.
      observed: O contexts whose logits are observed.
      updated: U contexts whose loss moves the params; None for the observed ones, which makes the
        kernel symmetric and halves the work.
      **options: fields of KernelOptions: `groups`, `precondition`, `algorithm`, `forward_mode`,
        `memory_gib`.

    Returns:
      A Kernel; nothing large is computed yet.

    Raises:
      ValueError: contexts out of range or on padding; params that are not floating point, not of
        one dtype or not finite; a head that does not fit; options that do not.
    """
    chosen, network = KernelOptions(**options), as_network(model)
    is_policy = isinstance(model, Policy)
    check_params(network, params)
    if isinstance(model, Policy) and not is_traced(params):
        check_policy_head(model, network, params)
    left = right = check_contexts(observed, "observed", network, params, is_policy)
    if updated is not None and updated is not observed:
        right = check_contexts(updated, "updated", network, params, is_policy)
    if chosen.precondition is not None:
        parts.check_precondition(chosen.precondition, params)
    groups = parts.check_groups(chosen.groups, network, params)
    features = feature_function(network, params, left.tokens, left.mask)
    problem = Problem(network, params, left, right, features, groups, chosen)
    return Kernel(problem)


def kernel_program(
    model: Policy | Network,
    params: Params,
    contexts: Contexts,
    form: Callable[..., Array],
    algorithm: str = "auto",
) -> jax.stages.Wrapped:
    """Return a form of a kernel as a jitted function, to be compiled for abstract arguments.

    Args:
      model: a Policy, or an `ntk.Network` of your own.
      params: shapes with their shardings.
      contexts: shapes of contexts, rows and mask included.
      form: `(kernel, *arrays) -> array`, for instance `lambda K, c: K.apply(c)`.
      algorithm: as in `kernel`.

    Returns:
      Function of `(params, observed, updated, *arrays)`; its contexts are not checked.
    """
    network, options = as_network(model), KernelOptions(algorithm=algorithm)
    features = feature_function(network, params, contexts.tokens, contexts.mask)

    def program(params: Params, observed: Contexts, updated: Contexts, *arrays: Array) -> Array:
        problem = Problem(network, params, observed, updated, features, {}, options)
        return form(Kernel(problem), *arrays)

    return jax.jit(program)
