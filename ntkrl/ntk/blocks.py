"""Fill a Gram matrix block by block, so that a chosen number of directions exists at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.ntk.directions import Directions
from ntkrl.types import Array


class Block(NamedTuple):
    """Directions `first` to `first + count` of every sequence of `side`."""

    side: Directions
    first: Array
    count: int


Pair = Callable[[Block, Block | None], Array]
"""`(observed, updated) -> [S_o, A_o, S_u, A_u]`; None where updated is observed."""


def block_shape(side: Directions, chunk: int) -> tuple[int, int]:
    """Return sequences and directions per sequence of a block of at most `chunk` directions."""
    sequences, each = side.sequences, side.per_sequence
    if chunk >= each:
        count = -(-sequences // (chunk // each))
        return -(-sequences // count), each
    return 1, -(-each // -(-each // chunk))


def by_blocks(pair: Pair, observed: Directions, updated: Directions | None, chunk: int) -> Array:
    """Return Γ of all directions.

    Args:
      pair: computes one block.
      observed, updated: the two sides; None for a symmetric Γ, of which half is computed.
      chunk: directions of a side that exist at a time, ≥ 1.

    Returns:
      `[S_o·A_o, S_u·A_u]`.
    """
    other = observed if updated is None else updated
    cut_o, cut_u = _Cut(observed, chunk), _Cut(other, chunk)
    if cut_o.count == cut_u.count == 1:
        whole = pair(cut_o.block(0), None if updated is None else cut_u.block(0))
        return cut_o.join(cut_u, whole[None, None])
    if updated is None:
        first, second = np.triu_indices(cut_o.count)
    else:
        first, second = (axis.ravel() for axis in np.indices((cut_o.count, cut_u.count)))
    filled = jax.lax.map(
        lambda ij: pair(cut_o.block(ij[0]), cut_u.block(ij[1])),
        (jnp.asarray(first), jnp.asarray(second)),
    )
    if updated is not None:
        return cut_o.join(cut_u, filled.reshape(cut_o.count, cut_u.count, *filled.shape[1:]))
    place = np.zeros((cut_o.count, cut_o.count), int)
    place[first, second] = place[second, first] = np.arange(len(first))
    upper = np.triu(np.ones_like(place, bool))[..., None, None, None, None]
    mirrored = jnp.transpose(filled, (0, 3, 4, 1, 2))
    return cut_o.join(cut_u, jnp.where(upper, filled[place], mirrored[place]))


class _Cut:
    """A side cut into equal blocks; what sticks out over the end is dropped when joining."""

    def __init__(self, side: Directions, chunk: int):
        self.side = side
        self.rows, self.each = block_shape(side, chunk)
        self.row_blocks = -(-side.sequences // self.rows)
        self.direction_blocks = -(-side.per_sequence // self.each)
        self.count = self.row_blocks * self.direction_blocks
        self.padded = side.padded(self.row_blocks * self.rows)

    def block(self, index: Array | int) -> Block:
        """Return block `index`, direction blocks fastest."""
        row = index // self.direction_blocks
        first = (index % self.direction_blocks) * self.each
        return Block(self.padded.rows(row * self.rows, self.rows), first, self.each)

    def join(self, other: _Cut, blocks: Array) -> Array:
        """Put `[blocks_o, blocks_u, S, A, S', A']` together as `[S_o·A_o, S_u·A_u]`."""
        shape = (self.row_blocks, self.direction_blocks, other.row_blocks, other.direction_blocks)
        spread = blocks.reshape(*shape, *blocks.shape[2:])
        spread = jnp.transpose(spread, (0, 4, 1, 5, 2, 6, 3, 7))
        whole = spread.reshape(
            self.row_blocks * self.rows,
            self.direction_blocks * self.each,
            other.row_blocks * other.rows,
            other.direction_blocks * other.each,
        )
        mine, theirs = self.side, other.side
        kept = whole[
            : mine.sequences, : mine.per_sequence, : theirs.sequences, : theirs.per_sequence
        ]
        return kept.reshape(
            mine.sequences * mine.per_sequence, theirs.sequences * theirs.per_sequence
        )
