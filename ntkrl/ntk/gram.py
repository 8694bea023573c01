"""Gram matrices of feature Jacobians: directions, blocks, and the two algorithms on gradients.

Every body form is Γ[a, b] = c_aᵀ J_φ P J_φ'ᵀ c_b for directions c at positions of sequences: unit
vectors give M, rows of W entries of G, W^T g score functions, a sum over positions sequence
aggregates. Γ is computed by

    jvp_vjp    one VJP of an updated direction and one JVP to all observed ones, per column
    jacobian   gradients of both sides, contracted over the parameters; VJPs alone
    layerwise  see layerwise.py
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
class Directions:
    """A directions at each of S sequences: A = P·B, or A = B where positions are summed.

    tokens: inputs, S in front.
    mask: `[S, T]`.
    positions: `[S, P]`.
    vectors: `[S, P, B, D]`; None for the D unit vectors at each position (B = D).
    width: D.
    summed: True where a direction acts at all P positions at once.
    """

    tokens: Any
    mask: Array
    positions: Array
    vectors: Array | None
    width: int = dataclasses.field(metadata={"static": True})
    summed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def sequences(self) -> int:
        """S."""
        return self.positions.shape[0]

    @property
    def per_position(self) -> int:
        """B."""
        return self.width if self.vectors is None else self.vectors.shape[2]

    @property
    def per_sequence(self) -> int:
        """A."""
        return self.per_position * (1 if self.summed else self.positions.shape[1])

    @property
    def arrays(self) -> tuple[Any, Array, Array, Array | None]:
        """Tokens, mask, positions and vectors, S in front of all."""
        return self.tokens, self.mask, self.positions, self.vectors

    def map(self, function: Callable[[Array], Array]) -> Directions:
        """Apply a function of the leading axis to all arrays."""
        tokens, mask, positions, vectors = jax.tree.map(function, self.arrays)
        return Directions(tokens, mask, positions, vectors, self.width, self.summed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GramInputs:
    """Arrays of Γ: params, the two sides' Directions, and the weights of the used leaves.

    updated is None for a symmetric Γ.
    """

    params: Params
    observed: Directions
    updated: Directions | None
    weights: Weights

    @property
    def columns(self) -> Directions:
        """The updated side, the observed one where Γ is symmetric."""
        return self.observed if self.updated is None else self.updated


def arrange(
    contexts: GroupedContexts, vectors: Array | None, width: int, summed: bool
) -> Directions:
    """Return the Directions of `[O, B, D]` vectors of contexts (None: unit vectors)."""
    arranged = None
    if vectors is not None:
        sequences, positions = contexts.positions.shape
        empty = jnp.zeros((sequences * positions, *vectors.shape[1:]), vectors.dtype)
        arranged = empty.at[contexts.slots].set(vectors)
        arranged = arranged.reshape(sequences, positions, *vectors.shape[1:])
    return Directions(*contexts[:3], arranged, width, summed)


def cotangent(
    positions_P: Array, vectors_PBD: Array | None, index: Array, side: Directions, length: int
) -> Array:
    """Return direction `index` of one sequence as a cotangent of its features, `[T, D]`."""
    if vectors_PBD is None:
        position, unit = index // side.width, index % side.width
        return jnp.zeros((length, side.width)).at[positions_P[position], unit].set(1)
    if side.summed:
        chosen_PD = vectors_PBD[:, index]
        return jnp.zeros((length, side.width), chosen_PD.dtype).at[positions_P].add(chosen_PD)
    position, number = index // side.per_position, index % side.per_position
    vector_D = vectors_PBD[position, number]
    return jnp.zeros((length, side.width), vector_D.dtype).at[positions_P[position]].set(vector_D)


def contract_features(changes: Array, side: Directions) -> Array:
    """Return c_a · Δφ for changes `[S, T, D]` of the features: `[S, A]`."""

    def sequence(change_TD: Array, positions_P: Array, vectors_PBD: Array | None) -> Array:
        change_PD = change_TD[positions_P]
        if vectors_PBD is None:
            return change_PD.reshape(-1)
        product_PB = einsum("pd,pbd->pb", change_PD, vectors_PBD.astype(change_PD.dtype))
        return jnp.sum(product_PB, axis=0) if side.summed else product_PB.reshape(-1)

    return jax.vmap(sequence)(changes, side.positions, side.vectors)


@functools.partial(jax.jit, static_argnames=("features", "chunk", "forward_mode"))
def jvp_vjp(features: FeatureFunction, inputs: GramInputs, chunk: int, forward_mode: bool) -> Array:
    """Compute Γ by one VJP and one JVP per updated direction, `chunk` of them at a time.

    Without forward mode the JVP is a VJP of a VJP.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    params, observed, updated = inputs.params, inputs.observed, inputs.columns
    push = features.jvp_fn(params, observed.tokens, observed.mask, forward_mode)

    def sequence(arrays: tuple[Any, Array, Array, Array | None]) -> Array:
        tokens, mask, positions, vectors = arrays
        phi, pull = features.vjp_fn(params, add_axis(tokens), mask[None])

        def column(index: Array) -> Array:
            c_TD = cotangent(positions, vectors, index, updated, phi.shape[1])
            changes = push(features.constrain(scale_leaves(pull(c_TD[None]), inputs.weights)))
            return contract_features(at_least_float32(changes), observed)

        return jax.lax.map(column, jnp.arange(updated.per_sequence), batch_size=chunk)

    columns = jax.lax.map(sequence, updated.arrays)
    count = updated.sequences * updated.per_sequence
    return columns.reshape(count, observed.sequences * observed.per_sequence).T


