"""Order of rows: the rows of a batch are a pure function of its position.

A run resumes from one integer; there is no iterator state to save. Also selections of rows.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ntkrl.data.prompts import PromptSet


def rows_at(position: int, size: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the rows `[batch_size]` int32 of the batch at a position, all different.

    Epoch e visits the rows in the order `default_rng((seed, e)).permutation(size)`, without those
    that do not fill a batch.

    Args:
      position: batches drawn so far, ≥ 0.
      size: rows of the prompt set.
      batch_size: rows per batch, 1 to `size`.
      seed: ≥ 0.

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
    """Return the rows `[batch_size]` int32 of the batch at a position, by weight of their file.

    The d-th draw from file f (from 0) has time (d + 1/2) / w_f, w the weights divided by their sum;
    draws are ordered by time. Of F files, after n draws, file f has w_f n ± (1/2 + w_f F / 2) of
    them. Its d-th draw is entry d % n_f of `default_rng((seed, f, d // n_f)).permutation(n_f)`, so
    that a row recurs only after all n_f rows of its file, possibly within one batch.

    Args:
      position: batches drawn so far, ≥ 0.
      sizes: rows of each file, ≥ 1; files are concatenated in the set.
      batch_size: rows per batch, ≥ 1.
      seed: ≥ 0.
      weights: one per file, > 0; their decimal digits are taken as exact.

    Raises:
      ValueError: an argument outside its range.

    Source: Webster's method of apportionment, applied sequentially.
    """
    positive = len(weights) == len(sizes) and all(0 < weight < math.inf for weight in weights)
    if min(position, seed) < 0 or min(batch_size, *sizes) < 1 or not positive:
        raise ValueError(
            f"position {position} and seed {seed} must be 0 or more, batch_size {batch_size} and "
            f"sizes {tuple(sizes)} 1 or more, weights {tuple(weights)} positive, one per size."
        )
    total = sum(map(_exact, weights))
    draws = _draws(position * batch_size, batch_size, [_exact(w) / total for w in weights])
    firsts = np.cumsum([0, *sizes])

    @functools.cache
    def order(file: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, file, epoch)).permutation(sizes[file])

    rows = [
        firsts[file] + order(file, draw // sizes[file])[draw % sizes[file]] for file, draw in draws
    ]
    return np.asarray(rows, np.int32)


def _exact(weight: float) -> Fraction:
    return Fraction(str(weight))


def _draws(start: int, count: int, shares: Sequence[Fraction]) -> list[tuple[int, int]]:
    """Return `(file, draw of it)` for `count` draws after the first `start`."""
    half = Fraction(1, 2)
    # the draws before this time are among the first `start`, all but a few of them
    time = max(start - len(shares), 0)
    drawn = [math.ceil(share * time - half) for share in shares]
    due = [((drawn[file] + half) / share, file) for file, share in enumerate(shares)]
    heapq.heapify(due)
    draws = []
    for _ in range(start + count - sum(drawn)):
        draw_time, file = due[0]
        draws.append((file, drawn[file]))
        drawn[file] += 1
        heapq.heapreplace(due, (draw_time + 1 / shares[file], file))
    return draws[-count:]


def epoch_at(position: int, size: int, batch_size: int) -> int:
    """Return the number of complete epochs before the batch at a position; arguments as `rows_at`.

    Raises:
      ValueError: an argument outside its range.
    """
    if position < 0:
        raise ValueError(f"position is {position}; it counts batches drawn and must be ≥ 0.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    if size < batch_size:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be drawn from {size} rows; "
            f"lower the batch size to at most {size} or add rows."
        )
    return position // (size // batch_size)


def hold_out(prompt_set: PromptSet, fraction: float) -> tuple[PromptSet, PromptSet]:
    """Split a prompt set into training and evaluation prompts, rows in file order.

    The split does not depend on the run's seed, so that runs can be compared.

    Args:
      prompt_set: at least 2 prompts.
      fraction: share to hold out, in (0, 1); both parts get at least one prompt.

    Raises:
      ValueError: fewer than 2 prompts.
    """
    size = len(prompt_set.prompts)
    if size < 2:
        raise ValueError(
            f"{prompt_set.source} has {size} prompt, too few to hold any out; add prompts, set "
            "data.eval_path, or hold none out: eval.every_steps=None, probe.every_steps=None and "
            "probe.ledger_every_steps=None."
        )
    count = min(max(round(fraction * size), 1), size - 1)
    held_out = np.random.default_rng(0).permutation(size)[:count]
    training = np.setdiff1d(np.arange(size), held_out)
    return take(prompt_set, training), take(prompt_set, np.sort(held_out))


def spread(sizes: Sequence[int]) -> np.ndarray:
    """Interleave the rows of concatenated files, so that every prefix samples all of them.

    Row i of a file of n rows is at relative place (i + 1/2) / n; one file is unchanged.

    Args:
      sizes: rows of each file, ≥ 1.
    """
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.argsort(places, kind="stable")


def take(prompt_set: PromptSet, rows: np.ndarray) -> PromptSet:
    """Return some rows of a prompt set, in the order of `rows`."""
    return dataclasses.replace(
        prompt_set,
        prompts=tuple(prompt_set.prompts[row] for row in rows),
        columns={
            name: [values[row] for row in rows] for name, values in prompt_set.columns.items()
        },
        places=tuple(prompt_set.place(row) for row in rows),
    )
