"""How many different things a policy says, and how often one of k attempts succeeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

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


def distinct_answers(
    texts: Sequence[str], extract: Callable[[str], str | None], group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the different answers per prompt, and say how spread they are.

    Answer entropy is −Σ_a p̂(a) log p̂(a) of the shares p̂ among the samples that gave an answer;
    from N samples it comes out too low by about (answers − 1)/(2N).

    Args:
      texts: B completions, groups of `group_size` consecutive.
      extract: the answer in a text, or None where there is none.
      group_size: N, samples per prompt.

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
    """Return the share of different ones among the n-grams of words of all texts together.

    In (0, 1], falling with the amount of text: compare equal numbers of texts of like length. 0
    where no text has n words.

    Source: Li et al. 1510.03055 (distinct-1, distinct-2).
    """
    found = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(found)) / max(1, len(found))


SMOOTHING = 0.1
"""What stands for a count of no match in BLEU."""


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
        best, second = Counter(), Counter()
        for count in counts:
            for gram, times in count.items():
                second[gram] = max(second[gram], min(times, best[gram]))
                best[gram] = max(best[gram], times)
        for i, count in enumerate(counts):
            # who has an n-gram most often is met by the second
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
