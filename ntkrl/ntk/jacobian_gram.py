"""Gram matrices of feature Jacobians: cotangents, blocks, and the two algorithms on gradients.

Every body form is Γ[a, b] = c_aᵀ J_φ P J_φ'ᵀ c_b for cotangents c at positions of sequences: unit
vectors give M, rows of W entries of G, Wᵀg score functions, a sum over positions sequence
aggregates. Γ is computed by

    jvp_vjp    one VJP of an updated cotangent and one JVP to all observed ones, per column
    jacobian   gradients of both sides, contracted over the parameters; VJPs alone
    layerwise  see layerwise.py

Array suffixes of this room, beside those of ntkrl.types:

    S  sequences of a side               A  cotangents of a sequence: P·B, or B where summed
    P  positions of a sequence           R  rows of the vocabulary (observed side)
    B  cotangents of a position          C  columns of the vocabulary (updated side)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.ntk.contexts import GroupedContexts
from ntkrl.ntk.network import FeatureFunction, Leaves
from ntkrl.ntk.parts import Weights, scale_leaves
from ntkrl.numerics import HIGHEST, at_least_float32, einsum
from ntkrl.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceCotangents:
    """A cotangents of the features of each of S sequences: P·B, or B where positions are summed.

    tokens: inputs, S in front.
    mask: `[S, T]`.
    positions: `[S, P]`.
    cotangents: `[S, P, B, D]`; None for the D unit vectors at each position (B = D).
    width: D.
    summed: True where a cotangent acts at all P positions at once.
    """

    tokens: Any
    mask: Array
    positions: Array
    cotangents: Array | None
    width: int = dataclasses.field(metadata={"static": True})
    summed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def sequences(self) -> int:
        """S."""
        return self.positions.shape[0]

    @property
    def per_position(self) -> int:
        """B."""
        return self.width if self.cotangents is None else self.cotangents.shape[2]

    @property
    def per_sequence(self) -> int:
        """A."""
        return self.per_position * (1 if self.summed else self.positions.shape[1])

    @property
    def arrays(self) -> tuple[Any, Array, Array, Array | None]:
        """Tokens, mask, positions and cotangents, S in front of all."""
        return self.tokens, self.mask, self.positions, self.cotangents

    def map(self, function: Callable[[Array], Array]) -> SequenceCotangents:
        """Apply a function of the leading axis to all arrays."""
        tokens, mask, positions, cotangents = jax.tree.map(function, self.arrays)
        return SequenceCotangents(tokens, mask, positions, cotangents, self.width, self.summed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GramInputs:
    """Arrays of Γ: params, the two sides' cotangents, and the weights of the used leaves.

    updated is None for a symmetric Γ.
    """

    params: Params
    observed: SequenceCotangents
    updated: SequenceCotangents | None
    weights: Weights

    @property
    def columns(self) -> SequenceCotangents:
        """The updated side, the observed one where Γ is symmetric."""
        return self.observed if self.updated is None else self.updated


def arrange(
    contexts: GroupedContexts, cotangents: Array | None, width: int, summed: bool
) -> SequenceCotangents:
    """Arrange `[O, B, D]` cotangents of contexts (None: unit vectors) by sequence."""
    arranged = None
    if cotangents is not None:
        sequences, positions = contexts.positions.shape
        empty = jnp.zeros((sequences * positions, *cotangents.shape[1:]), cotangents.dtype)
        arranged = empty.at[contexts.slots].set(cotangents)
        arranged = arranged.reshape(sequences, positions, *cotangents.shape[1:])
    return SequenceCotangents(*contexts[:3], arranged, width, summed)


def cotangent(
    positions_P: Array,
    cotangents_PBD: Array | None,
    index: Array,
    side: SequenceCotangents,
    length: int,
) -> Array:
    """Return cotangent `index` of one sequence, `[T, D]`."""
    if cotangents_PBD is None:
        position, unit = index // side.width, index % side.width
        return jnp.zeros((length, side.width)).at[positions_P[position], unit].set(1)
    if side.summed:
        chosen_PD = cotangents_PBD[:, index]
        return jnp.zeros((length, side.width), chosen_PD.dtype).at[positions_P].add(chosen_PD)
    position, number = index // side.per_position, index % side.per_position
    chosen_D = cotangents_PBD[position, number]
    return jnp.zeros((length, side.width), chosen_D.dtype).at[positions_P[position]].set(chosen_D)


def contract_features(changes: Array, side: SequenceCotangents) -> Array:
    """Return c_a · Δφ for changes `[S, T, D]` of the features: `[S, A]`."""

    def sequence(change_TD: Array, positions_P: Array, cotangents_PBD: Array | None) -> Array:
        change_PD = change_TD[positions_P]
        if cotangents_PBD is None:
            return change_PD.reshape(-1)
        product_PB = einsum("pd,pbd->pb", change_PD, cotangents_PBD.astype(change_PD.dtype))
        return jnp.sum(product_PB, axis=0) if side.summed else product_PB.reshape(-1)

    return jax.vmap(sequence)(changes, side.positions, side.cotangents)


@functools.partial(jax.jit, static_argnames=("features", "chunk", "forward_mode"))
def jvp_vjp(features: FeatureFunction, inputs: GramInputs, chunk: int, forward_mode: bool) -> Array:
    """Compute Γ by one VJP and one JVP per updated cotangent, `chunk` of them at a time.

    Without forward mode the JVP is a VJP of a VJP.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    params, observed, updated = inputs.params, inputs.observed, inputs.columns
    push = features.jvp_fn(params, observed.tokens, observed.mask, forward_mode)

    def sequence(arrays: tuple[Any, Array, Array, Array | None]) -> Array:
        tokens, mask, positions, cotangents = arrays
        phi, pull = features.vjp_fn(params, add_axis(tokens), mask[None])

        def column(index: Array) -> Array:
            c_TD = cotangent(positions, cotangents, index, updated, phi.shape[1])
            changes = push(features.constrain(scale_leaves(pull(c_TD[None]), inputs.weights)))
            return contract_features(at_least_float32(changes), observed)

        return jax.lax.map(column, jnp.arange(updated.per_sequence), batch_size=chunk)

    columns = jax.lax.map(sequence, updated.arrays)
    count = updated.sequences * updated.per_sequence
    return columns.reshape(count, observed.sequences * observed.per_sequence).T


