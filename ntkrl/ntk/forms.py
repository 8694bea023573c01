"""The terms of a kernel between two sets of contexts: head, body, and the cross terms of a tie.

With slopes d (see network.py), weights P of W and p of b:

    output         diag_v d_o d_u Σ_k φ_o[k] P[v,k] φ_u[k]        bias    diag_v d_o d_u p[v]
    body           diag(d_o) W M Wᵀ diag(d_u)
    output_input   J_out(o) P J_in(u)ᵀ: entry (v, w) is d_o[v] φ_o · P[v] ∂z_w(u)/∂E_v
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.ntk.contexts import Contexts, features_at
from ntkrl.ntk.jacobian_gram import add_axis
from ntkrl.ntk.network import FeatureFunction, Network
from ntkrl.ntk.parts import Roles, Weights, scale_leaves, used_weights
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params


class HeadInputs(NamedTuple):
    """Contexts at the head.

    features: φ `[O, D]`, float32 or better.
    slopes: d `[O, V]`, or `[1, 1]` without a cap.
    """

    features: Array
    slopes: Array

    def slopes_at(self, rows: Array) -> Array:
        """Return the slopes of vocabulary rows, `[O, |rows|]` or `[1, 1]`."""
        return self.slopes if self.slopes.shape[1] == 1 else self.slopes[:, rows]


class HeadWeights(NamedTuple):
    """The diagonal of P on the head: `[V, D]` and `[V]`, or scalars; None for ones."""

    weight: Array | None
    bias: Array | None

    @property
    def scalar(self) -> bool:
        """True where the head's kernel is a multiple of the identity up to slopes."""
        return all(w is None or not w.ndim for w in self)

    def factors(self) -> tuple[Array, Array]:
        """Return both, 1 for None."""
        weight, bias = (jnp.ones(()) if w is None else w for w in self)
        return weight, bias


class Operands(NamedTuple):
    """The arrays of a kernel's part.

    params, observed, updated: as in `ntk.kernel`.
    left, right: HeadInputs of the observed and the updated contexts.
    weights, head: P on all leaves (None for ones), and on the head.
    """

    params: Params
    observed: Contexts
    updated: Contexts
    left: HeadInputs
    right: HeadInputs
    weights: Weights
    head: HeadWeights

    def swapped(self) -> Operands:
        """Exchange the two sides."""
        return self._replace(
            observed=self.updated, updated=self.observed, left=self.right, right=self.left
        )


@functools.partial(jax.jit, static_argnames=("network",))
def head_inputs(network: Network, params: Params, contexts: Contexts) -> HeadInputs:
    """Compute features and slopes of contexts."""
    phi_OD = at_least_float32(features_at(network, params, contexts))
    return HeadInputs(phi_OD, network.slopes(params, phi_OD))


def head_weights(network: Network, params: Params, weights: Weights) -> HeadWeights:
    """Return the head's weights among those of all leaves, W's as `[V, D]`."""
    if weights is None:
        return HeadWeights(None, None)
    named = dict(zip(trees.names(params), weights, strict=True))
    weight = named[network.head.weight]
    if weight.ndim and network.head.transposed:
        weight = weight.T
    return HeadWeights(weight, None if network.head.bias is None else named[network.head.bias])


def inner_products(operands: Operands, roles: Roles) -> Array:
    """Return `[O, U]`, the head's terms before slopes, for scalar weights."""
    left, right, weights = operands.left, operands.right, operands.head
    total_OU = jnp.zeros((left.features.shape[0], right.features.shape[0]), left.features.dtype)
    if roles.output:
        gram_OU = einsum("od,ud->ou", left.features, right.features)
        total_OU += gram_OU if weights.weight is None else weights.weight * gram_OU
    if roles.bias:
        total_OU += 1.0 if weights.bias is None else weights.bias
    return total_OU


