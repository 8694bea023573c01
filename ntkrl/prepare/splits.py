"""Which rows go where: the random choices of princeton-pli/what-makes-good-rm, number by number."""

from __future__ import annotations

import math

import numpy as np


def split(size: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows in a larger and a smaller part as `datasets`' train_test_split does.

    Args:
      size: rows, ≥ 2.
      share: of the first part, in (0, 1); the second has ⌈(1 − share) size⌉ rows.
      seed: ≥ 0.

    Returns:
      The rows of either, in the order of the permutation.

    Raises:
      ValueError: too few rows for two parts.
    """
    second = math.ceil((1 - share) * size)
    if not 0 < second < size:
        raise ValueError(f"{size} preferences cannot be divided in shares of {share} and the rest.")
    order = np.random.default_rng(seed).permutation(size)
    return order[second:], order[:second]


def select(size: int, count: int, seed: int) -> np.ndarray:
    """Choose rows at random: the first of a permutation; all in order where there are no more."""
    if count >= size:
        return np.arange(size)
    return np.random.RandomState(seed).permutation(size)[:count]
