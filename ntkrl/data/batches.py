"""Padded and packed batches of token ids.

Prompts are left-padded and completions right-padded, so that all completions of a batch start at
the same column. A packed row concatenates examples, prompt then completion, with a segment number
on each (see types.Policy); to the loss it is a completion of all columns but the first.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from ntkrl.types import Array, PromptBatch, Rollout, UpdateBatch

Batch = TypeVar("Batch", Rollout, UpdateBatch)

Encoded = Sequence[Sequence[int]]


def pad_rows(
    rows: Iterable[tuple[int, Sequence[int]]], shape: tuple[int, int], pad_id: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens `[B, T]` int32 and mask `[B, T]` bool; missing rows are padding.

    Args:
      rows: number of each row, for messages, and its token ids; at most B.
      shape: (B, T).
      pad_id: token written where the mask is False.
      left: pad on the left, else on the right.

    Raises:
      ValueError: a row is longer than T.
    """
    tokens_BT, mask_BT = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    length = shape[1]
    for i, (number, ids) in enumerate(rows):
        if len(ids) > length:
            raise ValueError(
                f"row {number} has {len(ids)} tokens and does not fit {length} columns; "
                "raise the length (see bucket_length)."
            )
        columns = slice(length - len(ids), length) if left else slice(0, len(ids))
        tokens_BT[i, columns] = ids
        mask_BT[i, columns] = True
    return tokens_BT, mask_BT


def prompt_batch(
    encoded: Encoded,
    rows: Sequence[int] | np.ndarray,
    pad_id: int,
    length: int,
    copies: np.ndarray | None = None,
) -> PromptBatch:
    """Left-pad the prompts of `rows [P]` to `length` (tokens).

    Args:
      encoded: token ids of every prompt of the set.
      rows: `[P]` rows of the set.
      pad_id: token written where the mask is False.
      length: T, at least the longest chosen prompt (tokens).
      copies: `[P]` number of earlier occurrences of each; None counts them within `rows`.

    Raises:
      ValueError: a chosen prompt is longer than `length`.
    """
    tokens_PT, mask_PT = _select(encoded, rows, pad_id, length, left=True)
    rows_P = np.asarray(rows, np.int32)
    if copies is None:
        copies = np.triu(rows_P[:, None] == rows_P[None], 1).sum(axis=0)
    return PromptBatch(
        tokens=jnp.asarray(tokens_PT),
        mask=jnp.asarray(mask_PT),
        rows=jnp.asarray(rows_P),
        copies=jnp.asarray(copies, jnp.int32),
    )


def supervised_batch(
    encoded_prompts: Encoded,
    encoded_completions: Encoded,
    rows: Sequence[int] | np.ndarray,
    pad_id: int,
    prompt_length: int,
    completion_length: int,
) -> UpdateBatch:
    """Arrange reference completions like sampled ones, so that SFT is an ordinary update.

    Args:
      encoded_prompts, encoded_completions: token ids of every row of the set.
      rows: `[B]` rows of the set.
      pad_id: token written where the mask is False.
      prompt_length: columns of the left-padded prompt (tokens).
      completion_length: C, columns of the right-padded completion (tokens).

    Returns:
      tokens and mask `[B, prompt_length + C]`, completion_mask `[B, C]` on completion tokens,
      old and reference log-probs `[B, C]` zero, advantages `[B, C]` one.

    Raises:
      ValueError: a chosen prompt or completion is longer than its columns.
    """
    prompts_BT, prompt_mask_BT = _select(encoded_prompts, rows, pad_id, prompt_length, left=True)
    completions_BC, mask_BC = _select(
        encoded_completions, rows, pad_id, completion_length, left=False
    )
    tokens_BT = np.concatenate([prompts_BT, completions_BC], axis=1)
    return _update_batch(tokens_BT, np.concatenate([prompt_mask_BT, mask_BC], axis=1), mask_BC)


