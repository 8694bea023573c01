"""Comparison of a policy's samples with those that an earlier evaluation saved.

Samples are compared prompt by prompt, so that no second model is needed.
"""

from collections.abc import Sequence

import numpy as np

from ntkrl import intervals, probe, reward
from ntkrl.setup import Samples

DRAWS = 2000
"""Resamples of prompts for an interval: its ends then vary by a twentieth of its length."""


def compare(base: Samples, samples: Samples, threshold: float) -> dict[str, float]:
    """Compare the samples of a policy with those of a base.

    A pair is a sample of either for the same prompt, all with all, and the larger reward wins; an
    equal one is half a win. An answer (`reward.final_answer`) is correct where either policy was
    rewarded for it.

    Args:
      base, samples: N samples each of the same prompts.
      threshold: a sample with at least this reward is a success.

    Returns:
      Metrics, those of intervals over prompts with `_low` and `_high`; `diversity/crossing_k` is
      infinite where the base's pass@k exceeds the policy's at no k up to N, and a share is NaN
      where its denominator is 0.
    """
    pairs = samples.rewards[:, :, None], base.rewards[:, None, :]
    wins_P = np.mean(np.greater(*pairs) + 0.5 * np.equal(*pairs), axis=(1, 2))
    gaps_P = samples.rewards.mean(axis=1) - base.rewards.mean(axis=1)
    metrics = mean_interval("eval/win_rate", wins_P)
    metrics |= mean_interval("eval/reward_difference", gaps_P)
    policies, count = (base, samples), samples.rewards.shape[1]
    ks = powers(count)
    base_best_PK, best_PK = (
        np.array([probe.best_of_n(row, ks) for row in policy.rewards]) for policy in policies
    )
    for k, gap_P in zip(ks, (best_PK - base_best_PK).T, strict=True):
        metrics |= mean_interval(f"diversity/gap_best_of_{k}", gap_P)
    solved = [policy.rewards >= threshold for policy in policies]
    base_curve, curve = (probe.pass_curves(s.sum(axis=1), count, ks) for s in solved)
    crossing = probe.crossing_interval(base_curve, curve, ks, draws=DRAWS)
    metrics |= _named("diversity/crossing_k", crossing)
    base_answers, answers = (
        [list(map(reward.final_answer, group)) for group in policy.texts] for policy in policies
    )
    correct: list[set[str]] = [set() for _ in samples.texts]
    for by_prompt, flags in zip((base_answers, answers), solved, strict=True):
        for i, (group, solved_N) in enumerate(zip(by_prompt, flags, strict=True)):
            correct[i] |= {answer for answer, s in zip(group, solved_N, strict=True) if s}
    support = probe.support_change(base_answers, answers, correct)
    words = (*support._fields, "retention", "discovery", "score", "change")
    return metrics | {f"diversity/support_{word}": float(getattr(support, word)) for word in words}


def mean_interval(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return a mean over prompts under a metric's name, with `_low` and `_high`."""
    return _named(name, intervals.mean_interval(np.asarray(values), draws=DRAWS))


def _named(name: str, interval: intervals.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def powers(samples: int) -> list[int]:
    """Return the powers of two up to a number of samples, and the number."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})
