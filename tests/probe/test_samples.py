"""Texts and samples: diversity by hand, support and pass@k by enumeration."""

import itertools
import math

import numpy as np
import pytest

from ntkrl import probe
from ntkrl.probe.samples import (
    Support,
    best_of_n,
    crossing,
    crossing_interval,
    distinct_answers,
    distinct_n,
    pass_curves,
    self_bleu,
    support_change,
)


def test_distinct_counts_by_hand():
    """by hand: a, a, b of which a solves; c, d, d of which both d do."""
    everything, solved = probe.distinct_counts(
        ["a", "a", "b", "c", "d", "d"], [True, True, False, False, True, True], 3
    )
    assert everything.tolist() == [2, 2] and solved.tolist() == [1, 1]


@pytest.mark.parametrize("n,c,k", [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 4, 2), (60, 3, 30)])
def test_pass_at_k(n, c, k):
    """oracle: binomial coefficients."""
    expected = 1 - math.comb(n - c, k) / math.comb(n, k)
    np.testing.assert_allclose(probe.pass_at_k(c, n, k), expected, rtol=1e-12)


def test_pass_at_k_refuses_impossible_k():
    """law: k beyond n has no unbiased estimate."""
    with pytest.raises(ValueError, match="1 ≤ k ≤ n, not k = 6, n = 5"):
        probe.pass_at_k(2, 5, 6)


def test_distinct_answers_by_hand():
    """by hand: answers 1, 1, 2 and none; none at all; four different ones."""

    def extract(text):
        return text.split("=")[1] if "=" in text else None

    texts = ["x=1", "y=1", "2=2", "?", "a", "b", "c", "d", "=1", "=2", "=3", "=4"]
    counts, entropies = distinct_answers(texts, extract, 4)
    assert counts.tolist() == [2, 0, 4]
    spread = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(entropies, [spread, 0.0, np.log(4)], rtol=1e-12)


def test_distinct_n_by_hand():
    """by hand: a b a | a b: words a, b of five; pairs ab, ba, ab of three; no triple but one."""
    texts = ["a b a", "a b"]
    assert distinct_n(texts, 1) == 2 / 5
    assert distinct_n(texts, 2) == 2 / 3
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(texts, 4) == 0.0


def test_self_bleu_by_hand():
    """by hand: "a a b" against "a c": one a matches of three words (not two), no pair of two.

    p₁ = 1/3 and p₂ = 0.1/2, no brevity penalty. The other way: p₁ = 1/2, p₂ = 0.1, and a penalty
    e^{1 − 3/2} since the reference is longer.
    """
    first = math.sqrt(1 / 3 * 0.1 / 2)
    second = math.exp(1 - 3 / 2) * math.sqrt(1 / 2 * 0.1)
    assert self_bleu(["a a b", "a c"], 2) == pytest.approx((first + second) / 2, rel=1e-12)


def test_self_bleu_by_loops():
    """oracle: modified precision over every reference; lengths tie at the third text."""
    texts = ["a b a b c d", "a b z", "b c a b c", "d d a b", "a z"]
    words = [text.split() for text in texts]

    def count(text, gram):
        return sum(text[i : i + len(gram)] == gram for i in range(len(text)))

    scores = []
    for i, text in enumerate(words):
        others, logs = words[:i] + words[i + 1 :], []
        for n in range(1, min(4, len(text)) + 1):
            grams = [text[j : j + n] for j in range(len(text) - n + 1)]
            different = [g for j, g in enumerate(grams) if g not in grams[:j]]
            hits = sum(min(count(text, g), max(count(o, g) for o in others)) for g in different)
            logs.append(math.log((hits or 0.1) / len(grams)))
        gaps = sorted((abs(len(o) - len(text)), len(o)) for o in others)
        scores.append(math.exp(min(0, 1 - gaps[0][1] / len(text)) + np.mean(logs)))
    assert self_bleu(texts) == pytest.approx(np.mean(scores), rel=1e-12)


def test_self_bleu_of_equal_texts():
    """law: equal texts score 1 whatever their length; texts without words 0; one text is none."""
    assert self_bleu(["a b"] * 3) == self_bleu(["a b c d e f"] * 2) == 1.0
    assert self_bleu(["", ""]) == 0.0
    with pytest.raises(ValueError, match="two texts or more, not 1"):
        self_bleu(["a"])


