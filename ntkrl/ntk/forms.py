"""Products with what passes through the features, and the cross terms of a tie, jitted."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.ntk.body import Body
from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.gradients import puller, pusher, weighted
from ntkrl.ntk.heads import HeadWeights, Reading, slopes_at, through_input
from ntkrl.ntk.network import Network
from ntkrl.ntk.parts import Roles, leaf_weights
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params


class Operands(NamedTuple):
    """The arrays of a kernel's part.

    params, observed, updated: as given to `kernel`.
    left, right: observed and updated contexts as the head sees them.
    weights, head: P on all leaves (None for ones), and on the head.
    """

    params: Params
    observed: Contexts
    updated: Contexts
    left: Reading
    right: Reading
    weights: tuple[Array, ...] | None
    head: HeadWeights

    def swapped(self) -> Operands:
        """Exchange the two sides."""
        return self._replace(
            observed=self.updated, updated=self.observed, left=self.right, right=self.left
        )


@functools.partial(jax.jit, static_argnames=("body", "roles", "forward_mode"))
def body_apply(
    body: Body, operands: Operands, cotangents: Array, roles: Roles, forward_mode: bool
) -> Array:
    """Return Σ_u (G + C)(o, u) c_u for `[U, V]` cotangents: `[O, V]`."""
    params, observed, updated, left, right, weights, head = operands
    weight_VD = at_least_float32(body.network.weight(params))
    pulled_UV = cotangents * right.slopes
    changes_OV = jnp.zeros((left.features.shape[0], weight_VD.shape[0]), weight_VD.dtype)
    directions = []
    if roles.body or roles.output_input:
        phi_NTD, pull = puller(body, params, updated.tokens, updated.mask)
        vectors_UD = feature_cotangents(body.network, params, right, cotangents)
        vectors_UD = vectors_UD.astype(phi_NTD.dtype)
        placed_NTD = jnp.zeros_like(phi_NTD).at[updated.rows, updated.positions].add(vectors_UD)
        gradient = weighted(pull(placed_NTD), leaf_weights(weights, body.used))
        if roles.body:
            directions.append(gradient)
        if roles.output_input:
            moved_VD = at_least_float32(body.of_head(gradient))
            changes_OV += einsum("od,vd->ov", left.features, moved_VD)
    if roles.input_output:
        moved_VD = einsum("uv,ud->vd", pulled_UV, right.features)
        moved_VD = moved_VD if head.weight is None else moved_VD * head.weight
        directions.append(body.from_head(moved_VD, params))
    if directions:
        push = pusher(body, params, observed.tokens, observed.mask, forward_mode)
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), directions)
        moved_OD = at_least_float32(push(body.pinned(total))[observed.rows, observed.positions])
        changes_OV += einsum("od,vd->ov", moved_OD, weight_VD)
    return left.slopes * changes_OV


@functools.partial(jax.jit, static_argnames=("network",))
def feature_cotangents(
    network: Network, params: Params, reading: Reading, cotangents: Array
) -> Array:
    """Return Wᵀ (d ⊙ c) `[O, D]` of `[O, V]` cotangents of the logits."""
    weight_VD = at_least_float32(network.weight(params))
    return einsum("ov,vd->od", cotangents * reading.slopes, weight_VD)


@functools.partial(jax.jit, static_argnames=("tied",))
def cross_bilinear(tied: Body, operands: Operands, left_OV: Array, right_UV: Array) -> Array:
    """Return left_oᵀ J_out(o) J_in(u)ᵀ right_u `[O, U]`; `tied` uses the tied matrix alone."""
    vectors_UD = feature_cotangents(tied.network, operands.params, operands.right, right_UV)
    scaled_OV = left_OV * operands.left.slopes

    def reduce(moved_VO: Array, index: Array) -> Array:
        return einsum("ov,vo->o", scaled_OV, moved_VO)

    found_UBO = _through(tied, operands, vectors_UD[:, None], reduce)
    return found_UBO[:, 0].T


@functools.partial(jax.jit, static_argnames=("tied",))
def cross_dense(tied: Body, operands: Operands, rows: Array, columns: Array) -> Array:
    """Return rows and columns of J_out(o) J_in(u)ᵀ: `[O, U, |rows|, |columns|]`."""
    weight_CD = at_least_float32(tied.network.weight(operands.params))[columns]
    few = columns.shape[0] < weight_CD.shape[1]
    count = operands.updated.positions.shape[0]
    vectors = jnp.broadcast_to(weight_CD[None], (count, *weight_CD.shape)) if few else None
    found_UBRO = _through(tied, operands, vectors, lambda moved_VO, index: moved_VO[rows])
    if not few:
        found_UBRO = einsum("uero,ce->ucro", found_UBRO, weight_CD)
    return _between_slopes(operands, jnp.transpose(found_UBRO, (3, 0, 2, 1)), rows, columns)


@functools.partial(jax.jit, static_argnames=("tied",))
def cross_diagonal(tied: Body, operands: Operands) -> Array:
    """Return the diagonal of J_out(o) J_in(u)ᵀ: `[O, U, V]`."""
    weight_VD = at_least_float32(tied.network.weight(operands.params))

    def reduce(moved_VO: Array, index: Array) -> Array:
        return moved_VO * weight_VD[:, index][:, None]

    found_UVO = _through(tied, operands, None, reduce, summed=True)
    diagonal_OUV = jnp.transpose(found_UVO, (2, 0, 1))
    return diagonal_OUV * operands.left.slopes[:, None] * operands.right.slopes[None]


@functools.partial(jax.jit, static_argnames=("network",))
def body_dense(
    network: Network, operands: Operands, found: Array, rows: Array, columns: Array
) -> Array:
    """Write out D_o W M Wᵀ D_u at rows and columns from M `[O, D, U, D]`, or what M became.

    A side that already holds entries of the vocabulary instead of unit vectors is as wide as its
    list of tokens; it is told by `found` having that width and not D.
    """
    weight_VD = at_least_float32(network.weight(operands.params))
    width = weight_VD.shape[1]
    if rows.shape[0] >= width:
        found = einsum("rd,odue->orue", weight_VD[rows], found)
    if columns.shape[0] >= width:
        found = einsum("orue,ce->oruc", found, weight_VD[columns])
    return _between_slopes(operands, jnp.transpose(found, (0, 2, 1, 3)), rows, columns)


@functools.partial(jax.jit, static_argnames=("network",))
def body_diagonal(network: Network, operands: Operands, found: Array) -> Array:
    """Return the diagonal of D_o W M Wᵀ D_u from M `[O, U, D, D]`: `[O, U, V]`."""
    weight_VD = at_least_float32(network.weight(operands.params))

    def pair(m_DD: Array) -> Array:
        return einsum("vd,vd->v", einsum("vd,de->ve", weight_VD, m_DD), weight_VD)

    flat = jax.lax.map(pair, found.reshape(-1, *found.shape[2:]))
    diagonal_OUV = flat.reshape(*found.shape[:2], -1)
    return diagonal_OUV * operands.left.slopes[:, None] * operands.right.slopes[None]


@functools.partial(jax.jit, static_argnames=("network",))
def body_trace(network: Network, operands: Operands, found: Array) -> Array:
    """Return tr(W M Wᵀ) = ⟨WᵀW, M⟩ `[O, U]` for equal slopes."""
    weight_VD = at_least_float32(network.weight(operands.params))
    gram_DE = einsum("vd,ve->de", weight_VD, weight_VD)
    scale = operands.left.slopes[0, 0] * operands.right.slopes[0, 0]
    return scale * einsum("de,oude->ou", gram_DE, found)


def _between_slopes(operands: Operands, blocks: Array, rows: Array, columns: Array) -> Array:
    """Return diag(d_o) blocks diag(d_u) for `[O, U, |rows|, |columns|]`."""
    slopes_OR = slopes_at(operands.left.slopes, rows)
    slopes_UC = slopes_at(operands.right.slopes, columns)
    return blocks * slopes_OR[:, None, :, None] * slopes_UC[None, :, None, :]


def _through(tied: Body, operands: Operands, vectors, reduce, summed: bool = False) -> Array:
    return through_input(
        tied,
        operands.params,
        operands.left,
        operands.updated,
        vectors,
        operands.head,
        reduce,
        summed,
    )
