"""How many different things a policy says, and how often one of k attempts succeeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct_counts(
    texts: Sequence[str], successes: Sequence[bool], group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count distinct completions and distinct successful completions per prompt.

    Args:
      texts: B completions, groups of `group_size` consecutive.
      successes: B flags.
      group_size: samples per prompt.

    Returns:
      Two `[P]` int arrays: distinct texts (in [1, N]), distinct successful texts (in [0, N]).
    """
    everything, solved = [], []
    for start in range(0, len(texts), group_size):
        group = range(start, start + group_size)
        everything.append(len({texts[i] for i in group}))
        solved.append(len({texts[i] for i in group if successes[i]}))
    return np.array(everything), np.array(solved)


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """Estimate without bias the chance that one of k draws succeeds: 1 − C(n−c, k)/C(n, k).

    Args:
      successes: c, in [0, n].
      samples: n ≥ k.
      k: draws, ≥ 1.

    Raises:
      ValueError: k larger than n or smaller than 1.

    Source: Chen et al. 2107.03374, eq. 1, in the product form that does not overflow.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n, not k = {k}, n = {samples}.")
    if samples - successes < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - successes + 1, samples + 1)))
