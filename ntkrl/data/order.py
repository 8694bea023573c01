"""Which rows the next batch holds: a pure function of how many batches were drawn.

Resuming a run needs one integer, and no iterator has a state to save.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkrl.data.prompts import PromptSet


def rows_at(position: int, size: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the rows of the batch at a position.

    Epoch e visits the rows in the order `default_rng((seed, e)).permutation(size)`; the rows
    left over after the last whole batch of an epoch are dropped for that epoch.

    Args:
      position: batches drawn so far, ≥ 0.
      size: rows of the prompt set.
      batch_size: rows per batch, 1 to `size`.
      seed: ≥ 0.

    Returns:
      `[batch_size]` int32 rows, all different.

    Raises:
      ValueError: an argument outside its range.
    """
    epoch = epoch_at(position, size, batch_size)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more.")
    start = position % (size // batch_size) * batch_size
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[start : start + batch_size].astype(np.int32)


def epoch_at(position: int, size: int, batch_size: int) -> int:
    """Return the number of whole epochs before the batch at a position.

    Args:
      position: batches drawn so far, ≥ 0.
      size: rows of the prompt set.
      batch_size: rows per batch, 1 to `size`.

    Returns:
      The epoch, from 0.

    Raises:
      ValueError: an argument outside its range.
    """
    if position < 0:
        raise ValueError(f"position is {position}; it counts batches drawn and is 0 or more.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    if size < batch_size:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be drawn from {size} rows; "
            f"lower the batch size to at most {size} or add rows."
        )
    return position // (size // batch_size)


def hold_out(prompt_set: PromptSet, fraction: float) -> tuple[PromptSet, PromptSet]:
    """Divide a prompt set in one to train on and one to evaluate on.

    The same rows are held out whatever the run's seed, so runs can be compared.

    Args:
      prompt_set: at least 2 prompts.
      fraction: share to hold out, in (0, 1); at least one prompt goes each way.

    Returns:
      `(training, held out)`, rows in file order.

    Raises:
      ValueError: fewer than 2 prompts.
    """
    size = len(prompt_set.prompts)
    if size < 2:
        raise ValueError(
            f"{prompt_set.source} has {size} prompt, too few to hold any out; add prompts, name "
            "data.eval_path, or set eval.every_steps to None."
        )
    held = min(max(round(fraction * size), 1), size - 1)
    chosen = np.random.default_rng(0).permutation(size)[:held]
    rest = np.setdiff1d(np.arange(size), chosen)
    return _rows_of(prompt_set, rest), _rows_of(prompt_set, np.sort(chosen))


def _rows_of(prompt_set: PromptSet, rows: np.ndarray) -> PromptSet:
    return dataclasses.replace(
        prompt_set,
        prompts=tuple(prompt_set.prompts[row] for row in rows),
        columns={name: [held[row] for row in rows] for name, held in prompt_set.columns.items()},
    )