def _select(
    encoded: Encoded, rows: Sequence[int] | np.ndarray, pad_id: int, length: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    numbered = ((row, encoded[row]) for row in rows)
    return pad_rows(numbered, (len(rows), length), pad_id, left)


def _update_batch(tokens: np.ndarray, mask: np.ndarray, completion_mask: np.ndarray) -> UpdateBatch:
    zeros_BC = jnp.zeros(completion_mask.shape, jnp.float32)
    return UpdateBatch(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        completion_mask=jnp.asarray(completion_mask),
        old_log_probs=zeros_BC,
        ref_log_probs=zeros_BC,
        advantages=jnp.ones(completion_mask.shape, jnp.float32),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to rows by first fit decreasing; return the items of each row.

    Args:
      lengths: of the items (tokens).
      capacity: of a row (tokens).

    Raises:
      ValueError: items longer than a row.

    Source: Dósa 2007: at most 11/9 of the minimal number of rows, plus 6/9.
    """
    if too_long := [i for i, length in enumerate(lengths) if length > capacity]:
        raise ValueError(f"items {too_long} are longer than a row of {capacity} tokens.")
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def packed_batches(
    encoded_prompts: Encoded,
    encoded_completions: Encoded,
    parts: Sequence[Sequence[int] | np.ndarray],
    pad_id: int,
    length: int,
    multiple: int = 1,
) -> list[UpdateBatch]:
    """Pack the examples of each part into one batch; all batches have the same shape.

    The number of rows R is `multiple` times 1, 2, 3, 4, 6, 8, 12, …, or the unpacked number, so
    that few shapes compile; unused rows are padding.

    Args:
      encoded_prompts, encoded_completions: token ids of every row of the set; prompts not empty.
      parts: rows of the set, by batch.
      pad_id: token written where the mask is 0.
      length: T, columns of a row (tokens).
      multiple: divisor of the number of rows.

    Returns:
      Batches with tokens and segment numbers `[R, T]`, completion_mask `[R, T − 1]` on completion
      tokens, old and reference log-probs `[R, T − 1]` zero, advantages `[R, T − 1]` one.

    Raises:
      ValueError: an example longer than a row.
    """
    examples = [[(encoded_prompts[r], encoded_completions[r]) for r in part] for part in parts]
    packs = [pack([len(p) + len(c) for p, c in part], length) for part in examples]
    packed_rows, unpacked_rows = (-(-max(map(len, each)) // multiple) for each in (packs, parts))
    rows = multiple * min(_bucket(packed_rows), unpacked_rows)
    return [
        _pack_batch([[part[i] for i in row] for row in packed], pad_id, (rows, length))
        for part, packed in zip(examples, packs, strict=True)
    ]


def _bucket(count: int) -> int:
    """Return the first of 1, 2, 3, 4, 6, 8, 12, 16, … that is at least `count`."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if 4 * count <= 3 * power else power


def _pack_batch(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    pad_id: int,
    shape: tuple[int, int],
) -> UpdateBatch:
    tokens_BT = np.full(shape, pad_id, np.int32)
    segments_BT, completion_mask_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        ends = itertools.accumulate(len(prompt) + len(completion) for prompt, completion in row)
        for segment, ((prompt, completion), end) in enumerate(zip(row, ends, strict=True), start=1):
            start = end - len(completion) - len(prompt)
            tokens_BT[i, start:end] = [*prompt, *completion]
            segments_BT[i, start:end] = segment
            completion_mask_BT[i, end - len(completion) : end] = True
    return _update_batch(tokens_BT, segments_BT, completion_mask_BT[:, 1:])


def widened(batch: Batch, prompt_length: int, completion_length: int, pad_id: int) -> Batch:
    """Pad a batch to longer prompts (on the left) and longer completions (on the right).

    Args:
      batch: a Rollout or an UpdateBatch; arrays of the host or of devices.
      prompt_length: columns of the prompt (tokens), at least the batch's.
      completion_length: C, columns of the completion (tokens), at least the batch's.
      pad_id: token written where the mask is False; masks and other arrays are padded with 0.

    Returns:
      The batch, tokens and mask `[B, prompt_length + C]`, what is per completion token `[B, C, …]`.
    """
    length = batch.completion_mask.shape[1]
    after = completion_length - length
    before = prompt_length - (batch.tokens.shape[1] - length)

    def pad(name: str, leaf: Array | np.ndarray | None) -> Array | np.ndarray | None:
        if leaf is None or leaf.ndim < 2:
            return leaf
        left = before if name in ("tokens", "mask") else 0
        sides = [(0, 0), (left, after)] + [(0, 0)] * (leaf.ndim - 2)
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        return numpy.pad(leaf, sides, constant_values=pad_id if name == "tokens" else 0)

    names = [field.name for field in dataclasses.fields(batch)]
    padded: dict[str, Any] = {name: pad(name, getattr(batch, name)) for name in names}
    return dataclasses.replace(batch, **padded)
