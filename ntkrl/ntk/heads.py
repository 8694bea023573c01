"""The head's own terms of a kernel: its output role, its bias, and what a tie adds.

With slopes d (see network.py), weights P of W and p of b:

    output         diag_v d_o d_u Σ_k φ_o[k] P[v,k] φ_u[k]        bias    diag_v d_o d_u p[v]
    output_input   J_out(o) P J_in(u)ᵀ: entry (v, w) is d_o[v] φ_o · P[v] ∂z_w(u)/∂E_v
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.ntk.body import Body
from ntkrl.ntk.contexts import Contexts, features_at
from ntkrl.ntk.gradients import puller
from ntkrl.ntk.network import Network
from ntkrl.ntk.parts import Roles
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params


class Reading(NamedTuple):
    """Contexts as the head sees them.

    features: φ `[O, D]`, float32 or better.
    slopes: d `[O, V]`, or `[1, 1]` without a cap.
    """

    features: Array
    slopes: Array


class HeadWeights(NamedTuple):
    """The diagonal of P on the head: `[V, D]` and `[V]`, or scalars; None for ones."""

    weight: Array | None
    bias: Array | None


@functools.partial(jax.jit, static_argnames=("network",))
def reading(network: Network, params: Params, contexts: Contexts) -> Reading:
    """Read features and slopes of contexts."""
    phi_OD = at_least_float32(features_at(network, params, contexts))
    return Reading(phi_OD, network.slopes(params, phi_OD))


def head_weights(
    network: Network, params: Params, weights: tuple[Array, ...] | None
) -> HeadWeights:
    """Pick the head's weights out of those of all leaves, W's as `[V, D]`."""
    if weights is None:
        return HeadWeights(None, None)
    named = dict(zip(trees.names(params), weights, strict=True))
    weight = named[network.head.weight]
    if weight.ndim and network.head.transposed:
        weight = weight.T
    return HeadWeights(weight, None if network.head.bias is None else named[network.head.bias])


def is_scalar(weights: HeadWeights) -> bool:
    """Whether the output term is a multiple of the identity up to slopes."""
    return all(w is None or not w.ndim for w in weights)


def inner_products(
    left: Reading, right: Reading, weights: HeadWeights, roles: Roles, has_bias: bool
) -> Array:
    """Return `[O, U]`, the head's terms before slopes, for scalar weights."""
    total_OU = jnp.zeros((left.features.shape[0], right.features.shape[0]), left.features.dtype)
    if roles.output:
        gram_OU = einsum("od,ud->ou", left.features, right.features)
        total_OU += gram_OU if weights.weight is None else weights.weight * gram_OU
    if roles.bias and has_bias:
        total_OU += 1.0 if weights.bias is None else weights.bias
    return total_OU


@functools.partial(jax.jit, static_argnames=("roles", "has_bias"))
def head_diagonal(
    left: Reading, right: Reading, weights: HeadWeights, roles: Roles, has_bias: bool, rows: Array
) -> Array:
    """Return the diagonal of the head's terms at vocabulary rows: `[O, U, |rows|]`."""
    slopes_OR, slopes_UR = slopes_at(left.slopes, rows), slopes_at(right.slopes, rows)
    if is_scalar(weights):
        inner_OUR = inner_products(left, right, weights, roles, has_bias)[:, :, None]
        inner_OUR = jnp.broadcast_to(inner_OUR, (*inner_OUR.shape[:2], rows.shape[0]))
    else:
        shape = (left.features.shape[0], right.features.shape[0], rows.shape[0])
        inner_OUR = jnp.zeros(shape, left.features.dtype)
        if roles.output:
            chosen_RD = weights.weight[rows] if weights.weight.ndim == 2 else weights.weight
            chosen_RD = jnp.broadcast_to(chosen_RD, (rows.shape[0], left.features.shape[1]))
            inner_OUR += einsum("ok,rk,uk->our", left.features, chosen_RD, right.features)
        if roles.bias and has_bias:
            chosen_R = weights.bias[rows] if weights.bias.ndim else weights.bias
            inner_OUR += jnp.broadcast_to(chosen_R, rows.shape)[None, None]
    return inner_OUR * slopes_OR[:, None] * slopes_UR[None]


