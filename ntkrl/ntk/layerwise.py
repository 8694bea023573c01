"""The layer-wise algorithm: Γ from activation and cotangent Gram matrices, layer by layer.

For a tapped leaf ∇_a = Σ_t x_t δ_{a,t}ᵀ, hence ⟨∇_a, ∇_b⟩ = Σ_{t,s} ⟨x_t, x_s⟩ ⟨δ_{a,t}, δ_{b,s}⟩.
Going backward through the features, both sides' cotangents of a tapped product exist only until
they are contracted. VJPs alone are needed, the gradient of a matrix is never formed, and memory
does not grow with the number of layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.ntk.cotangents import BlockCotangents, GradientFactors, ScanCotangents
from ntkrl.ntk.jacobian_gram import Block, GramInputs, by_blocks, fill_symmetric
from ntkrl.ntk.network import FeatureFunction
from ntkrl.ntk.reports import report_layer
from ntkrl.ntk.taps import plan_taps
from ntkrl.numerics import HIGHEST, einsum
from ntkrl.types import Array

Pairs = tuple[np.ndarray, np.ndarray]
"""Indices of the observed and the updated sequences that are contracted."""


@functools.partial(jax.jit, static_argnames=("features", "chunk", "report"))
def layerwise(
    features: FeatureFunction, inputs: GramInputs, chunk: int, report: bool = False
) -> Array:
    """Compute Γ layer by layer, `chunk` cotangents of each side at a time.

    With `report`, each finished layer is reported (see reports.py).

    Weights of tapped leaves must be one number per leaf, or per layer of a stacked leaf.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    params, weights = inputs.params, inputs.weights
    plan_o = plan_taps(features, params, inputs.observed, weights)
    plan_u = plan_o
    if inputs.updated is not None:
        plan_u = plan_taps(features, params, inputs.updated, weights)
    by_leaf = {} if weights is None else dict(enumerate(weights))

    def pair(left: Block, right: Block | None) -> Array:
        sides = [BlockCotangents(plan_o, features, params, left)]
        if right is not None:
            sides.append(BlockCotangents(plan_u, features, params, right))
        observed, updated = left.side.sequences, None if right is None else right.side.sequences
        pairs = _sequence_pairs(observed, updated)
        terms = []
        for number in reversed(range(len(plan_o.segments()))):
            if sides[0].is_scan(number):
                terms.append(_backward_scan(sides, number, pairs, by_leaf, report))
            else:
                factors = [side.backward(number) for side in sides]
                terms += [contract(pairs, factors, by_leaf)] if factors[0] else []
        factors = [side.direct() for side in sides]
        terms += [contract(pairs, factors, by_leaf)] if factors[0] else []
        return _by_sequences(sum(terms[1:], terms[0]), observed, updated)

    return by_blocks(pair, inputs, chunk)


def _backward_scan(
    sides: list[BlockCotangents],
    number: int,
    pairs: Pairs,
    weights: dict[int, Array],
    report: bool,
) -> Array:
    """Go back through a scan over layers on both sides, contracting layer by layer."""
    scans = [ScanCotangents(side, number) for side in sides]
    params = scans[0].operation.eqn.params
    per_layer = {
        leaf: _per_layer(weights[leaf], params["length"])
        for leaf in scans[0].plan.sliced.values()
        if leaf in weights
    }

    def layer(carry: tuple[list[Any], Array], xs: tuple[list[Any], dict[int, Array]]):
        cotangents, total = carry
        results = [s.layer(c, x) for s, c, x in zip(scans, cotangents, xs[0], strict=True)]
        entering, by_layer, factors = zip(*results, strict=True)
        total = total + contract(pairs, factors, xs[1])
        if report:
            report_layer(total[0, 0, 0])
        return (list(entering), total), list(by_layer)

    start = [scan.start() for scan in scans]
    wide = jnp.promote_types(jax.tree.leaves(start)[0].dtype, jnp.float32)
    total = jnp.zeros((len(pairs[0]), sides[0].counts[1], sides[-1].counts[1]), wide)
    xs = ([scan.xs() for scan in scans], per_layer)
    (end, total), by_layer = jax.lax.scan(layer, (start, total), xs, reverse=not params["reverse"])
    for scan, entering, sliced in zip(scans, end, by_layer, strict=True):
        scan.finish(entering, sliced)
    return total


