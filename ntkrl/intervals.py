"""Intervals and paired tests for few seeds or many prompts; seeded, in numpy.

The rows of the values are resampled: pass a row per independent unit (a prompt, a seed), not per
completion.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CHUNK = 2**20
"""Resampled values in memory at a time."""


class Interval(NamedTuple):
    """A statistic and its bootstrap interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """A mean difference of paired values.

    difference, low, high: mean of b − a and its bootstrap interval.
    p_value: two-sided, in (0, 1]; the probability of a mean at least as far from 0 if the signs of
      the differences were random.
    patterns: number of sign patterns evaluated; exact: whether those are all 2ⁿ.
    """

    difference: float
    low: float
    high: float
    p_value: float
    patterns: int
    exact: bool


def bootstrap(
    statistic: Callable[..., float],
    *columns: np.ndarray,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval.

    Quantiles are observed values, so that a statistic may be infinite. With few rows the
    interval is too short: of n rows only n different values exist.

    Args:
      statistic: of arrays shaped as the columns, a number.
      *columns: arrays with n ≥ 1 rows each, resampled together.
      level: coverage of the interval, in (0, 1).
      draws: number of resamples.
      seed: seed of the resampling.

    Returns:
      Interval.

    Raises:
      ValueError: columns without rows, or of different numbers of them.

    Source: Efron & Tibshirani 1993, section 13.3.
    """
    arrays = [np.asarray(column) for column in columns]
    sizes = {len(array) for array in arrays}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"columns need equally many rows, one or more, not {sorted(sizes)}.")
    (size,) = sizes
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        rows = rng.integers(size, size=size)
        samples.append(statistic(*(array[rows] for array in arrays)))
    return _percentiles(float(statistic(*arrays)), np.array(samples), level)


def mean_interval(
    values: np.ndarray, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of `[n]` values and its interval; `bootstrap`, vectorised."""
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("columns need equally many rows, one or more, not [0].")
    rng, chunk = np.random.default_rng(seed), max(1, CHUNK // len(values))
    samples = []
    for start in range(0, draws, chunk):
        rows = rng.integers(len(values), size=(min(chunk, draws - start), len(values)))
        samples.append(values[rows].mean(axis=1))
    return _percentiles(float(values.mean()), np.concatenate(samples), level)


def _percentiles(value: float, samples: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], method="inverted_cdf")
    return Interval(value, float(low), float(high))


def paired_difference(first: np.ndarray, second: np.ndarray, draws: int = 10_000) -> Paired:
    """Test whether the means of a and b differ, by flipping signs of paired differences.

    All 2ⁿ sign patterns are evaluated where these are at most `draws` (n ≤ 13 at 10 000): then the
    p-value is exact, and at least 2/2ⁿ. Otherwise `draws` random patterns are, and the observed
    pattern is counted as well: (1 + hits)/(1 + draws).

    Args:
      first, second: a and b `[n]`, pair by pair (the same seed or prompt), n ≥ 1.
      draws: as in `bootstrap`.

    Returns:
      Paired, with a 95 % interval.

    Raises:
      ValueError: different numbers of values, or none.

    Source: Fisher 1935; Phipson & Smyth 2010 (adding 1 to both counts).
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"pairs need two lists of equal length, not {a.shape} and {b.shape}.")
    gaps = b - a
    value, low, high = mean_interval(gaps, draws=draws)
    exact = 2 ** len(gaps) <= draws
    if exact:
        bits = np.arange(2 ** len(gaps))[:, None] >> np.arange(len(gaps))[None] & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(draws, len(gaps)))
    means = (1 - 2 * bits) @ gaps / len(gaps)
    # sums in another order differ from the observed one in the last bits
    hits = np.sum(np.abs(means) >= abs(value) - 1e-12 * np.abs(gaps).max())
    p_value = hits / len(bits) if exact else (1 + hits) / (1 + len(bits))
    return Paired(value, low, high, float(p_value), len(bits), exact)