@functools.partial(jax.jit, static_argnames=("roles", "has_bias"))
def head_bilinear(
    left: Reading,
    right: Reading,
    weights: HeadWeights,
    roles: Roles,
    has_bias: bool,
    left_OV: Array,
    right_UV: Array,
) -> Array:
    """Return left_oᵀ K_head right_u `[O, U]`."""
    left_OV, right_UV = left_OV * left.slopes, right_UV * right.slopes
    if is_scalar(weights):
        inner_OU = inner_products(left, right, weights, roles, has_bias)
        return inner_OU * einsum("ov,uv->ou", left_OV, right_UV)
    total_OU = jnp.zeros((left_OV.shape[0], right_UV.shape[0]), left_OV.dtype)
    if roles.output:

        def one(row: tuple[Array, Array]) -> Array:
            pulled_VD = weights.weight * row[0][:, None] * row[1][None, :]
            return einsum("ov,vd,od->o", left_OV, pulled_VD, left.features)

        total_OU += jax.lax.map(one, (right_UV, right.features)).T
    if roles.bias and has_bias:
        total_OU += einsum("ov,uv->ou", left_OV * _row(weights.bias), right_UV)
    return total_OU


@functools.partial(jax.jit, static_argnames=("roles", "has_bias"))
def head_apply(
    left: Reading,
    right: Reading,
    weights: HeadWeights,
    roles: Roles,
    has_bias: bool,
    cotangents_UV: Array,
) -> Array:
    """Return Σ_u K_head(o, u) c_u `[O, V]`."""
    pulled_UV = cotangents_UV * right.slopes
    if is_scalar(weights):
        inner_OU = inner_products(left, right, weights, roles, has_bias)
        return left.slopes * einsum("ou,uv->ov", inner_OU, pulled_UV)
    shape = (left.features.shape[0], pulled_UV.shape[1])
    changes_OV = jnp.zeros(shape, pulled_UV.dtype)
    if roles.output:
        direction_VD = weights.weight * einsum("uv,ud->vd", pulled_UV, right.features)
        changes_OV += einsum("od,vd->ov", left.features, direction_VD)
    if roles.bias and has_bias:
        changes_OV += _row(weights.bias) * jnp.sum(pulled_UV, axis=0, keepdims=True)
    return left.slopes * changes_OV


def slopes_at(slopes: Array, rows: Array) -> Array:
    """Return the slopes of vocabulary rows, `[O, |rows|]` or `[1, 1]`."""
    return slopes if slopes.shape[1] == 1 else slopes[:, rows]


def _row(weight: Array) -> Array:
    return weight[None, :] if weight.ndim else weight


def through_input(
    body: Body,
    params: Params,
    observed: Reading,
    updated: Contexts,
    vectors: Array | None,
    weights: HeadWeights,
    reduce: Callable[[Array, Array], Array],
    summed: bool = False,
) -> Array:
    """Take directions of updated features back to the tied matrix and out at observed ones.

    Args:
      body: a Body whose one used leaf is the tied matrix.
      params, observed, updated: the two sides.
      vectors: `[U, B, D]`; None for the D unit vectors.
      weights: P on the tied matrix.
      reduce: maps `[V, O]`, the change of J_out at every observed context before slopes, and the
        index of the direction to what is kept of it.
      summed: add the results of the B directions up.

    Returns:
      `[U, B, …]`, or `[U, …]` when summed.
    """
    width = observed.features.shape[1]

    def context(row: tuple[Any, Array, Array, Array | None]) -> Array:
        tokens, mask, position, vectors_BD = row
        one = jax.tree.map(lambda leaf: leaf[None], tokens)
        phi, pull = puller(body, params, one, mask[None])

        def direction(index: Array) -> Array:
            vector_D = (
                jnp.zeros(width).at[index].set(1) if vectors_BD is None else vectors_BD[index]
            )
            (leaf,) = pull(jnp.zeros_like(phi).at[0, position].set(vector_D.astype(phi.dtype)))
            stored_VD = leaf.T if body.network.head.transposed else leaf
            moved_VD = at_least_float32(stored_VD)
            moved_VD = moved_VD if weights.weight is None else moved_VD * weights.weight
            return reduce(einsum("vd,od->vo", moved_VD, observed.features), index)

        count = width if vectors_BD is None else vectors_BD.shape[0]
        if not summed:
            return jax.lax.map(direction, jnp.arange(count))
        shape = jax.eval_shape(direction, jnp.zeros((), int))
        return jax.lax.fori_loop(
            0, count, lambda i, total: total + direction(i), jnp.zeros(shape.shape, shape.dtype)
        )

    tokens = jax.tree.map(lambda leaf: leaf[updated.rows], updated.tokens)
    rows = (tokens, updated.mask[updated.rows], updated.positions, vectors)
    return jax.lax.map(context, rows)
