"""Positions of tokens in their rows and segments, and the keys that each query sees."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.types import Array, Cache

LONG = 1024
"""Tokens from which attention is computed for a chunk of queries at a time."""


class Visible(NamedTuple):
    """Keys visible to each query: real, no later, within a window, of the same segment.

    real: `[B, S]` bool. columns: `[T]` of the queries and `[S]` of the keys.
    segments: `[B, T]` of the queries and `[B, S]` of the keys; None for one sequence per row.
    window: tokens that a query sees, itself included; None for all.
    """

    real: Array
    columns: tuple[Array, Array]
    segments: tuple[Array, Array] | None
    window: int | Array | None

    def table(self) -> Array:
        """Return the visibility `[B, T, S]` as bools."""
        distance_TS = self.columns[0][:, None] - self.columns[1][None, :]
        allowed_BTS = (distance_TS >= 0)[None] & self.real[:, None, :]
        if self.segments is not None:
            queries_BT, keys_BS = self.segments
            allowed_BTS &= queries_BT[:, :, None] == keys_BS[:, None, :]
        return (
            allowed_BTS if self.window is None else allowed_BTS & (distance_TS < self.window)[None]
        )


class Positions(NamedTuple):
    """Positions of the new tokens among all tokens so far.

    position: `[B, T]`, counted over the real tokens of a segment.
    length: `[B, T]` or `[B, 1]`, real tokens of each token's segment so far.
    visible: real keys no later than each query, of its segment.
    """

    position: Array
    length: Array
    visible: Visible

    def within(self, window: int | None) -> Array | Visible:
        """Return `allowed` of queries that see their last `window` tokens, themselves included."""
        if self.position.shape[1] < LONG:
            return self.visible._replace(window=window).table()
        # an array, so that kinds of layers with a window and without stack
        most = jnp.iinfo(jnp.int32).max
        return self.visible._replace(window=jnp.int32(most if window is None else window))


def token_positions(mask_BT: Array, cache: Cache | None) -> tuple[Positions, Cache | None]:
    """Return the positions of new tokens, and the cache with their mask written.

    Args:
      mask_BT: bool, or segment numbers (see types.Policy).
      cache: state before these tokens, or None.

    Raises:
      ValueError: segment numbers together with a cache.
    """
    packed = mask_BT.dtype != bool
    if cache is None:
        before_B1, mask_BS, first = jnp.int32(0), mask_BT, jnp.int32(0)
    elif packed:
        raise ValueError(
            f"decode continues one sequence per row and takes a bool mask, not {mask_BT.dtype}; "
            "rows of several sequences are read by features alone."
        )
    else:
        before_B1 = jnp.sum(cache.mask, axis=1, keepdims=True)
        mask_BS = jax.lax.dynamic_update_slice(cache.mask, mask_BT, (0, cache.length))
        first = cache.length
        cache = dataclasses.replace(cache, mask=mask_BS, length=cache.length + mask_BT.shape[1])
    columns_T, columns_S = first + jnp.arange(mask_BT.shape[1]), jnp.arange(mask_BS.shape[1])
    segments = (mask_BT, mask_BS) if packed else None
    visible = Visible(mask_BS.astype(bool), (columns_T, columns_S), segments, None)
    if packed:
        counted_BT, length = segment_counts(mask_BT)
    else:
        counted_BT = before_B1 + jnp.cumsum(mask_BT, axis=1)
        length = counted_BT[:, -1:]
    return Positions(jnp.maximum(counted_BT - 1, 0), length, visible), cache


def segment_counts(segments_BT: Array) -> tuple[Array, Array]:
    """Return each token's number in its segment, from 1, and the segment's length, both `[B, T]`.

    Args:
      segments_BT: segment numbers in any order; 0 is padding, whose tokens have number 0.
    """
    order_BT = jnp.argsort(segments_BT, axis=1, stable=True)
    sorted_BT = jnp.take_along_axis(segments_BT, order_BT, axis=1)
    columns_1T = jnp.arange(segments_BT.shape[1])[None]
    changes = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    edge_B1 = jnp.ones_like(changes, shape=(changes.shape[0], 1))
    starts_BT = jnp.concatenate([edge_B1, changes], axis=1)
    ends_BT = jnp.concatenate([changes, edge_B1], axis=1)
    first_BT = jax.lax.cummax(jnp.where(starts_BT, columns_1T, 0), axis=1)
    last_BT = jax.lax.cummin(
        jnp.where(ends_BT, columns_1T, segments_BT.shape[1]), axis=1, reverse=True
    )
    inverse_BT = jnp.argsort(order_BT, axis=1)
    number_BT = jnp.take_along_axis(columns_1T - first_BT + 1, inverse_BT, axis=1)
    length_BT = jnp.take_along_axis(last_BT - first_BT + 1, inverse_BT, axis=1)
    return jnp.where(segments_BT > 0, number_BT, 0), length_BT
