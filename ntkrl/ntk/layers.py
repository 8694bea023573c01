"""The layer-wise algorithm: Γ from activation and cotangent Gram matrices, one layer at a time.

The features are traced once; going backwards through them, layer by layer, both sides' cotangents
of every tapped product exist only long enough to be contracted. It takes VJPs alone, never builds
the gradient of a matrix, and its memory does not grow with the number of layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.ntk import contract, taps
from ntkrl.ntk.blocks import Block, by_blocks
from ntkrl.ntk.body import Body
from ntkrl.ntk.contract import Factors
from ntkrl.ntk.directions import Directions
from ntkrl.ntk.gradients import Weights
from ntkrl.ntk.sides import ScanBack, Side
from ntkrl.types import Array, Params


def layers(
    body: Body,
    params: Params,
    observed: Directions,
    updated: Directions | None,
    weights: Weights,
    chunk: int,
) -> Array:
    """Compute Γ layer by layer, `chunk` directions of each side at a time.

    Weights of tapped leaves must be one number per leaf, or per layer of a stacked leaf.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    plan_o = plan_for(body, params, observed, weights)
    plan_u = plan_o if updated is None else plan_for(body, params, updated, weights)
    given = {} if weights is None else dict(enumerate(weights))

    def pair(left: Block, right: Block | None) -> Array:
        sides = [Side(plan_o, body, params, left)]
        if right is not None:
            sides.append(Side(plan_u, body, params, right))
        counts = left.side.sequences, None if right is None else right.side.sequences
        pairs = contract.sequence_pairs(*counts)
        found = []
        for number in reversed(range(len(plan_o.segments()))):
            if sides[0].scan(number) is None:
                found += _together(pairs, [side.backward(number) for side in sides], given)
            else:
                found.append(_backward_scan(sides, number, pairs, given))
        found += _together(pairs, [side.plain() for side in sides], given)
        return contract.unpacked(sum(found), *counts)

    return by_blocks(pair, observed, updated, chunk)


def plan_for(body: Body, params: Params, side: Directions, weights: Weights) -> taps.Plan:
    """Decide where the leaves are tapped when one sequence of a side is read."""
    leaves = body.leaves(params)
    program = body.program(params, side.tokens, side.mask)
    inputs = [slot for slot, used in zip(program.inputs, body.used, strict=False) if used]

    def may_tap(leaf: int, sliced: bool) -> bool:
        """Tell whether the leaf's weight is one number, or one per layer."""
        if weights is None or weights[leaf].size == 1:
            return True
        return sliced and weights[leaf].size == leaves[leaf].shape[0]

    return taps.plan(program, {slot: leaf for leaf, slot in enumerate(inputs)}, may_tap)


def _together(
    pairs: Any, factors: list[dict[int, Factors]], weights: dict[int, Array]
) -> list[Array]:
    if not factors[0]:
        return []
    return [contract.contracted(pairs, factors[0], factors[-1], weights)]


def _backward_scan(sides: list[Side], number: int, pairs: Any, weights: dict[int, Array]) -> Array:
    """Go back through a scan over layers on both sides at once, contracting layer by layer."""
    moves = [ScanBack(side, number) for side in sides]
    params = moves[0].step.eqn.params
    per_layer = {
        leaf: _per_layer(weights[leaf], params["length"])
        for leaf in moves[0].plan.sliced.values()
        if leaf in weights
    }

    def layer(carry: tuple[list[Any], Array], xs: tuple[list[Any], dict[int, Array]]):
        cotangents, total = carry
        stepped = [m.layer(c, x) for m, c, x in zip(moves, cotangents, xs[0], strict=True)]
        factors = [factors for _, _, factors in stepped]
        found = contract.contracted(pairs, factors[0], factors[-1], xs[1])
        return ([c for c, _, _ in stepped], total + found), [apart for _, apart, _ in stepped]

    start = [move.start() for move in moves]
    wide = jnp.promote_types(jax.tree.leaves(start)[0].dtype, jnp.float32)
    total = jnp.zeros((len(pairs[0]), sides[0].counts[1], sides[-1].counts[1]), wide)
    xs = ([move.xs() for move in moves], per_layer)
    (end, total), apart = jax.lax.scan(layer, (start, total), xs, reverse=not params["reverse"])
    for move, cotangents, made in zip(moves, end, apart, strict=True):
        move.finish(cotangents, made)
    return total


def _per_layer(weight: Array, length: int) -> Array:
    """Give a weight of a stacked leaf its leading layer axis."""
    if weight.ndim and weight.shape[0] == length:
        return weight
    return jnp.broadcast_to(weight, (length, *weight.shape[1:]))
