"""The cross terms of a tied head, J_out(o) P J_in(u)ᵀ, in closed form.

Where the features only look rows of the tied table E up, at ids x_t, the gradient of ⟨c, φ(u)⟩
is δ_t(c) at row x_t for each position t, so with φ_o the observed features

    J_out(o) P J_in(u)ᵀ = Σ_t e_{x_t} (E a_t)ᵀ,   c · a_t = φ_o · P[x_t] δ_t(c),

of rank T at most: nothing of size V is looped over or formed. The trace needs T cotangents of a
context (a_t · E[x_t] for the rows x_t themselves), all of it D of them. Networks that use the
table in any other way take the forms in forms.py, which move the table.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.ntk import forms
from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.cotangents import replay, value_of, zeros
from ntkrl.ntk.estimates import estimate_lookup
from ntkrl.ntk.forms import Operands, feature_cotangents
from ntkrl.ntk.jacobian_gram import add_axis
from ntkrl.ntk.network import FeatureFunction
from ntkrl.ntk.taps import TapPlan, plan_taps
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params


class Lookup(NamedTuple):
    """Rows of the table that contexts read, and products with their gradients.

    ids: `[U, T]` row read at each position of the updated contexts.
    products: `[O, U, T, B]` φ_o · P[id] δ_t(c_b) for B cotangents c of the features.
    """

    ids: Array
    products: Array


def is_lookup(tied: FeatureFunction, params: Params, contexts: Contexts) -> bool:
    """Test whether the features use the tied table for one lookup of rows and nothing else."""
    return _lookup(plan_taps(tied, params, contexts, None)) is not None


def cross_trace(tied: FeatureFunction, operands: Operands, budget: int) -> Array:
    """Return the trace of J_out(o) P J_in(u)ᵀ `[O, U]`."""
    if not is_lookup(tied, operands.params, operands.updated):
        return jnp.sum(forms.cross_diagonal(tied, operands), axis=-1)
    return jnp.sum(_diagonal_terms(tied, operands, budget)[1], axis=-1)


def cross_diagonal(tied: FeatureFunction, operands: Operands, budget: int) -> Array:
    """Return the diagonal of J_out(o) P J_in(u)ᵀ `[O, U, V]`."""
    if not is_lookup(tied, operands.params, operands.updated):
        return forms.cross_diagonal(tied, operands)
    ids_UT, terms_OUT = _diagonal_terms(tied, operands, budget)
    vocab = tied.network.weight(operands.params).shape[0]
    empty = jnp.zeros((*terms_OUT.shape[:2], vocab), terms_OUT.dtype)
    contexts = jnp.arange(ids_UT.shape[0])[:, None]
    return empty.at[:, contexts, ids_UT].add(terms_OUT)


def cross_dense(
    tied: FeatureFunction, operands: Operands, rows: Array, columns: Array, budget: int
) -> Array:
    """Return rows and columns of J_out(o) P J_in(u)ᵀ: `[O, U, |rows|, |columns|]`."""
    if not is_lookup(tied, operands.params, operands.updated):
        return forms.cross_dense(tied, operands, rows, columns)
    weight_CD = at_least_float32(tied.network.weight(operands.params))[columns]
    count, few = operands.updated.positions.shape[0], columns.shape[0] < weight_CD.shape[1]
    cotangents = jnp.broadcast_to(weight_CD[None], (count, *weight_CD.shape)) if few else None
    ids_UT, products = lookup_products(tied, operands, cotangents, budget)
    if not few:
        products = einsum("outd,cd->outc", products, weight_CD)
    same_URT = (rows[None, :, None] == ids_UT[:, None, :]).astype(products.dtype)
    blocks = einsum("urt,outc->ourc", same_URT, products)
    slopes_OR, slopes_UC = operands.left.slopes_at(rows), operands.right.slopes_at(columns)
    return blocks * slopes_OR[:, None, :, None] * slopes_UC[None, :, None, :]


def cross_bilinear(
    tied: FeatureFunction, operands: Operands, left_OV: Array, right_UV: Array, budget: int
) -> Array:
    """Return left_oᵀ J_out(o) P J_in(u)ᵀ right_u `[O, U]`."""
    if not is_lookup(tied, operands.params, operands.updated):
        return forms.cross_bilinear(tied, operands, left_OV, right_UV)
    cotangents_UD = feature_cotangents(tied.network, operands.params, operands.right, right_UV)
    ids_UT, products = lookup_products(tied, operands, cotangents_UD[:, None], budget)
    scaled_OUT = (left_OV * operands.left.slopes)[:, ids_UT]
    return einsum("out,out->ou", scaled_OUT, products[..., 0])


def lookup_products(
    tied: FeatureFunction, operands: Operands, cotangents: Array | None, budget: int
) -> Lookup:
    """Return the Lookup of cotangents `[U, B, D]` of the updated contexts; None for unit vectors.

    Args:
      tied: the features as a function of the tied table alone.
      operands: the two sides.
      cotangents: of the features at the contexts' positions.
      budget: bytes of working memory.
    """
    width = operands.left.features.shape[1] if cotangents is None else cotangents.shape[1]
    estimate = estimate_lookup(tied, operands.params, operands.updated, width, budget)
    return _lookup_products(tied, operands, cotangents, estimate.chunk)


@functools.partial(jax.jit, static_argnames=("tied", "chunk"))
def _lookup_products(
    tied: FeatureFunction, operands: Operands, cotangents: Array | None, chunk: int
) -> Lookup:
    params, updated, phi_OD = operands.params, operands.updated, operands.left.features
    weight, width = operands.head.weight, phi_OD.shape[1]

    def context(arrays: tuple[Any, Array, Array, Array | None]) -> tuple[Array, Array]:
        tokens, mask, position, cotangents_BD = arrays
        replayed = _Replay(tied, params, tokens, mask)
        phi, pull, ids_T = jax.vjp(replayed.features, replayed.zeros(), has_aux=True)

        def product(index: Array) -> Array:
            if cotangents_BD is None:
                cotangent_D = jnp.zeros(width).at[index].set(1)
            else:
                cotangent_D = cotangents_BD[index]
            placed = jnp.zeros_like(phi).at[0, position].set(cotangent_D.astype(phi.dtype))
            delta_TD = at_least_float32(replayed.delta(pull(placed)[0]))
            if weight is not None:
                delta_TD = delta_TD * (weight[ids_T] if weight.ndim else weight)
            return einsum("td,od->ot", delta_TD, phi_OD)

        count = width if cotangents_BD is None else cotangents_BD.shape[0]
        return ids_T, jax.lax.map(product, jnp.arange(count), batch_size=chunk)

    data = (updated.tokens, updated.mask)
    tokens, mask = jax.tree.map(lambda leaf: leaf[updated.rows], data)
    ids_UT, products_UBOT = jax.lax.map(context, (tokens, mask, updated.positions, cotangents))
    return Lookup(ids_UT, jnp.transpose(products_UBOT, (2, 0, 3, 1)))


@functools.partial(jax.jit, static_argnames=("tied",))
def lookup_ids(tied: FeatureFunction, params: Params, contexts: Contexts) -> Array:
    """Return the rows of the table that each context's sequence reads: `[O, T]`."""

    def context(tokens: Any, mask: Array) -> Array:
        replayed = _Replay(tied, params, tokens, mask)
        return replayed.features(replayed.zeros())[1]

    data = (contexts.tokens, contexts.mask)
    return jax.vmap(context)(*jax.tree.map(lambda leaf: leaf[contexts.rows], data))