@functools.partial(jax.jit, static_argnames=("roles",))
def head_diagonal(operands: Operands, roles: Roles, rows: Array) -> Array:
    """Return the diagonal of the head's terms at vocabulary rows: `[O, U, |rows|]`."""
    left, right, weights = operands.left, operands.right, operands.head
    slopes_OR, slopes_UR = left.slopes_at(rows), right.slopes_at(rows)
    if weights.scalar:
        inner_OUR = inner_products(operands, roles)[:, :, None]
        inner_OUR = jnp.broadcast_to(inner_OUR, (*inner_OUR.shape[:2], rows.shape[0]))
    else:
        weight, bias = weights.factors()
        shape = (left.features.shape[0], right.features.shape[0], rows.shape[0])
        inner_OUR = jnp.zeros(shape, left.features.dtype)
        if roles.output:
            chosen_RD = weight[rows] if weight.ndim == 2 else weight
            chosen_RD = jnp.broadcast_to(chosen_RD, (rows.shape[0], left.features.shape[1]))
            inner_OUR += einsum("ok,rk,uk->our", left.features, chosen_RD, right.features)
        if roles.bias:
            chosen_R = bias[rows] if bias.ndim else bias
            inner_OUR += jnp.broadcast_to(chosen_R, rows.shape)[None, None]
    return inner_OUR * slopes_OR[:, None] * slopes_UR[None]


@functools.partial(jax.jit, static_argnames=("roles",))
def head_bilinear(operands: Operands, roles: Roles, left_OV: Array, right_UV: Array) -> Array:
    """Return left_oᵀ K_head right_u `[O, U]`."""
    left, right, weights = operands.left, operands.right, operands.head
    left_OV, right_UV = left_OV * left.slopes, right_UV * right.slopes
    if weights.scalar:
        return inner_products(operands, roles) * einsum("ov,uv->ou", left_OV, right_UV)
    weight, bias = weights.factors()
    total_OU = jnp.zeros((left_OV.shape[0], right_UV.shape[0]), left_OV.dtype)
    if roles.output:

        def column(pair: tuple[Array, Array]) -> Array:
            pulled_VD = weight * pair[0][:, None] * pair[1][None, :]
            return einsum("ov,vd,od->o", left_OV, pulled_VD, left.features)

        total_OU += jax.lax.map(column, (right_UV, right.features)).T
    if roles.bias:
        total_OU += einsum("ov,uv->ou", left_OV * _as_row(bias), right_UV)
    return total_OU


@functools.partial(jax.jit, static_argnames=("roles",))
def head_apply(operands: Operands, roles: Roles, cotangents_UV: Array) -> Array:
    """Return Σ_u K_head(o, u) c_u `[O, V]`."""
    left, right, weights = operands.left, operands.right, operands.head
    pulled_UV = cotangents_UV * right.slopes
    if weights.scalar:
        return left.slopes * einsum("ou,uv->ov", inner_products(operands, roles), pulled_UV)
    weight, bias = weights.factors()
    shape = (left.features.shape[0], pulled_UV.shape[1])
    changes_OV = jnp.zeros(shape, pulled_UV.dtype)
    if roles.output:
        direction_VD = weight * einsum("uv,ud->vd", pulled_UV, right.features)
        changes_OV += einsum("od,vd->ov", left.features, direction_VD)
    if roles.bias:
        changes_OV += _as_row(bias) * jnp.sum(pulled_UV, axis=0, keepdims=True)
    return left.slopes * changes_OV


def _as_row(weight: Array) -> Array:
    return weight[None, :] if weight.ndim else weight


@functools.partial(jax.jit, static_argnames=("features", "roles", "forward_mode"))
def body_apply(
    features: FeatureFunction,
    operands: Operands,
    roles: Roles,
    cotangents: Array,
    forward_mode: bool,
) -> Array:
    """Return Σ_u (G + C)(o, u) c_u for `[U, V]` cotangents: `[O, V]`."""
    params, observed, updated, left, right, weights, head = operands
    weight_VD = at_least_float32(features.network.weight(params))
    pulled_UV = cotangents * right.slopes
    changes_OV = jnp.zeros((left.features.shape[0], weight_VD.shape[0]), weight_VD.dtype)
    directions = []
    if roles.body or roles.output_input:
        phi_NTD, pull = features.vjp_fn(params, updated.tokens, updated.mask)
        cotangents_UD = feature_cotangents(features.network, params, right, cotangents)
        cotangents_UD = cotangents_UD.astype(phi_NTD.dtype)
        placed_NTD = jnp.zeros_like(phi_NTD).at[updated.rows, updated.positions].add(cotangents_UD)
        gradient = scale_leaves(pull(placed_NTD), used_weights(weights, features.used))
        if roles.body:
            directions.append(gradient)
        if roles.output_input:
            moved_VD = at_least_float32(features.head_matrix(gradient))
            changes_OV += einsum("od,vd->ov", left.features, moved_VD)
    if roles.input_output:
        moved_VD = einsum("uv,ud->vd", pulled_UV, right.features)
        moved_VD = moved_VD if head.weight is None else moved_VD * head.weight
        directions.append(features.head_direction(moved_VD, params))
    if directions:
        push = features.jvp_fn(params, observed.tokens, observed.mask, forward_mode)
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), directions)
        moved_NTD = push(features.constrain(total))
        moved_OD = at_least_float32(moved_NTD[observed.rows, observed.positions])
        changes_OV += einsum("od,vd->ov", moved_OD, weight_VD)
    return left.slopes * changes_OV


