"""An evaluation against the samples of another policy, which an earlier evaluation saved.

Samples are compared prompt by prompt, so that no second model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ntkrl import intervals, probe, reward
from ntkrl.setup.base_samples import Samples

DRAWS = 2000
"""Resamples of prompts for an interval: its ends then vary by a twentieth of its length."""


def compare(base: Samples, own: Samples, threshold: float) -> dict[str, float]:
    """Compare the samples of a policy with those of a base.

    A pair is a sample of either for the same prompt, all with all, and the larger reward wins; an
    equal one is half a win. An answer (`reward.final_answer`) is correct where either policy was
    rewarded for it.

    Args:
      base, own: of the same prompts, N samples each.
      threshold: a sample with at least this reward is a success.

    Returns:
      Metrics, those of intervals over prompts with `_low` and `_high`; `diversity/crossing_k` is
      infinite where the base's pass@k lies nowhere above the policy's up to N, and a share NaN
      where there is nothing to share.
    """
    pairs = own.rewards[:, :, None], base.rewards[:, None, :]
    wins_P = np.mean(np.greater(*pairs) + 0.5 * np.equal(*pairs), axis=(1, 2))
    gaps_P = own.rewards.mean(axis=1) - base.rewards.mean(axis=1)
    found = mean_interval("eval/win_rate", wins_P)
    found |= mean_interval("eval/reward_difference", gaps_P)
    both = base, own
    samples = own.rewards.shape[1]
    ks = powers(samples)
    best = [np.array([probe.best_of_n(row, ks) for row in one.rewards]) for one in both]
    for k, gap_P in zip(ks, (best[1] - best[0]).T, strict=True):
        found |= mean_interval(f"diversity/gap_best_of_{k}", gap_P)
    solved = [one.rewards >= threshold for one in both]
    curves = [probe.pass_curves(s.sum(axis=1), samples, ks) for s in solved]
    crossing = probe.crossing_interval(*curves, ks, draws=DRAWS)
    found |= _named("diversity/crossing_k", crossing)
    answers = [[list(map(reward.final_answer, group)) for group in one.texts] for one in both]
    correct: list[set[str]] = [set() for _ in own.texts]
    for said, right in zip(answers, solved, strict=True):
        for i, (group, flags) in enumerate(zip(said, right, strict=True)):
            correct[i] |= {answer for answer, flag in zip(group, flags, strict=True) if flag}
    support = probe.support_change(*answers, correct)
    words = (*support._fields, "retention", "discovery", "score", "change")
    return found | {f"diversity/support_{word}": float(getattr(support, word)) for word in words}


def mean_interval(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return a mean over prompts under a metric's name, with `_low` and `_high`."""
    return _named(name, intervals.mean_interval(np.asarray(values), draws=DRAWS))


def _named(name: str, interval: intervals.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def powers(samples: int) -> list[int]:
    """Return the powers of two up to a number of samples, and the number."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})
