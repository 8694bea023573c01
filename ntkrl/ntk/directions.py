"""Directions in feature space, one side of a Gram matrix of feature Jacobians.

Every body form is Γ[a, b] = c_aᵀ J_φ J_φ'ᵀ c_b for directions c at positions of sequences: the unit
vectors give M, the rows of W give entries of G, W^T g gives score functions, a sum over positions
gives sequence aggregates. A algorithm (see estimates.py) is a way to compute Γ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.ntk.contexts import GroupedContexts
from ntkrl.numerics import einsum
from ntkrl.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """A directions at each of S sequences: A = P·B, or A = B where positions are summed.

    tokens: inputs, S in front.
    mask: `[S, T]`.
    positions: `[S, P]`.
    vectors: `[S, P, B, D]`; None for the D unit vectors at each position (B = D).
    width: D.
    summed: whether a direction acts at all P positions at once.
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

    def rows(self, start: Array, count: int) -> Directions:
        """Return `count` sequences from `start` on."""
        sliced = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count),
            (self.tokens, self.mask, self.positions, self.vectors),
        )
        return dataclasses.replace(
            self, tokens=sliced[0], mask=sliced[1], positions=sliced[2], vectors=sliced[3]
        )

    def padded(self, sequences: int) -> Directions:
        """Repeat the last sequence until there are as many."""
        extra = sequences - self.sequences
        if not extra:
            return self
        more = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], extra, axis=0)]),
            (self.tokens, self.mask, self.positions, self.vectors),
        )
        return dataclasses.replace(
            self, tokens=more[0], mask=more[1], positions=more[2], vectors=more[3]
        )


def directions(
    sides: GroupedContexts, vectors: Array | None, width: int, summed: bool
) -> Directions:
    """Arrange `[O, B, D]` vectors of contexts (None: unit vectors) by sequence."""
    arranged = None
    if vectors is not None:
        sequences, places = sides.positions.shape
        empty = jnp.zeros((sequences * places, *vectors.shape[1:]), vectors.dtype)
        arranged = empty.at[sides.slots].set(vectors)
        arranged = arranged.reshape(sequences, places, *vectors.shape[1:])
    return Directions(sides.tokens, sides.mask, sides.positions, arranged, width, summed)


def cotangent(
    positions_P: Array, vectors_PBD: Array | None, index: Array, shape: Directions, length: int
) -> Array:
    """Return direction `index` of one sequence as a cotangent of its features, `[T, D]`."""
    if vectors_PBD is None:
        place, unit = index // shape.width, index % shape.width
        return jnp.zeros((length, shape.width)).at[positions_P[place], unit].set(1)
    if shape.summed:
        chosen_PD = vectors_PBD[:, index]
        return jnp.zeros((length, shape.width), chosen_PD.dtype).at[positions_P].add(chosen_PD)
    place, which = index // shape.per_position, index % shape.per_position
    vector_D = vectors_PBD[place, which]
    return jnp.zeros((length, shape.width), vector_D.dtype).at[positions_P[place]].set(vector_D)


def against(changes: Array, side: Directions) -> Array:
    """Return c_a · Δφ for changes `[S, T, D]` of the features: `[S, A]`."""

    def one(change_TD: Array, positions_P: Array, vectors_PBD: Array | None) -> Array:
        change_PD = change_TD[positions_P]
        if vectors_PBD is None:
            return change_PD.reshape(-1)
        found_PB = einsum("pd,pbd->pb", change_PD, vectors_PBD.astype(change_PD.dtype))
        return jnp.sum(found_PB, axis=0) if side.summed else found_PB.reshape(-1)

    return jax.vmap(one)(changes, side.positions, side.vectors)
