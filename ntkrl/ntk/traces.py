"""Traces of the body kernel by leaf and layer, without M: the diagonal of the layer-wise algorithm.

With WᵀW = RᵀR, tr W M(o, u) Wᵀ = Σ_k r_kᵀ M(o, u) r_k pairs each cotangent r_k with itself alone.
For a tapped leaf (see layerwise.py), with x its activations and δ_k its cotangents,

    Σ_k ⟨∇_k(o), ∇_k(u)⟩ = Σ_{t,s} ⟨x_t, x'_s⟩ Σ_k ⟨δ_{k,t}, δ'_{k,s}⟩

so a layer needs two Gram matrices of all positions of all contexts, and a pass backward for D
cotangents of each context is the cost of all: M takes D times as many products of δ.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.cotangents import BlockCotangents, GradientFactors, ScanCotangents
from ntkrl.ntk.jacobian_gram import Block, SequenceCotangents
from ntkrl.ntk.network import FeatureFunction
from ntkrl.ntk.reports import report_layer
from ntkrl.ntk.taps import plan_taps
from ntkrl.numerics import HIGHEST, at_least_float32, einsum
from ntkrl.types import Array, Params

LARGEST_GRAM = 2**21
"""Numbers of a Gram matrix of all positions; above it, contexts are taken one by one."""
LeafTraces = dict[int, Array]
"""`{leaf: [layers, O, U]}`, one layer where the leaf is not stacked; leaves that features use."""


@functools.partial(jax.jit, static_argnames=("features", "chunk", "report"))
def leaf_traces(
    features: FeatureFunction,
    params: Params,
    observed: Contexts,
    updated: Contexts | None,
    chunk: int,
    report: bool = False,
) -> LeafTraces:
    """Return tr W M(o, u) Wᵀ of every leaf, for a head of scale 1.

    Args:
      features: the features as a function of the used leaves.
      params: the params.
      observed, updated: the contexts; updated is None for a symmetric kernel.
      chunk: cotangents that go backward at a time, of all contexts together.
      report: report each finished layer (see reports.py).
    """
    sides = [_side(features, params, observed)]
    if updated is not None:
        sides.append(_side(features, params, updated))
    plans = [plan_taps(features, params, side, None) for side in sides]
    count = sides[0].width
    size = block_size(count, chunk, sum(side.sequences for side in sides))

    def block(first: Array) -> LeafTraces:
        cotangents = [
            BlockCotangents(plan, features, params, Block(side, first, size))
            for plan, side in zip(plans, sides, strict=True)
        ]
        traces: LeafTraces = {}
        for number in reversed(range(len(plans[0].segments()))):
            if cotangents[0].is_scan(number):
                terms = _scan_traces(cotangents, number, report)
            else:
                factors = [side.backward(number) for side in cotangents]
                terms = {leaf: t[None] for leaf, t in _paired(factors).items()}
            traces |= terms
        direct = _paired([side.direct() for side in cotangents])
        return traces | {leaf: trace[None] for leaf, trace in direct.items()}

    starts = jnp.arange(0, count, size)
    total = jax.eval_shape(block, starts[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), total)
    add = lambda total, first: (jax.tree.map(jnp.add, total, block(first)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, starts)[0]


def block_size(count: int, chunk: int, sequences: int) -> int:
    """Return how many of D cotangents go backward at a time, in equal blocks."""
    size = max(1, min(count, chunk // sequences))
    return -(-count // -(-count // size))


def _side(features: FeatureFunction, params: Params, contexts: Contexts) -> SequenceCotangents:
    """Return the rows of R as cotangents of each context, which is a sequence of its own."""
    weight_VD = at_least_float32(features.network.weight(params))
    values_D, axes_DD = jnp.linalg.eigh(einsum("vd,ve->de", weight_VD, weight_VD))
    rows_DD = jnp.sqrt(jnp.maximum(values_D, 0))[:, None] * axes_DD.T
    # twice D rows at most, zeros at the end: any block size covers D
    rows_BD = jnp.concatenate([rows_DD, jnp.zeros_like(rows_DD)])
    data = (contexts.tokens, contexts.mask)
    tokens, mask = jax.tree.map(lambda leaf: leaf[contexts.rows], data)
    positions = jnp.asarray(contexts.positions)[:, None]
    cotangents = jnp.broadcast_to(rows_BD, (positions.shape[0], 1, *rows_BD.shape))
    return SequenceCotangents(tokens, mask, positions, cotangents, rows_DD.shape[1])


def _scan_traces(sides: list[BlockCotangents], number: int, report: bool) -> LeafTraces:
    """Go back through a scan over layers; return the traces of its leaves, layers in front."""
    scans = [ScanCotangents(side, number) for side in sides]

    def layer(cotangents: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
        results = [s.layer(c, x) for s, c, x in zip(scans, cotangents, xs, strict=True)]
        entering, by_layer, factors = zip(*results, strict=True)
        traces = _paired(list(factors))
        if report:
            report_layer(jax.tree.leaves(traces)[0][0, 0])
        return list(entering), (traces, list(by_layer))

    reverse = not scans[0].operation.eqn.params["reverse"]
    start, xs = [scan.start() for scan in scans], [scan.xs() for scan in scans]
    end, (traces, by_layer) = jax.lax.scan(layer, start, xs, reverse=reverse)
    for scan, entering, sliced in zip(scans, end, by_layer, strict=True):
        scan.finish(entering, sliced)
    return traces


def _paired(sides: list[dict[int, GradientFactors]]) -> LeafTraces:
    """Return Σ_a ⟨∇_a(o), ∇_a(u)⟩ `[O, U]` of each leaf."""
    left, right = sides[0], sides[-1]
    return {leaf: _leaf_trace(left[leaf], right[leaf]) for leaf in left}


def _leaf_trace(left: GradientFactors, right: GradientFactors) -> Array:
    wide = jnp.promote_types(left.deltas.dtype, jnp.float32)
    # materialised: fused into the product, what gives δ would be computed once per context
    deltas = jax.lax.optimization_barrier([left.deltas, right.deltas])
    if left.activations is None or right.activations is None:
        first, second = (delta.reshape(delta.shape[0], -1).astype(wide) for delta in deltas)
        return einsum("op,up->ou", first, second)
    x_OTI, x_USI = left.activations, right.activations
    # a product per cotangent: for a single large one, CPUs would transpose all of δ
    second = _by_cotangent(deltas[1].astype(wide))

    def against_all(x_OTI: Array, delta_OATF: Array) -> Array:
        if x_OTI.ndim == 2:
            gram_OTUS = (x_OTI[:, :, None, None] == x_USI[None, None]).astype(wide)
        else:
            gram_OTUS = einsum("oti,usi->otus", x_OTI, x_USI, preferred_element_type=wide)
        first = _by_cotangent(delta_OATF.astype(wide))
        products = jnp.matmul(first, jnp.swapaxes(second, 1, 2), precision=HIGHEST)
        return jnp.sum(gram_OTUS * jnp.sum(products, axis=0).reshape(gram_OTUS.shape), axis=(1, 3))

    if (x_OTI.shape[0] * x_OTI.shape[1]) ** 2 <= LARGEST_GRAM:
        return against_all(x_OTI, deltas[0])
    row = lambda arrays: against_all(*(array[None] for array in arrays))[0]  # noqa: E731
    return jax.lax.map(row, (x_OTI, deltas[0]))


def _by_cotangent(delta_OATF: Array) -> Array:
    """Return `[A, O·T, F]`."""
    moved_AOTF = jnp.swapaxes(delta_OATF, 0, 1)
    return moved_AOTF.reshape(moved_AOTF.shape[0], -1, moved_AOTF.shape[3])
