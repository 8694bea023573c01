"""Several examples in one row, so that short ones waste no columns.

A row holds its examples one after the other, prompt then completion, with a segment number on each
(see types.Policy). To the loss a packed row is a completion of all columns but the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ntkrl.types import UpdateBatch


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items in few rows: the longest first, each in the first row with room for it.

    Args:
      lengths: of the items (tokens).
      capacity: of a row (tokens).

    Returns:
      The items of each row. At most 11/9 of the fewest rows possible, and 6/9 more.

    Raises:
      ValueError: items longer than a row.

    Source: first fit decreasing; Dósa 2007 for the bound.
    """
    if too_long := [i for i, length in enumerate(lengths) if length > capacity]:
        raise ValueError(f"items {too_long} are longer than a row of {capacity} tokens.")
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def packed_batches(
    encoded_prompts: Sequence[Sequence[int]],
    encoded_completions: Sequence[Sequence[int]],
    parts: Sequence[Sequence[int] | np.ndarray],
    pad_id: int,
    length: int,
    multiple: int = 1,
) -> list[UpdateBatch]:
    """Pack each part's examples into a batch of its own; all batches have one shape.

    The number of rows is `multiple` times 1, 2, 3, 4, 6, 8, 12, …, or as many as unpacked, so that
    few shapes compile; rows left over are padding.

    Args:
      encoded_prompts: token ids of every prompt of the set, none empty.
      encoded_completions: token ids of every completion of the set.
      parts: rows of the set that each batch holds.
      pad_id: token written where the mask is 0.
      length: T, columns of a row (tokens).
      multiple: what the number of rows is to be divisible by.

    Returns:
      Batches with tokens and segment numbers `[R, T]`, completion_mask `[R, T − 1]` on completion
      tokens, old and reference log-probs `[R, T − 1]` zero, advantages `[R, T − 1]` one.

    Raises:
      ValueError: an example longer than a row.
    """
    examples = [[(encoded_prompts[r], encoded_completions[r]) for r in part] for part in parts]
    packs = [pack([len(p) + len(c) for p, c in part], length) for part in examples]
    needed, enough = (-(-max(map(len, each)) // multiple) for each in (packs, parts))
    rows = multiple * min(_bucket(needed), enough)
    return [
        _batch([[part[i] for i in row] for row in packed], pad_id, (rows, length))
        for part, packed in zip(examples, packs, strict=True)
    ]


def _bucket(count: int) -> int:
    """Return the first of 1, 2, 3, 4, 6, 8, 12, 16, … that is at least `count`."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if 4 * count <= 3 * power else power


def _batch(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    pad_id: int,
    shape: tuple[int, int],
) -> UpdateBatch:
    tokens_BT = np.full(shape, pad_id, np.int32)
    segments_BT, counted_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        ends = itertools.accumulate(len(prompt) + len(completion) for prompt, completion in row)
        for segment, ((prompt, completion), end) in enumerate(zip(row, ends, strict=True), start=1):
            start = end - len(completion) - len(prompt)
            tokens_BT[i, start:end] = [*prompt, *completion]
            segments_BT[i, start:end] = segment
            counted_BT[i, end - len(completion) : end] = True
    zeros_BC = jnp.zeros((shape[0], shape[1] - 1), jnp.float32)
    return UpdateBatch(
        tokens=jnp.asarray(tokens_BT),
        mask=jnp.asarray(segments_BT),
        completion_mask=jnp.asarray(counted_BT[:, 1:]),
        old_log_probs=zeros_BC,
        ref_log_probs=zeros_BC,
        advantages=jnp.ones(zeros_BC.shape, jnp.float32),
    )