@functools.partial(jax.jit, static_argnames=("features", "chunk"))
def jacobian(features: FeatureFunction, inputs: GramInputs, chunk: int) -> Array:
    """Compute Γ from the gradients of `chunk` cotangents of each side, by VJPs alone.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    weights = inputs.weights
    if weights is not None:  # for two leading axes
        weights = tuple(w.reshape(1, 1, *w.shape) if w.ndim else w for w in weights)

    def gradients(block: Block) -> Leaves:
        side = block.side

        def sequence(
            tokens: Any, mask: Array, positions: Array, cotangents: Array | None
        ) -> Leaves:
            phi, pull = features.vjp_fn(inputs.params, add_axis(tokens), mask[None])

            def gradient(index: Array) -> Leaves:
                return pull(cotangent(positions, cotangents, index, side, phi.shape[1])[None])

            return jax.vmap(gradient)(block.first + jnp.arange(block.size))

        return jax.vmap(sequence)(*side.arrays)

    def pair(left: Block, right: Block | None) -> Array:
        rows = gradients(left)
        columns = rows if right is None else gradients(right)
        # leaf axes are contracted without flattening, which would gather sharded ones
        products = [
            jnp.tensordot(
                a,
                b,
                (tuple(range(2, a.ndim)),) * 2,
                precision=HIGHEST,
                preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
            )
            for a, b in zip(scale_leaves(rows, weights), columns, strict=True)
        ]
        return sum(products[1:], products[0])

    return by_blocks(pair, inputs, chunk)


def add_axis(tree: Any) -> Any:
    """Add a leading axis of size 1 to all leaves."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


class Block(NamedTuple):
    """Cotangents `first` to `first + size` of every sequence of `side`."""

    side: SequenceCotangents
    first: Array | int
    size: int


