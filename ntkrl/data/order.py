"""Which rows the next batch holds: a pure function of how many batches were drawn.

Resuming a run needs one integer, and no iterator has a state to save.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

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


def weighted_rows_at(
    position: int, sizes: Sequence[int], batch_size: int, seed: int, weights: Sequence[float]
) -> np.ndarray:
    """Return the rows of the batch at a position, files taking turns by weight.

    The d-th draw from file f (from 0) is due at (d + 1/2) / w_f, w the weights divided by their
    sum, and draws are made in the order they are due. Of F files, after n draws, file f has had
    w_f n of them give or take 1/2 + w_f F / 2, wherever batches begin. Its d-th draw is entry
    d mod size of `default_rng((seed, f, d // size)).permutation(size)`.

    Args:
      position: batches drawn so far, ≥ 0.
      sizes: rows of each file, ≥ 1; the files lie one after the other in the set.
      batch_size: rows per batch, ≥ 1.
      seed: ≥ 0.
      weights: one per file, > 0; their decimal digits are taken at their word.

    Returns:
      `[batch_size]` int32 rows of the set. A row is seen again only after all others of its file,
      which can be in one batch.

    Raises:
      ValueError: an argument outside its range.

    Source: Webster's method of apportionment, drawn one by one.
    """
    positive = len(weights) == len(sizes) and all(0 < weight < math.inf for weight in weights)
    if min(position, seed) < 0 or min(batch_size, *sizes) < 1 or not positive:
        raise ValueError(
            f"position {position} and seed {seed} must be 0 or more, batch_size {batch_size} and "
            f"sizes {tuple(sizes)} 1 or more, weights {tuple(weights)} positive, one per size."
        )
    total = sum(map(_exact, weights))
    turns = _turns(position * batch_size, batch_size, [_exact(w) / total for w in weights])
    firsts = np.cumsum([0, *sizes])

    @functools.cache
    def order(file: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, file, epoch)).permutation(sizes[file])

    rows = [
        firsts[file] + order(file, draw // sizes[file])[draw % sizes[file]] for file, draw in turns
    ]
    return np.asarray(rows, np.int32)


def _exact(weight: float) -> Fraction:
    return Fraction(str(weight))


def _turns(start: int, count: int, shares: Sequence[Fraction]) -> list[tuple[int, int]]:
    """Return `(file, which draw of it)` for `count` draws after the first `start`."""
    half = Fraction(1, 2)
    # All that is due before this time is among the first `start` draws, and lacks a few of them.
    time = max(start - len(shares), 0)
    drawn = [math.ceil(share * time - half) for share in shares]
    due = [((drawn[file] + half) / share, file) for file, share in enumerate(shares)]
    heapq.heapify(due)
    turns = []
    for _ in range(start + count - sum(drawn)):
        when, file = due[0]
        turns.append((file, drawn[file]))
        drawn[file] += 1
        heapq.heapreplace(due, (when + 1 / shares[file], file))
    return turns[-count:]


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
    return take(prompt_set, rest), take(prompt_set, np.sort(chosen))


def spread(sizes: Sequence[int]) -> np.ndarray:
    """Return the rows of files that lie one after the other, so that any first few are of all.

    Args:
      sizes: rows of each file, ≥ 1.

    Returns:
      `[Σ sizes]` rows: row i of a file of n at (i + 1/2) / n of the way. One file stays as it is.
    """
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.argsort(places, kind="stable")


def take(prompt_set: PromptSet, rows: np.ndarray) -> PromptSet:
    """Return some rows of a prompt set, in the order given."""
    return dataclasses.replace(
        prompt_set,
        prompts=tuple(prompt_set.prompts[row] for row in rows),
        columns={name: [held[row] for row in rows] for name, held in prompt_set.columns.items()},
    )
