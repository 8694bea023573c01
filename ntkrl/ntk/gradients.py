"""The two algorithms by parameter-sized gradients, and the products with J they are made of.

    products    Γ column by column: one VJP of an updated direction, one JVP at all observed ones
    jacobians   gradients of both sides side by side, contracted over the parameters

Only `products` needs forward-mode derivatives, or the double-VJP form in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.ntk.blocks import Block, by_blocks
from ntkrl.ntk.body import Body
from ntkrl.ntk.directions import Directions, against, cotangent
from ntkrl.numerics import HIGHEST, at_least_float32
from ntkrl.types import Array, Params

Leaves = list[Array]
Weights = Sequence[Array] | None
"""One factor per used leaf, broadcastable to it (the diagonal of P in J P Jᵀ); None for ones."""


def weighted(leaves: Leaves, weights: Weights) -> Leaves:
    """Multiply leaves by their weights."""
    if weights is None:
        return leaves
    return [(leaf * w).astype(leaf.dtype) for leaf, w in zip(leaves, weights, strict=True)]


def pusher(
    body: Body, params: Params, tokens: Any, mask: Array, forward_mode: bool
) -> Callable[[Leaves], Array]:
    """Return the map from changes of the used leaves to changes of the features `[S, T, D]`."""
    read, leaves = body.function(params), body.leaves(params)
    if forward_mode:
        return jax.linearize(lambda moved: read(moved, tokens, mask), leaves)[1]
    phi, pull = jax.vjp(lambda moved: read(moved, tokens, mask), leaves)
    _, push = jax.vjp(lambda c: pull(c)[0], jnp.zeros_like(phi))
    return lambda changes: push(changes)[0]


def puller(
    body: Body, params: Params, tokens: Any, mask: Array
) -> tuple[Array, Callable[[Array], Leaves]]:
    """Return features `[S, T, D]` and the map from their cotangents to gradients."""
    read = body.function(params)
    phi, pull = jax.vjp(lambda moved: read(moved, tokens, mask), body.leaves(params))
    return phi, lambda c: body.pinned(pull(c.astype(phi.dtype))[0])


def products(
    body: Body,
    params: Params,
    observed: Directions,
    updated: Directions | None,
    weights: Weights,
    chunk: int,
    forward_mode: bool,
) -> Array:
    """Compute Γ by one VJP and one JVP per updated direction, `chunk` of them at a time.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    updated = observed if updated is None else updated
    push = pusher(body, params, observed.tokens, observed.mask, forward_mode)

    def sequence(rows: tuple[Any, Array, Array, Array | None]) -> Array:
        tokens, mask, positions, vectors = rows
        phi, pull = puller(body, params, jax.tree.map(lambda leaf: leaf[None], tokens), mask[None])

        def column(index: Array) -> Array:
            c_TD = cotangent(positions, vectors, index, updated, phi.shape[1])
            changes = push(body.pinned(weighted(pull(c_TD[None]), weights)))
            return against(at_least_float32(changes), observed)

        return jax.lax.map(column, jnp.arange(updated.per_sequence), batch_size=chunk)

    rows = (updated.tokens, updated.mask, updated.positions, updated.vectors)
    columns = jax.lax.map(sequence, rows)
    count = updated.sequences * updated.per_sequence
    return columns.reshape(count, observed.sequences * observed.per_sequence).T


def jacobians(
    body: Body,
    params: Params,
    observed: Directions,
    updated: Directions | None,
    weights: Weights,
    chunk: int,
) -> Array:
    """Compute Γ from the gradients of `chunk` directions of each side, by VJPs alone.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """

    def gradients(block: Block) -> Leaves:
        side = block.side

        def sequence(tokens: Any, mask: Array, positions: Array, vectors: Array | None) -> Leaves:
            one = jax.tree.map(lambda leaf: leaf[None], tokens)
            phi, pull = puller(body, params, one, mask[None])

            def direction(index: Array) -> Leaves:
                return pull(cotangent(positions, vectors, index, side, phi.shape[1])[None])

            return jax.vmap(direction)(block.first + jnp.arange(block.count))

        return jax.vmap(sequence)(side.tokens, side.mask, side.positions, side.vectors)

    def pair(left: Block, right: Block | None) -> Array:
        here = gradients(left)
        there = here if right is None else gradients(right)
        # leaf axes are contracted as they are: flattening would gather sharded ones
        terms = [
            jnp.tensordot(
                a,
                b,
                (tuple(range(2, a.ndim)),) * 2,
                precision=HIGHEST,
                preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
            )
            for a, b in zip(weighted_rows(here, weights), there, strict=True)
        ]
        return sum(terms)

    return by_blocks(pair, observed, updated, chunk)


def weighted_rows(leaves: Leaves, weights: Weights) -> Leaves:
    """Multiply leaves with two leading axes by their weights."""
    if weights is None:
        return leaves
    return weighted(leaves, [w.reshape(1, 1, *w.shape) if w.ndim else w for w in weights])
