"""Statistics over sampled completions: diversity, pass@k, best-of-N, support."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.intervals import Interval, bootstrap

SMOOTHING = 0.1
"""Stands for a match count of 0 in BLEU."""


def distinct_counts(
    texts: Sequence[str], successes: Sequence[bool] | np.ndarray, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count distinct completions and distinct successful completions per prompt.

    Args:
      texts, successes: B completions, N of each prompt consecutive, and their B flags.
      group_size: N.

    Returns:
      Two `[P]` int arrays: distinct texts (in [1, N]), distinct successful texts (in [0, N]).
    """
    everything, solved = [], []
    for start in range(0, len(texts), group_size):
        group = range(start, start + group_size)
        everything.append(len({texts[i] for i in group}))
        solved.append(len({texts[i] for i in group if successes[i]}))
    return np.array(everything), np.array(solved)


def distinct_answers(
    texts: Sequence[str], extract: Callable[[str], str | None], group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the distinct answers per prompt, and compute their entropy.

    Answer entropy is −Σ_a p̂(a) log p̂(a) of the shares p̂ among the samples that have an answer;
    from N samples it is too low by about (answers − 1)/(2N).

    Args:
      texts: B completions, N of each prompt consecutive.
      extract: the answer in a text, or None where there is none.
      group_size: N.

    Returns:
      Two `[P]` arrays: distinct answers (in [0, N]) and answer entropy (nats, in [0, log N]; 0
      without answers).

    Source: Wu et al. 2507.14843 (answer entropy beside token entropy).
    """
    counts, entropies = [], []
    for start in range(0, len(texts), group_size):
        answers = Counter(map(extract, texts[start : start + group_size]))
        del answers[None]
        shares = np.array(list(answers.values()), float) / max(1, answers.total())
        counts.append(len(answers))
        entropies.append(-np.sum(shares * np.log(shares)))
    return np.array(counts), np.array(entropies) + 0.0


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of distinct ones among the n-grams of words of all texts together.

    In (0, 1], falling with the amount of text: compare equal numbers of texts of similar length. 0
    where no text has n words.

    Source: Li et al. 1510.03055 (distinct-1, distinct-2).
    """
    grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts: Sequence[str], longest: int = 4) -> float:
    """Return the mean BLEU of each text against all others: 1 where all are equal.

    BLEU is min(1, e^{1 − r/c}) exp(mean_n log p_n) over n = 1 … `longest`: p_n the share of the
    text's n-grams of words that occur in another text, each counted at most as often as in the one
    that has it most; c the text's length and r the nearest length among the others (the shorter of
    two). No match counts as 0.1, and orders longer than the text are left out. Texts without words
    score 0.

    Args:
      texts: two or more, of one prompt.
      longest: largest n, ≥ 1.

    Raises:
      ValueError: fewer than two texts.

    Source: Zhu et al. 1802.01886; smoothing 1 of Chen & Cherry 2014.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU needs two texts or more, not {len(texts)}.")
    words = [text.split() for text in texts]
    logs = np.zeros((len(texts), longest))
    for n in range(1, longest + 1):
        counts = [Counter(_ngrams(text, n)) for text in words]
        best: Counter[tuple[str, ...]] = Counter()
        second: Counter[tuple[str, ...]] = Counter()
        for count in counts:
            for gram, times in count.items():
                second[gram] = max(second[gram], min(times, best[gram]))
                best[gram] = max(best[gram], times)
        for i, count in enumerate(counts):
            # the text with most of an n-gram is matched by the one with second most
            matches = sum(
                min(times, second[gram] if times == best[gram] else best[gram])
                for gram, times in count.items()
            )
            if count:
                logs[i, n - 1] = np.log((matches if matches else SMOOTHING) / count.total())
    return float(np.mean([_bleu(words, i, row[: len(words[i])]) for i, row in enumerate(logs)]))


def _bleu(words: Sequence[Sequence[str]], i: int, logs: np.ndarray) -> float:
    length = len(words[i])
    if not length:
        return 0.0
    others = [len(text) for j, text in enumerate(words) if j != i]
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return float(np.exp(min(0.0, 1 - nearest / length) + logs.mean()))


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """Estimate without bias the chance that one of k draws succeeds: 1 − C(n−c, k)/C(n, k).

    Args:
      successes, samples, k: c in [0, n], n and k in [1, n].

    Raises:
      ValueError: k larger than n or smaller than 1.

    Source: Chen et al. 2107.03374, eq. 1, in the product form that does not overflow.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n, not k = {k}, n = {samples}.")
    if samples - successes < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - successes + 1, samples + 1)))


def pass_curves(successes: Sequence[int], samples: int, ks: Sequence[int]) -> np.ndarray:
    """Return `pass_at_k` `[P, K]` of prompts with `[P]` successes; its mean over P is the curve.

    Raises:
      ValueError: a k out of range.
    """
    return np.array([[pass_at_k(int(c), samples, k) for k in ks] for c in successes])


def crossing(first: np.ndarray, second: np.ndarray, ks: Sequence[int]) -> float:
    """Return k*, from which on the first of two curves is above the second.

    The gap's first zero before `first` is strictly above, interpolated linearly in log k; ks[0]
    where it is above from the start, ∞ where it never is.

    Args:
      first, second: `[K]` pass@k, for instance of the base and of the trained policy.
      ks: `[K]`, rising.

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

    An end is infinite where in so many resamples the curves do not cross up to ks[-1].

    Args:
      first, second: `[P, K]` from `pass_curves` on the same prompts.
      ks: `[K]`, rising.
      level, draws, seed: as in `intervals.bootstrap`.
    """

    def k_star(a: np.ndarray, b: np.ndarray) -> float:
        return crossing(a.mean(axis=0), b.mean(axis=0), ks)

    return bootstrap(k_star, first, second, level=level, draws=draws, seed=seed)


def best_of_n(rewards: Sequence[float] | np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """Return unbiased estimates of E[max of N rewards]: Σ_i C(i−1, N−1)/C(n, N) r_(i).

    Args:
      rewards: `[n]` of one prompt's samples.
      ns: `[K]` N, each in [1, n]; N = 1 gives the mean and N = n the largest.

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
    """Numbers of correct answers reached by two policies, summed over prompts.

    kept: by both; lost: by the first alone; gained: by the second alone; neither: known to be
    correct and reached by none.
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


def _ratio(part: int, total: int) -> float:
    return part / total if total else math.nan


def support_change(
    first: Sequence[Sequence[Hashable]],
    second: Sequence[Sequence[Hashable]],
    correct: Sequence[Collection[Hashable]],
    least: int = 1,
) -> Support:
    """Compare the correct answers that two policies reach with the samples drawn.

    Args:
      first, second: per prompt the answers sampled from each policy, as many from either.
      correct: per prompt the answers known to be correct; those that either policy was rewarded
        for where no more are known, which leaves `neither` at 0.
      least: samples an answer must have to count as reached, ≥ 1; over the samples drawn it is
        the threshold ε on π(answer).

    Source: Wu et al. 2507.14843 (preservation, shrinkage, expansion, out of support; retention
    rate, discovery rate, support dynamic score, net change rate).
    """
    counts: Counter[tuple[bool, ...]] = Counter()
    for here, there, right in zip(first, second, correct, strict=True):
        for answer in set(right):
            reached = [list(answers).count(answer) >= least for answers in (here, there)]
            counts[tuple(reached)] += 1
    return Support(
        kept=counts[True, True],
        lost=counts[True, False],
        gained=counts[False, True],
        neither=counts[False, False],
    )
