"""From token ids to the padded arrays of a batch.

Prompts are left-padded and completions right-padded, so that the completions of a batch start
at one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from ntkrl.types import Array, PromptBatch, Rollout, UpdateBatch

Batch = TypeVar("Batch", Rollout, UpdateBatch)


def prompt_batch(
    encoded: Sequence[Sequence[int]],
    rows: Sequence[int] | np.ndarray,
    pad_id: int,
    length: int,
    copies: np.ndarray | None = None,
) -> PromptBatch:
    """Left-pad the prompts of some rows.

    Args:
      encoded: token ids of every prompt of the set.
      rows: `[P]` which of them.
      pad_id: token written where the mask is False.
      length: T, at least the longest chosen prompt (tokens).
      copies: `[P]` how often each was asked before; None counts within `rows`.

    Returns:
      tokens and mask `[P, length]`, rows and copies `[P]`.

    Raises:
      ValueError: a chosen prompt is longer than `length`.
    """
    tokens_PT, mask_PT = _padded(encoded, rows, pad_id, length, left=True)
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
    encoded_prompts: Sequence[Sequence[int]],
    encoded_completions: Sequence[Sequence[int]],
    rows: Sequence[int] | np.ndarray,
    pad_id: int,
    prompt_length: int,
    completion_length: int,
) -> UpdateBatch:
    """Lay out given completions like sampled ones, so that supervised training is an update.

    Args:
      encoded_prompts: token ids of every prompt of the set.
      encoded_completions: token ids of every completion of the set.
      rows: `[B]` which of them.
      pad_id: token written where the mask is False.
      prompt_length: columns of the left-padded prompt (tokens).
      completion_length: C, columns of the right-padded completion (tokens).

    Returns:
      tokens and mask `[B, prompt_length + C]`, completion_mask `[B, C]` on completion tokens,
      old and reference log-probs `[B, C]` zero, advantages `[B, C]` one.

    Raises:
      ValueError: a chosen prompt or completion is longer than its columns.
    """
    prompts_BT, prompt_mask_BT = _padded(encoded_prompts, rows, pad_id, prompt_length, left=True)
    completions_BC, mask_BC = _padded(
        encoded_completions, rows, pad_id, completion_length, left=False
    )
    zeros_BC = jnp.zeros(mask_BC.shape, jnp.float32)
    return UpdateBatch(
        tokens=jnp.asarray(np.concatenate([prompts_BT, completions_BC], axis=1)),
        mask=jnp.asarray(np.concatenate([prompt_mask_BT, mask_BC], axis=1)),
        completion_mask=jnp.asarray(mask_BC),
        old_log_probs=zeros_BC,
        ref_log_probs=zeros_BC,
        advantages=jnp.ones(mask_BC.shape, jnp.float32),
    )


def _padded(
    encoded: Sequence[Sequence[int]],
    rows: Sequence[int] | np.ndarray,
    pad_id: int,
    length: int,
    left: bool,
) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.full((len(rows), length), pad_id, np.int32)
    mask_BT = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids = encoded[row]
        if len(ids) > length:
            raise ValueError(
                f"row {row} has {len(ids)} tokens and does not fit {length} columns; "
                "raise the length (see bucket_length)."
            )
        columns = slice(length - len(ids), length) if left else slice(0, len(ids))
        tokens_BT[i, columns] = ids
        mask_BT[i, columns] = True
    return tokens_BT, mask_BT


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

    return batch.replace(**{name: pad(name, leaf) for name, leaf in batch.items()})