@functools.partial(jax.jit, static_argnames=("network",))
def feature_cotangents(
    network: Network, params: Params, inputs: HeadInputs, cotangents: Array
) -> Array:
    """Return Wᵀ (d ⊙ c) `[O, D]` of `[O, V]` cotangents of the logits."""
    weight_VD = at_least_float32(network.weight(params))
    return einsum("ov,vd->od", cotangents * inputs.slopes, weight_VD)


@functools.partial(jax.jit, static_argnames=("network",))
def body_dense(
    network: Network, operands: Operands, gram: Array, rows: Array, columns: Array
) -> Array:
    """Write out D_o W M Wᵀ D_u at rows and columns from Γ `[O, A, U, B]`.

    The cotangents of a side are the D unit vectors, or the rows of W where those are fewer.
    """
    weight_VD = at_least_float32(network.weight(operands.params))
    width = weight_VD.shape[1]
    if rows.shape[0] >= width:
        gram = einsum("rd,odue->orue", weight_VD[rows], gram)
    if columns.shape[0] >= width:
        gram = einsum("orue,ce->oruc", gram, weight_VD[columns])
    return _between_slopes(operands, jnp.transpose(gram, (0, 2, 1, 3)), rows, columns)


@functools.partial(jax.jit, static_argnames=("network",))
def body_diagonal(network: Network, operands: Operands, body: Array) -> Array:
    """Return the diagonal of D_o W M Wᵀ D_u from M `[O, U, D, D]`: `[O, U, V]`."""
    weight_VD = at_least_float32(network.weight(operands.params))

    def pair(m_DD: Array) -> Array:
        return einsum("vd,vd->v", einsum("vd,de->ve", weight_VD, m_DD), weight_VD)

    flat = jax.lax.map(pair, body.reshape(-1, *body.shape[2:]))
    diagonal_OUV = flat.reshape(*body.shape[:2], -1)
    return diagonal_OUV * operands.left.slopes[:, None] * operands.right.slopes[None]


@functools.partial(jax.jit, static_argnames=("network",))
def body_trace(network: Network, operands: Operands, body: Array) -> Array:
    """Return tr(W M Wᵀ) = ⟨WᵀW, M⟩ `[O, U]` for equal slopes."""
    weight_VD = at_least_float32(network.weight(operands.params))
    gram_DE = einsum("vd,ve->de", weight_VD, weight_VD)
    scale = operands.left.slopes[0, 0] * operands.right.slopes[0, 0]
    return scale * einsum("de,oude->ou", gram_DE, body)


def _between_slopes(operands: Operands, blocks: Array, rows: Array, columns: Array) -> Array:
    """Return diag(d_o) blocks diag(d_u) for `[O, U, |rows|, |columns|]`."""
    slopes_OR, slopes_UC = operands.left.slopes_at(rows), operands.right.slopes_at(columns)
    return blocks * slopes_OR[:, None, :, None] * slopes_UC[None, :, None, :]