def test_best_of_n_by_subsets():
    """oracle: the mean of the maximum over all subsets of N of six rewards."""
    rewards = [0.3, -1.0, 2.0, 0.3, 5.0, 1.1]
    expected = [np.mean([max(s) for s in itertools.combinations(rewards, n)]) for n in range(1, 7)]
    np.testing.assert_allclose(best_of_n(rewards, range(1, 7)), expected, rtol=1e-12)
    assert best_of_n(np.arange(2000.0), [1999])[0] == pytest.approx(1999 - 1 / 2000, rel=1e-12)
    with pytest.raises(ValueError, match=r"n = 6, not N = \[0, 7\]"):
        best_of_n(rewards, [0, 3, 7])


def test_pass_curves_by_enumeration():
    """oracle: successes of 0, 1 and 3 among five samples, over all subsets of k."""
    result = pass_curves([0, 1, 3], 5, [1, 2, 5])
    for p, c in enumerate((0, 1, 3)):
        flags = [True] * c + [False] * (5 - c)
        for j, k in enumerate((1, 2, 5)):
            subsets = [any(s) for s in itertools.combinations(flags, k)]
            assert result[p, j] == pytest.approx(np.mean(subsets), rel=1e-12)


def test_crossing_by_hand():
    """by hand: gaps +0.2 at 4 and −0.1 at 16 meet at 4·4^{2/3}; ties are no crossing."""
    ks = [1, 4, 16]
    result = crossing(np.array([0.1, 0.4, 0.9]), np.array([0.5, 0.6, 0.8]), ks)
    assert result == pytest.approx(4 * 4 ** (2 / 3))
    assert crossing(np.array([0.1, 0.6, 0.9]), np.array([0.5, 0.6, 0.8]), ks) == pytest.approx(4)
    assert crossing(np.array([0.1, 0.6, 1.0]), np.array([0.5, 0.7, 1.0]), ks) == math.inf
    assert crossing(np.array([0.3, 0.6, 1.0]), np.array([0.2, 0.7, 1.0]), ks) == 1.0


def test_crossing_interval():
    """law: prompts alike give a point; where some resamples do not cross, the end is infinite."""
    ks = [1, 4, 16]
    crossing_prompt = np.array([[0.1, 0.4, 0.9]]), np.array([[0.5, 0.6, 0.8]])
    alike = [np.repeat(curve, 6, axis=0) for curve in crossing_prompt]
    result = crossing_interval(*alike, ks, draws=50)
    np.testing.assert_allclose(result, 4 * 4 ** (2 / 3), rtol=1e-12)
    never = np.array([[0.1, 0.2, 0.3]]), np.array([[0.5, 0.7, 0.5]])
    mixed = [np.concatenate([a] * 4 + [b]) for a, b in zip(crossing_prompt, never, strict=True)]
    result = crossing_interval(*mixed, ks, draws=400)
    assert result.low < result.value < result.high == math.inf


def test_support_by_hand():
    """by hand: of answers a … d at the first prompt b is kept, a lost, c gained, d in neither."""
    first = [["a", "a", "b", "x"], ["e", "y", "y", "y"]]
    second = [["b", "c", "c", "x"], ["e", "e", "e", "e"]]
    correct = [{"a", "b", "c", "d"}, ["e", "e"]]
    result = support_change(first, second, correct)
    assert result == Support(kept=2, lost=1, gained=1, neither=1)
    assert result.retention == result.discovery + 1 / 3 == 2 / 3
    assert result.score == pytest.approx(2 * (2 / 9) / 1) and result.change == 0.0
    # with two samples needed: b falls from both, e is gained
    assert support_change(first, second, correct, least=2) == Support(0, 1, 2, 2)
    rates = Support(kept=3, lost=1, gained=2, neither=0)
    assert (rates.retention, rates.discovery, rates.change) == (3 / 4, 2 / 5, 1 / 6)
    nothing = Support(0, 0, 0, 3)
    assert math.isnan(nothing.retention) and math.isnan(nothing.change)