def _per_layer(weight: Array, length: int) -> Array:
    """Broadcast a weight of a stacked leaf to a leading layer axis."""
    if weight.ndim and weight.shape[0] == length:
        return weight
    return jnp.broadcast_to(weight, (length, *weight.shape[1:]))


def _sequence_pairs(observed: int, updated: int | None) -> Pairs:
    """Return the pairs (s, s') to compute; None for a symmetric Γ, of which half is."""
    if updated is None:
        return np.triu_indices(observed)
    first, second = np.indices((observed, updated))
    return first.ravel(), second.ravel()


def _by_sequences(values: Array, observed: int, updated: int | None) -> Array:
    """Arrange `[pairs, A_o, A_u]` as `[S_o, A_o, S_u, A_u]`."""
    if updated is None:
        square = fill_symmetric(values, jnp.swapaxes(values, 1, 2), observed)
    else:
        square = values.reshape(observed, updated, *values.shape[1:])
    return jnp.transpose(square, (0, 2, 1, 3))


def contract(
    pairs: Pairs, factors: Sequence[dict[int, GradientFactors]], weights: dict[int, Array]
) -> Array:
    """Sum ⟨∇_a, w ∇_b⟩ over leaves, for every pair of sequences.

    Args:
      pairs: indices of S_o and S_u sequences.
      factors: `{leaf: GradientFactors}` of both sides, or once for a symmetric block.
      weights: `{leaf: w}`, scalars for tapped leaves; missing ones are 1.

    Returns:
      `[pairs, A_o, A_u]`, float32 or better.
    """
    indices = tuple(jnp.asarray(side) for side in pairs)
    observed, updated = factors[0], factors[-1]

    def over_pairs(product: Callable[[Array, Array], Array]) -> Array:
        return jax.lax.map(lambda ij: product(*ij), indices)

    # a loop per leaf, so that its δ can be freed before the next leaf's is computed
    terms = []
    for leaf, left in observed.items():
        right = updated[leaf]
        if left.activations is not None and right.activations is not None:
            activations, deltas = (left.activations, right.activations), (left.deltas, right.deltas)
            term = over_pairs(functools.partial(_tapped_product, activations, deltas))
            terms.append(term * weights[leaf].reshape(()) if leaf in weights else term)
    if len(terms) < len(observed):  # the gradients of all other leaves, in a single product

        def direct_product(i: Array, j: Array) -> Array:
            return _product(_concatenate(observed, i, weights), _concatenate(updated, j, {}))

        terms.append(over_pairs(direct_product))
    return sum(terms[1:], terms[0])


def _concatenate(
    factors: dict[int, GradientFactors], sequence: Array, weights: dict[int, Array]
) -> Array:
    """Return the gradients `[A, P]` of all leaves that are not tapped."""
    flat = []
    for leaf, (activations, deltas) in factors.items():
        if activations is None:
            gradient = deltas[sequence]
            if leaf in weights:
                weight = weights[leaf]
                gradient = gradient * (weight[None] if weight.ndim else weight)
            flat.append(gradient.reshape(gradient.shape[0], -1))
    return jnp.concatenate(flat, axis=1)


def _tapped_product(
    activations: tuple[Array, Array], deltas: tuple[Array, Array], i: Array, j: Array
) -> Array:
    """Return `[A, B]`: A gradients of sequence i, T positions, by B of sequence j, S positions."""
    x_TI, x_SI = activations[0][i], activations[1][j]
    left_ATF, right_BSF = deltas[0][i], deltas[1][j]
    wide = jnp.promote_types(left_ATF.dtype, jnp.float32)
    if x_TI.ndim == 1:
        gram_ST = (x_SI[:, None] == x_TI[None, :]).astype(wide)
    else:
        gram_ST = einsum("si,ti->st", x_SI, x_TI, preferred_element_type=wide)
    # a small product per cotangent: for a single large one, its operands would be transposed
    gram_AST = jnp.broadcast_to(gram_ST[None], (left_ATF.shape[0], *gram_ST.shape))
    mixed_ASF = jnp.matmul(gram_AST, left_ATF.astype(wide), precision=HIGHEST)
    right_BSF = right_BSF.astype(wide)
    return _product(*(array.reshape(array.shape[0], -1) for array in (mixed_ASF, right_BSF)))


def _product(left_AP: Array, right_BP: Array) -> Array:
    wide = jnp.promote_types(left_AP.dtype, jnp.float32)
    return einsum("ap,bp->ab", left_AP, right_BP, preferred_element_type=wide)