@functools.partial(jax.jit, static_argnames=("tied",))
def cross_bilinear(
    tied: FeatureFunction, operands: Operands, left_OV: Array, right_UV: Array
) -> Array:
    """Return left_oᵀ J_out(o) J_in(u)ᵀ right_u `[O, U]`; `tied` has the tied matrix alone."""
    cotangents_UD = feature_cotangents(tied.network, operands.params, operands.right, right_UV)
    scaled_OV = left_OV * operands.left.slopes

    def reduce(moved_VO: Array, index: Array) -> Array:
        return einsum("ov,vo->o", scaled_OV, moved_VO)

    return _map_output_changes(tied, operands, cotangents_UD[:, None], reduce)[:, 0].T


@functools.partial(jax.jit, static_argnames=("tied",))
def cross_dense(tied: FeatureFunction, operands: Operands, rows: Array, columns: Array) -> Array:
    """Return rows and columns of J_out(o) J_in(u)ᵀ: `[O, U, |rows|, |columns|]`."""
    weight_CD = at_least_float32(tied.network.weight(operands.params))[columns]
    few = columns.shape[0] < weight_CD.shape[1]
    count = operands.updated.positions.shape[0]
    cotangents = jnp.broadcast_to(weight_CD[None], (count, *weight_CD.shape)) if few else None
    changes = _map_output_changes(
        tied, operands, cotangents, lambda moved_VO, index: moved_VO[rows]
    )
    if not few:
        changes = einsum("uero,ce->ucro", changes, weight_CD)
    return _between_slopes(operands, jnp.transpose(changes, (3, 0, 2, 1)), rows, columns)


@functools.partial(jax.jit, static_argnames=("tied",))
def cross_diagonal(tied: FeatureFunction, operands: Operands) -> Array:
    """Return the diagonal of J_out(o) J_in(u)ᵀ: `[O, U, V]`."""
    weight_VD = at_least_float32(tied.network.weight(operands.params))

    def reduce(moved_VO: Array, index: Array) -> Array:
        return moved_VO * weight_VD[:, index][:, None]

    changes_UVO = _map_output_changes(tied, operands, None, reduce, summed=True)
    diagonal_OUV = jnp.transpose(changes_UVO, (2, 0, 1))
    return diagonal_OUV * operands.left.slopes[:, None] * operands.right.slopes[None]


def _map_output_changes(
    tied: FeatureFunction,
    operands: Operands,
    cotangents: Array | None,
    reduce: Callable[[Array, Array], Array],
    summed: bool = False,
) -> Array:
    """Map cotangents of updated features to the tied matrix, and on to the observed logits.

    Args:
      tied: the features as a function of the tied matrix alone.
      operands: the two sides.
      cotangents: `[U, B, D]`; None for the D unit vectors.
      reduce: applied to `[V, O]`, the change of the logits at every observed context before
        slopes, and the index of the cotangent.
      summed: sum the results over the B cotangents.

    Returns:
      `[U, B, …]`, or `[U, …]` when summed.
    """
    params, updated, phi_OD = operands.params, operands.updated, operands.left.features
    weight, width = operands.head.weight, phi_OD.shape[1]

    def context(arrays: tuple[Any, Array, Array, Array | None]) -> Array:
        tokens, mask, position, cotangents_BD = arrays
        phi, pull = tied.vjp_fn(params, add_axis(tokens), mask[None])

        def change(index: Array) -> Array:
            cotangent_D = (
                jnp.zeros(width).at[index].set(1) if cotangents_BD is None else cotangents_BD[index]
            )
            leaves = pull(jnp.zeros_like(phi).at[0, position].set(cotangent_D.astype(phi.dtype)))
            moved_VD = at_least_float32(tied.head_matrix(leaves))
            moved_VD = moved_VD if weight is None else moved_VD * weight
            return reduce(einsum("vd,od->vo", moved_VD, phi_OD), index)

        count = width if cotangents_BD is None else cotangents_BD.shape[0]
        if not summed:
            return jax.lax.map(change, jnp.arange(count))
        shape = jax.eval_shape(change, jnp.zeros((), int))
        return jax.lax.fori_loop(
            0, count, lambda i, total: total + change(i), jnp.zeros(shape.shape, shape.dtype)
        )

    data = (updated.tokens, updated.mask)
    tokens, mask = jax.tree.map(lambda leaf: leaf[updated.rows], data)
    return jax.lax.map(context, (tokens, mask, updated.positions, cotangents))
