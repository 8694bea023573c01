"""The brute-force algorithm, an oracle: every form from V Jacobian rows per context."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ntkrl.ntk.contexts import Contexts, features_at
from ntkrl.ntk.kernel import Kernel
from ntkrl.ntk.network import Network
from ntkrl.ntk.parts import Roles
from ntkrl.ntk.problem import vocabulary_indices
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params

Gradients = list[Array]
"""Per leaf of the params `[O, V, *leaf]`."""


class RowsKernel(Kernel):
    """A Kernel that stacks the gradients of all logits; for small models and for checking."""

    def dense(
        self,
        part: str = "full",
        rows: Sequence[int] | Array | None = None,
        columns: Sequence[int] | Array | None = None,
    ) -> Array:
        """Write out blocks of the kernel; see `Kernel.dense`."""
        rows_R = vocabulary_indices(rows, self.vocab_size, "rows")
        columns_C = vocabulary_indices(columns, self.vocab_size, "columns")
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        count = self.observed.count * rows_R.shape[0] + self.updated.count * columns_C.shape[0]
        self.afford(2 * size * count, "two Jacobians", "algorithm='auto'")
        left = _role_jacobians(self.network, self.params, self.observed, rows_R)
        right = _role_jacobians(self.network, self.params, self.updated, columns_C)
        found = self.part(part)
        heads = {
            self._index(self.network.head.weight): found.roles.output,
            self._index(self.network.head.bias): found.roles.bias,
        }
        return _contracted(left, right, found.weights, found.roles, tuple(heads.items()))

    def _index(self, name: str | None) -> int:
        names = self.leaf_names
        return names.index(name) if name in names else -1

    def apply(self, cotangents: Array, part: str = "full") -> Array:
        """Return Σ_u K(o, u) c_u `[O, V]`; see `Kernel.apply`."""
        cotangents = self.cotangents(cotangents, self.updated.count, "cotangents")
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
        left = self.cotangents(left, self.observed.count, "left")
        right = self.cotangents(right, self.updated.count, "right")
        found = einsum("ov,ouvw,uw->ou", left, self.dense(part), right)
        return self.by_sequence(found) if by == "sequence" else found

    def diagonal(self, part: str = "full") -> Array:
        """Return the entries K_vv(o, u) `[O, U, V]`; see `Kernel.diagonal`."""
        return jnp.diagonal(self.dense(part), axis1=2, axis2=3)

    def trace(self, part: str = "full") -> Array:
        """Return tr K(o, u) `[O, U]`; see `Kernel.trace`."""
        return jnp.sum(self.diagonal(part), axis=-1)


@functools.partial(jax.jit, static_argnames=("network",))
def _role_jacobians(
    network: Network, params: Params, contexts: Contexts, chosen: Array
) -> tuple[Gradients, Gradients]:
    """Return the gradients of chosen logits in the head's and in the features' role."""

    def logits(head_role: Params, features_role: Params) -> Array:
        phi_OD = features_at(network, features_role, contexts)
        return network.logits(head_role, phi_OD)[:, chosen]

    found = jax.jacrev(logits, argnums=(0, 1))(params, params)
    return tuple(jax.tree.leaves(role) for role in found)


@functools.partial(jax.jit, static_argnames=("roles", "heads"))
def _contracted(
    left: tuple[Gradients, Gradients],
    right: tuple[Gradients, Gradients],
    weights: tuple[Array, ...] | None,
    roles: Roles,
    heads: tuple[tuple[int, bool], ...],
) -> Array:
    in_head, total = dict(heads), 0.0
    for index in range(len(left[0])):
        here, there = ([role[index] for role in side] for side in (left, right))
        weight = jnp.ones(()) if weights is None else weights[index]
        wanted = [
            (0, 0, in_head[index] if index in in_head else False),
            (1, 1, roles.body),
            (0, 1, roles.output_input),
            (1, 0, roles.input_output),
        ]
        for first, second, asked in wanted:
            if asked:
                scaled = here[first] * (weight[None, None] if weight.ndim else weight)
                flat = [array.reshape(*array.shape[:2], -1) for array in (scaled, there[second])]
                total += einsum("ovp,uwp->ouvw", *flat)
    return total