def by_blocks(
    pair: Callable[[Block, Block | None], Array], inputs: GramInputs, chunk: int
) -> Array:
    """Compute Γ block by block, so that few cotangents exist at a time.

    Args:
      pair: computes one block `[S_o, A_o, S_u, A_u]`; its second argument is None where both are
        the same.
      inputs: with two sides; of a symmetric Γ half is computed.
      chunk: cotangents of a side that exist at a time, ≥ 1.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    symmetric = inputs.updated is None
    rows, columns = _Blocks(inputs.observed, chunk), _Blocks(inputs.columns, chunk)
    if rows.count == columns.count == 1:
        block = pair(rows.block(0), None if symmetric else columns.block(0))
        return rows.join(columns, block[None, None])
    if symmetric:
        first, second = np.triu_indices(rows.count)
    else:
        first, second = (axis.ravel() for axis in np.indices((rows.count, columns.count)))
    blocks = jax.lax.map(
        lambda ij: pair(rows.block(ij[0]), columns.block(ij[1])),
        (jnp.asarray(first), jnp.asarray(second)),
    )
    if not symmetric:
        return rows.join(columns, blocks.reshape(rows.count, columns.count, *blocks.shape[1:]))
    mirrored = jnp.transpose(blocks, (0, 3, 4, 1, 2))
    return rows.join(columns, fill_symmetric(blocks, mirrored, rows.count))


def fill_symmetric(upper: Array, mirrored: Array, count: int) -> Array:
    """Return `[count, count, …]` from the values of `np.triu_indices(count)` and mirrored ones."""
    first, second = np.triu_indices(count)
    index = np.zeros((count, count), int)
    index[first, second] = index[second, first] = np.arange(len(first))
    is_upper = np.triu(np.ones_like(index, bool))
    is_upper = is_upper.reshape(*is_upper.shape, *(1,) * (upper.ndim - 1))
    return jnp.where(is_upper, upper[index], mirrored[index])


class _Blocks:
    """A side divided into equal blocks; padding at the end is dropped when joining."""

    def __init__(self, side: SequenceCotangents, chunk: int):
        sequences, each = side.sequences, side.per_sequence
        if chunk >= each:
            groups = -(-sequences // (chunk // each))
            self.rows, self.each = -(-sequences // groups), each
        else:
            self.rows, self.each = 1, -(-each // -(-each // chunk))
        self.side = side
        self.row_blocks = -(-sequences // self.rows)
        self.cotangent_blocks = -(-each // self.each)
        self.count = self.row_blocks * self.cotangent_blocks
        extra = self.row_blocks * self.rows - sequences
        self.padded = side if not extra else side.map(lambda leaf: _repeat_last(leaf, extra))

    def block(self, index: Array | int) -> Block:
        """Return block `index`, cotangent blocks fastest."""
        row = index // self.cotangent_blocks
        first = (index % self.cotangent_blocks) * self.each
        start = row * self.rows
        side = self.padded.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.rows))
        return Block(side, first, self.each)

    def join(self, other: _Blocks, blocks: Array) -> Array:
        """Join `[blocks_o, blocks_u, S, A, S', A']` as `[S_o·A_o, S_u·A_u]`."""
        shape = (self.row_blocks, self.cotangent_blocks, other.row_blocks, other.cotangent_blocks)
        ordered = jnp.transpose(blocks.reshape(*shape, *blocks.shape[2:]), (0, 4, 1, 5, 2, 6, 3, 7))
        joined = ordered.reshape(
            self.row_blocks * self.rows,
            self.cotangent_blocks * self.each,
            other.row_blocks * other.rows,
            other.cotangent_blocks * other.each,
        )
        (s_o, a_o), (s_u, a_u) = ((b.side.sequences, b.side.per_sequence) for b in (self, other))
        return joined[:s_o, :a_o, :s_u, :a_u].reshape(s_o * a_o, s_u * a_u)


def _repeat_last(leaf: Array, count: int) -> Array:
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], count, axis=0)])