@functools.partial(jax.jit, static_argnames=("features", "chunk"))
def jacobian(features: FeatureFunction, inputs: GramInputs, chunk: int) -> Array:
    """Compute Γ from the gradients of `chunk` directions of each side, by VJPs alone.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    weights = inputs.weights
    if weights is not None:  # for two leading axes
        weights = tuple(w.reshape(1, 1, *w.shape) if w.ndim else w for w in weights)

    def gradients(block: Block) -> Leaves:
        side = block.side

        def sequence(tokens: Any, mask: Array, positions: Array, vectors: Array | None) -> Leaves:
            phi, pull = features.vjp_fn(inputs.params, add_axis(tokens), mask[None])

            def direction(index: Array) -> Leaves:
                return pull(cotangent(positions, vectors, index, side, phi.shape[1])[None])

            return jax.vmap(direction)(block.first + jnp.arange(block.size))

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
    """Directions `first` to `first + size` of every sequence of `side`."""

    side: Directions
    first: Array | int
    size: int


def by_blocks(
    pair: Callable[[Block, Block | None], Array], inputs: GramInputs, chunk: int
) -> Array:
    """Compute Γ block by block, so that few directions exist at a time.

    Args:
      pair: computes one block `[S_o, A_o, S_u, A_u]`; its second argument is None where both are
        the same.
      inputs: with two sides; of a symmetric Γ half is computed.
      chunk: directions of a side that exist at a time, ≥ 1.

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

    def __init__(self, side: Directions, chunk: int):
        sequences, each = side.sequences, side.per_sequence
        if chunk >= each:
            groups = -(-sequences // (chunk // each))
            self.rows, self.each = -(-sequences // groups), each
        else:
            self.rows, self.each = 1, -(-each // -(-each // chunk))
        self.side = side
        self.row_blocks = -(-sequences // self.rows)
        self.direction_blocks = -(-each // self.each)
        self.count = self.row_blocks * self.direction_blocks
        extra = self.row_blocks * self.rows - sequences
        self.padded = side if not extra else side.map(lambda leaf: _repeat_last(leaf, extra))

    def block(self, index: Array | int) -> Block:
        """Return block `index`, direction blocks fastest."""
        row = index // self.direction_blocks
        first = (index % self.direction_blocks) * self.each
        start = row * self.rows
        side = self.padded.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.rows))
        return Block(side, first, self.each)

    def join(self, other: _Blocks, blocks: Array) -> Array:
        """Join `[blocks_o, blocks_u, S, A, S', A']` as `[S_o·A_o, S_u·A_u]`."""
        shape = (self.row_blocks, self.direction_blocks, other.row_blocks, other.direction_blocks)
        ordered = jnp.transpose(blocks.reshape(*shape, *blocks.shape[2:]), (0, 4, 1, 5, 2, 6, 3, 7))
        joined = ordered.reshape(
            self.row_blocks * self.rows,
            self.direction_blocks * self.each,
            other.row_blocks * other.rows,
            other.direction_blocks * other.each,
        )
        (s_o, a_o), (s_u, a_u) = ((b.side.sequences, b.side.per_sequence) for b in (self, other))
        return joined[:s_o, :a_o, :s_u, :a_u].reshape(s_o * a_o, s_u * a_u)


def _repeat_last(leaf: Array, count: int) -> Array:
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], count, axis=0)])