def _diagonal_terms(tied: FeatureFunction, operands: Operands, budget: int) -> tuple[Array, Array]:
    """Return ids `[U, T]` and the diagonal's terms at them `[O, U, T]`, which add up."""
    ids_UT = lookup_ids(tied, operands.params, operands.updated)
    rows_UTD = at_least_float32(tied.network.weight(operands.params))[ids_UT]
    products = lookup_products(tied, operands, rows_UTD, budget).products
    terms_OUT = jnp.diagonal(products, axis1=2, axis2=3)
    left, right = operands.left.slopes, operands.right.slopes
    if left.shape[1] == 1:
        return ids_UT, terms_OUT * left[:, None] * right[None]
    contexts = jnp.arange(ids_UT.shape[0])[:, None]
    return ids_UT, terms_OUT * left[:, ids_UT] * right[contexts, ids_UT][None]


def _lookup(plan: TapPlan) -> int | None:
    """Return the operation that looks up the tied table; None where it is used otherwise."""
    for index, tap in plan.taps.items():
        if tap.kind == "gather":
            return index
    return None


class _Replay:
    """The features of one sequence as a function of a change of the rows that are looked up."""

    def __init__(self, tied: FeatureFunction, params: Params, tokens: Any, mask: Array):
        data = add_axis((tokens, mask))
        self.plan = plan_taps(tied, params, Contexts(data[0], mask, None, data[1]), None)
        index, traced = _lookup(self.plan), self.plan.traced
        if index is None:
            raise ValueError("the tied table is not looked up once; is_lookup tests this.")
        self.index, inputs = index, [*jax.tree.leaves(params), *jax.tree.leaves(data)]
        self.values = traced.constants | dict(zip(traced.inputs, inputs, strict=True))

    def zeros(self) -> Array:
        """Return no change."""
        return zeros(self.plan, [self.index])[self.index]

    def features(self, change: Array) -> tuple[Array, Array]:
        """Return the features `[1, T, D]`, and the ids `[T]`."""
        operations = list(range(len(self.plan.traced.operations)))
        results, records = replay(self.plan, operations, self.values, {self.index: change})
        (output,) = self.plan.traced.outputs
        return value_of(output, results), records[self.index]

    def delta(self, cotangent: Array) -> Array:
        """Return the cotangent of the rows that were looked up, `[T, D]`."""
        operation = self.plan.traced.operations[self.index]
        return self.plan.taps[self.index].delta(operation, cotangent[None])[0]
