"""The empirical NTK K(o, u) = ∂z(o)/∂θ (∂z(u)/∂θ)ᵀ of next-token logits, never formed unasked.

The kernel is additive over any partition of θ. With z = h(θ_h, φ(θ_f)), where the same tree plays
the head's role (θ_h) and the features' role (θ_f):

    head   J_h J_hᵀ                 ⟨φ, φ'⟩ I_V for a plain head       (R of the theory)
    body   J_f J_fᵀ                 W M Wᵀ, M = J_φ J_φ'ᵀ              (G)
    cross  J_h J_fᵀ + J_f J_hᵀ      zero unless one leaf plays both roles (tied embeddings)
    full   their sum

A product with K is one VJP and one JVP; M takes D of each per updated context, not V.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import trees
from ntkrl.ntk.contexts import Contexts, checked, features_at
from ntkrl.numerics import at_least_float32
from ntkrl.types import Array, Params, Policy

PARTS = ("head", "body", "cross", "full")
BASIS_CHUNK = 16


def kernel(policy: Policy, params: Params, observed: Contexts, updated: Contexts) -> Kernel:
    """Return the kernel between observed and updated contexts, lazily.

    Args:
      policy: a Policy with a plain head (logits = W φ); only `features`, `head`, `head_weight`
        and `tied` are used.
      params: the params tree, floating point.
      observed: O contexts whose logits are watched.
      updated: U contexts whose loss moves the params.

    Returns:
      A Kernel; nothing is computed yet.

    Raises:
      ValueError: contexts out of range or on padding, params that are not floating point.
    """
    wrong = [
        f"{name} ({leaf.dtype})"
        for name, leaf in trees.named_leaves(params).items()
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(f"params must be floating point; these are not: {', '.join(wrong)}.")
    return Kernel(policy, params, checked(observed, "observed"), checked(updated, "updated"))


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """K(o, u) for O observed and U updated contexts, in forms that never hold V×V unasked."""

    policy: Policy
    params: Params
    observed: Contexts
    updated: Contexts

    @property
    def head(self) -> Array:
        """`[O, U]` inner products ⟨φ(o), φ(u)⟩; the head kernel is this times I_V."""
        return _gram(self.policy, self.params, self.observed, self.updated)

    def body(self, chunk: int = BASIS_CHUNK) -> Array:
        """Return M(o, u) = J_φ(o) J_φ(u)ᵀ; the body kernel is W M Wᵀ.

        Args:
          chunk: feature directions taken at once; bounds memory at about `chunk` params trees.

        Returns:
          `[O, U, D, D]`.
        """
        return _feature_kernel(self.policy, self.params, self.observed, self.updated, chunk)

    def dense(
        self,
        part: str = "full",
        rows: Sequence[int] | Array | None = None,
        columns: Sequence[int] | Array | None = None,
    ) -> Array:
        """Write out blocks of the kernel.

        Args:
          part: one of "head", "body", "cross", "full".
          rows: vocabulary rows wanted (observed side); None for all V.
          columns: vocabulary columns wanted (updated side); None for all V.

        Returns:
          `[O, U, |rows|, |columns|]`.

        Raises:
          ValueError: unknown part, or rows or columns outside the vocabulary.
        """
        _check_part(part)
        vocab = self.policy.vocab_size
        rows_V, columns_V = _indices(rows, vocab, "rows"), _indices(columns, vocab, "columns")
        blocks = []
        if part in ("head", "full"):
            head_OU = self.head
            same_VW = (rows_V[:, None] == columns_V[None, :]).astype(head_OU.dtype)
            blocks.append(jnp.einsum("ou,vw->ouvw", head_OU, same_VW))
        if part in ("body", "full"):
            weight_VD = trees.named_leaves(self.params)[self.policy.head_weight]
            blocks.append(
                jnp.einsum("vd,oude,we->ouvw", weight_VD[rows_V], self.body(), weight_VD[columns_V])
            )
        if part == "cross" or (part == "full" and self.policy.tied):
            blocks.append(self._by_columns("cross", rows_V, columns_V))
        return functools.reduce(jnp.add, blocks)

    def apply(self, cotangents: Array, part: str = "full") -> Array:
        """Return Σ_u K(o, u) c_u: the logit change of each observed context.

        Args:
          cotangents: `[U, V]` direction in logit space per updated context (for a policy
            gradient, the advantage times e_y − π).
          part: one of "head", "body", "cross", "full".

        Returns:
          `[O, V]`.

        Raises:
          ValueError: unknown part or wrong shape.
        """
        _check_part(part)
        self._check_shape(cotangents, self.updated.count, "cotangents")
        return _apply(self.policy, self.params, self.observed, self.updated, cotangents, part)

    def bilinear(self, left: Array, right: Array, part: str = "full") -> Array:
        """Return left_oᵀ K(o, u) right_u.

        Args:
          left: `[O, V]`.
          right: `[U, V]`.
          part: one of "head", "body", "cross", "full".

        Returns:
          `[O, U]`.

        Raises:
          ValueError: unknown part or wrong shapes.
        """
        _check_part(part)
        self._check_shape(left, self.observed.count, "left")
        self._check_shape(right, self.updated.count, "right")
        return _bilinear(self.policy, self.params, self.observed, self.updated, left, right, part)

    def trace(self, part: str = "full") -> Array:
        """Return tr K(o, u): V⟨φ, φ'⟩ for the head, ⟨WᵀW, M⟩ for the body.

        Returns:
          `[O, U]`.

        Raises:
          ValueError: unknown part.
        """
        _check_part(part)
        terms = []
        if part in ("head", "full"):
            terms.append(self.policy.vocab_size * self.head)
        if part in ("body", "full"):
            weight_VD = trees.named_leaves(self.params)[self.policy.head_weight]
            terms.append(jnp.einsum("vd,ve,oude->ou", weight_VD, weight_VD, self.body()))
        if part == "cross" or (part == "full" and self.policy.tied):
            vocab = jnp.arange(self.policy.vocab_size)
            terms.append(jnp.trace(self._by_columns("cross", vocab, vocab), axis1=2, axis2=3))
        return functools.reduce(jnp.add, terms)

    def _by_columns(self, part: str, rows_V: Array, columns_V: Array) -> Array:
        return _columns(
            self.policy, self.params, self.observed, self.updated, rows_V, columns_V, part
        )

    def _check_shape(self, array: Array, count: int, name: str) -> None:
        expected = (count, self.policy.vocab_size)
        if tuple(array.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, not {tuple(array.shape)}.")


def pull_and_push(policy: Policy, params: Params, observed: Contexts, updated: Contexts, part: str):
    """Return the linear map `cotangents [U, V] -> Σ_u K(o, u) c_u [O, V]` of one part.

    For use inside a traced function; contexts must have been checked.
    """
    phi_UD, pull_features = jax.vjp(lambda p: features_at(policy, p, updated), params)
    _, pull_head = jax.vjp(policy.head, params, phi_UD)
    phi_OD, push_features = jax.linearize(lambda p: features_at(policy, p, observed), params)
    _, push_head = jax.linearize(policy.head, params, phi_OD)
    no_params, no_features = jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(phi_OD)

    def through_head(direction: Params) -> Array:
        return push_head(direction, no_features)

    def through_body(direction: Params) -> Array:
        return push_head(no_params, push_features(direction))

    def product(cotangents_UV: Array) -> Array:
        head_role, phi_cotangents_UD = pull_head(cotangents_UV.astype(phi_UD.dtype))
        if part == "head":
            return through_head(head_role)
        (body_role,) = pull_features(phi_cotangents_UD)
        if part == "body":
            return through_body(body_role)
        if part == "cross":
            return through_body(head_role) + through_head(body_role)
        both = jax.tree.map(jnp.add, head_role, body_role)
        return through_head(both) + through_body(both)

    return product


@functools.partial(jax.jit, static_argnames=("policy",))
def _gram(policy: Policy, params: Params, observed: Contexts, updated: Contexts) -> Array:
    phi_OD = at_least_float32(features_at(policy, params, observed))
    phi_UD = at_least_float32(features_at(policy, params, updated))
    return phi_OD @ phi_UD.T


@functools.partial(jax.jit, static_argnames=("policy", "chunk"))
def _feature_kernel(
    policy: Policy, params: Params, observed: Contexts, updated: Contexts, chunk: int
) -> Array:
    phi_UD, pull = jax.vjp(lambda p: features_at(policy, p, updated), params)
    _, push = jax.linearize(lambda p: features_at(policy, p, observed), params)
    count, width = phi_UD.shape

    def column(index: Array) -> Array:
        basis_UD = jnp.zeros(count * width, phi_UD.dtype).at[index].set(1).reshape(count, width)
        return push(pull(basis_UD)[0])

    columns = jax.lax.map(column, jnp.arange(count * width), batch_size=chunk)
    columns_UEOD = columns.reshape(count, width, *columns.shape[1:])
    return jnp.transpose(columns_UEOD, (2, 0, 3, 1))


@functools.partial(jax.jit, static_argnames=("policy", "part"))
def _apply(
    policy: Policy,
    params: Params,
    observed: Contexts,
    updated: Contexts,
    cotangents_UV: Array,
    part: str,
) -> Array:
    return pull_and_push(policy, params, observed, updated, part)(cotangents_UV)


@functools.partial(jax.jit, static_argnames=("policy", "part"))
def _bilinear(
    policy: Policy,
    params: Params,
    observed: Contexts,
    updated: Contexts,
    left_OV: Array,
    right_UV: Array,
    part: str,
) -> Array:
    product = pull_and_push(policy, params, observed, updated, part)

    def one(u: Array) -> Array:
        alone_UV = jnp.zeros_like(right_UV).at[u].set(right_UV[u])
        return jnp.einsum("ov,ov->o", left_OV, product(alone_UV))

    return jax.lax.map(one, jnp.arange(right_UV.shape[0])).T


@functools.partial(jax.jit, static_argnames=("policy", "part"))
def _columns(
    policy: Policy,
    params: Params,
    observed: Contexts,
    updated: Contexts,
    rows_V: Array,
    columns_V: Array,
    part: str,
) -> Array:
    product = pull_and_push(policy, params, observed, updated, part)
    shape = (updated.count, policy.vocab_size)

    def one(index: Array) -> Array:
        u, column = index // columns_V.shape[0], columns_V[index % columns_V.shape[0]]
        dtype = jax.tree.leaves(params)[0].dtype
        return product(jnp.zeros(shape, dtype).at[u, column].set(1))[:, rows_V]

    flat = jax.lax.map(one, jnp.arange(updated.count * columns_V.shape[0]))
    blocks_UWOV = flat.reshape(updated.count, columns_V.shape[0], *flat.shape[1:])
    return jnp.transpose(blocks_UWOV, (2, 0, 3, 1))


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown; known are {', '.join(PARTS)}.")


def _indices(chosen: Sequence[int] | Array | None, vocab: int, name: str) -> Array:
    if chosen is None:
        return jnp.arange(vocab)
    indices = np.asarray(chosen)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"{name} must be a list of token ids, not {indices.dtype} {indices.shape}."
        )
    if indices.size and (indices.min() < 0 or indices.max() >= vocab):
        raise ValueError(
            f"{name} holds ids from {indices.min()} to {indices.max()}; the vocabulary is "
            f"[0, {vocab})."
        )
    return jnp.asarray(indices)
