"""Construction of kernels: checked arguments, abstract inputs, and the brute-force oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.jaxpr import is_traced
from ntkrl.ntk import parts
from ntkrl.ntk.contexts import Contexts, check_contexts, features_at
from ntkrl.ntk.kernel import Kernel, vocabulary_indices
from ntkrl.ntk.network import (
    Network,
    as_network,
    check_params,
    check_policy_head,
    feature_function,
)
from ntkrl.ntk.problem import KernelOptions, Problem
from ntkrl.numerics import einsum
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
    return DenseKernel(problem) if chosen.algorithm == "dense" else Kernel(problem)


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


class DenseKernel(Kernel):
    """A Kernel by brute force: stacked gradients of all logits. For small models and for tests."""

    def dense(
        self,
        part: str = "full",
        rows: Sequence[int] | Array | None = None,
        columns: Sequence[int] | Array | None = None,
    ) -> Array:
        """Write out blocks of the kernel; see `Kernel.dense`."""
        problem = self.problem
        network, params = problem.network, problem.params
        rows_R = vocabulary_indices(rows, problem.vocab_size, "rows")
        columns_C = vocabulary_indices(columns, problem.vocab_size, "columns")
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        count = problem.observed.count * rows_R.shape[0]
        count += problem.updated.count * columns_C.shape[0]
        problem.check_size((2, size, count), "two Jacobians", "algorithm='auto'")
        left = _role_jacobians(network, params, problem.observed, rows_R)
        right = _role_jacobians(network, params, problem.updated, columns_C)
        roles, weights = problem.part(part)
        head_roles = {network.head.weight: roles.output, network.head.bias: roles.bias}
        total = jnp.zeros(self._shape(rows_R.shape[0], columns_C.shape[0]), problem.dtype)
        for index, name in enumerate(trees.names(params)):
            (head_o, features_o), (head_u, features_u) = (
                [role[index].reshape(*role[index].shape[:2], -1) for role in side]
                for side in (left, right)
            )
            weight: Array | float = 1.0
            if weights is not None:
                shape = jax.tree.leaves(params)[index].shape
                weight = jnp.broadcast_to(weights[index], shape).reshape(-1)[None, None]
            for a, b, included in (
                (head_o, head_u, head_roles.get(name, False)),
                (features_o, features_u, roles.body),
                (head_o, features_u, roles.output_input),
                (features_o, head_u, roles.input_output),
            ):
                if included:
                    total += einsum("ovp,uwp->ouvw", a * weight, b)
        return total

    def apply(self, cotangents: Array, part: str = "full") -> Array:
        """Return Σ_u K(o, u) c_u `[O, V]`; see `Kernel.apply`."""
        count = self.problem.updated.count
        cotangents = self.problem.check_cotangents(cotangents, count, "cotangents")
        return einsum("ouvw,uw->ov", self.dense(part), cotangents)

    def bilinear(
        self,
        left: Array,
        right: Array,
        part: str = "full",
        by: str = "context",
        chunk: int | None = None,
    ) -> Array:
        """Return left_oᵀ K(o, u) right_u; see `Kernel.bilinear`."""
        left = self.problem.check_cotangents(left, self.problem.observed.count, "left")
        right = self.problem.check_cotangents(right, self.problem.updated.count, "right")
        product = einsum("ov,ouvw,uw->ou", left, self.dense(part), right)
        return self.problem.sum_sequences(product) if by == "sequence" else product

    def diagonal(self, part: str = "full") -> Array:
        """Return the entries K_vv(o, u) `[O, U, V]`; see `Kernel.diagonal`."""
        return jnp.diagonal(self.dense(part), axis1=2, axis2=3)

    def trace(self, part: str = "full") -> Array:
        """Return tr K(o, u) `[O, U]`; see `Kernel.trace`."""
        return jnp.sum(self.diagonal(part), axis=-1)


@functools.partial(jax.jit, static_argnames=("network",))
def _role_jacobians(
    network: Network, params: Params, contexts: Contexts, chosen: Array
) -> tuple[list[Array], list[Array]]:
    """Return the gradients of chosen logits in the head's and in the features' role.

    Per leaf of the params `[O, V, *leaf]`.
    """

    def logits(head_role: Params, features_role: Params) -> Array:
        phi_OD = features_at(network, features_role, contexts)
        return network.logits(head_role, phi_OD)[:, chosen]

    head, features = jax.jacrev(logits, argnums=(0, 1))(params, params)
    return jax.tree.leaves(head), jax.tree.leaves(features)
