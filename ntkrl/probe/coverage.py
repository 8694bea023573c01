"""What many samples of a policy reach: pass@k, best-of-N, and support kept, lost and gained."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.intervals import Interval, bootstrap
from ntkrl.probe.diversity import pass_at_k


def pass_curves(successes: Sequence[int], samples: int, ks: Sequence[int]) -> np.ndarray:
    """Return the unbiased pass@k of every prompt at every k.

    Args:
      successes: `[P]` successful samples of each prompt, in [0, n].
      samples: n drawn for each.
      ks: `[K]`, each in [1, n].

    Returns:
      `[P, K]`; its mean over prompts is the pass@k curve.

    Raises:
      ValueError: a k out of range.

    Source: Chen et al. 2107.03374, eq. 1.
    """
    return np.array([[pass_at_k(int(c), samples, k) for k in ks] for c in successes])


def crossing(first: np.ndarray, second: np.ndarray, ks: Sequence[int]) -> float:
    """Return k*, where the first of two curves comes to lie above the second.

    Args:
      first, second: `[K]` pass@k, for instance of the base and of the trained policy.
      ks: `[K]`, rising.

    Returns:
      The gap's first zero before `first` lies strictly above, on a straight line in log k between
      neighbours; ks[0] where it lies above from the start, ∞ where it never does.

    Source: Yue et al. 2504.13837 (the curves cross); the definition ours.
    """
    gap = np.asarray(second) - np.asarray(first)
    above = np.flatnonzero(gap < 0)
    if not len(above):
        return math.inf
    i = above[0]
    if i == 0:
        return float(ks[0])
    share = gap[i - 1] / (gap[i - 1] - gap[i])
    left, right = math.log(ks[i - 1]), math.log(ks[i])
    return math.exp(left + share * (right - left))


def crossing_interval(
    first: np.ndarray,
    second: np.ndarray,
    ks: Sequence[int],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return k* with a bootstrap interval over prompts, resampled for both policies together.

    Args:
      first, second: `[P, K]` from `pass_curves` on the same prompts.
      ks: `[K]`, rising.
      level, draws, seed: as in `intervals.bootstrap`.

    Returns:
      Interval; an infinite end says that in so many resamples the curves do not cross up to ks[-1].
    """

    def k_star(a: np.ndarray, b: np.ndarray) -> float:
        return crossing(a.mean(axis=0), b.mean(axis=0), ks)

    return bootstrap(k_star, first, second, level=level, draws=draws, seed=seed)


def best_of_n(rewards: Sequence[float], ns: Sequence[int]) -> np.ndarray:
    """Estimate without bias E[max of N rewards] from n ≥ N samples: Σ_i C(i−1, N−1)/C(n, N) r_(i).

    Args:
      rewards: `[n]` of one prompt's samples.
      ns: `[K]` N, each in [1, n].

    Returns:
      `[K]` (reward); N = 1 is the mean and N = n the largest.

    Raises:
      ValueError: an N out of range.

    Source: the mean over all subsets of N, by order statistics r_(1) ≤ … ≤ r_(n).
    """
    rising = np.sort(np.asarray(rewards, float))
    size = len(rising)
    wrong = [n for n in ns if not 1 <= n <= size]
    if wrong:
        raise ValueError(f"best-of-N needs 1 ≤ N ≤ n = {size}, not N = {wrong}.")
    weights = [[math.comb(i, n - 1) / math.comb(size, n) for i in range(size)] for n in ns]
    return np.array(weights) @ rising


class Support(NamedTuple):
    """Correct answers by who of two policies reaches them, summed over prompts.

    kept: reached by both; lost: by the first alone; gained: by the second alone; neither: known to
    be correct and reached by none. All counts.
    """

    kept: int
    lost: int
    gained: int
    neither: int

    @property
    def retention(self) -> float:
        """kept/(kept + lost), NaN where the first reached nothing."""
        return _ratio(self.kept, self.kept + self.lost)

    @property
    def discovery(self) -> float:
        """gained/(kept + gained), NaN where the second reached nothing."""
        return _ratio(self.gained, self.kept + self.gained)

    @property
    def score(self) -> float:
        """The harmonic mean of retention and discovery, 0 where both are."""
        total = self.retention + self.discovery
        return 0.0 if total == 0 else 2 * self.retention * self.discovery / total

    @property
    def change(self) -> float:
        """(gained − lost)/(kept + lost + gained), NaN where neither reached anything."""
        return _ratio(self.gained - self.lost, self.kept + self.lost + self.gained)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def support_change(
    first: Sequence[Sequence[Hashable]],
    second: Sequence[Sequence[Hashable]],
    correct: Sequence[Collection[Hashable]],
    least: int = 1,
) -> Support:
    """Compare which correct answers two policies reach with the samples drawn.

    Args:
      first, second: per prompt the answers sampled from each policy, as many from either.
      correct: per prompt the answers known to be correct; those that either policy was rewarded
        for where no more are known, which leaves `neither` at 0.
      least: samples an answer must have to count as reached, ≥ 1; over the samples drawn it is
        the threshold ε on π(answer).

    Returns:
      Support.

    Source: Wu et al. 2507.14843 (preservation, shrinkage, expansion, out of support; retention
    rate, discovery rate, support dynamic score, net change rate).
    """
    kept = lost = gained = neither = 0
    for here, there, right in zip(first, second, correct, strict=True):
        for answer in set(right):
            before = list(here).count(answer) >= least
            after = list(there).count(answer) >= least
            kept += before and after
            lost += before and not after
            gained += after and not before
            neither += not before and not after
    return Support(kept, lost, gained, neither)
