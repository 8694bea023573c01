"""Verdicts: the judgement of a number over seeds by the criteria of `claims`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ntkrl.intervals import Interval
from ntkrl.study import mean_interval, paired

LEVEL = 0.05
HOLDS, PARTLY, FAILS, UNKNOWN = "holds", "partly", "does not hold", "not run"
NO_NUMBER = "–"


class Verdict(NamedTuple):
    """A claim with its verdict.

    question: 1 to 6, of the study.
    task: which runs it was tested on.
    claim: in words.
    number: the measured value in words, with its interval.
    verdict: `holds`, `partly`, `does not hold` or `not run`; "" for a number without a claim.
    """

    question: int
    task: str
    claim: str
    number: str
    verdict: str


def above(question: int, task: str, claim: str, values: np.ndarray, limit: float) -> Verdict:
    """Judge whether the mean is above a limit."""
    interval = mean_interval(values)
    if interval is None:
        return number_only(question, task, claim, None)
    test = paired(np.full_like(values, limit), values)
    p_value = 1.0 if test is None else test.p_value
    judged = _judged(interval.value - limit, interval.low - limit, p_value)
    return Verdict(question, task, claim, f"{interval_text(interval)}, p = {p_value:.2g}", judged)


def within(
    question: int, task: str, claim: str, values: np.ndarray, low: float, high: float
) -> Verdict:
    """Judge whether the mean is between two limits."""
    interval = mean_interval(values)
    if interval is None:
        return number_only(question, task, claim, None)
    inside = min(interval.value - low, high - interval.value)
    judged = _judged(inside, min(interval.low - low, high - interval.high))
    return Verdict(question, task, claim, interval_text(interval), judged)


def difference(
    question: int, task: str, claim: str, a: np.ndarray, b: np.ndarray, sign: int = 1
) -> Verdict:
    """Judge whether b − a has a sign."""
    test = paired(a, b)
    if test is None:
        return number_only(question, task, claim, None)
    low = test.low if sign > 0 else -test.high
    judged = _judged(sign * test.difference, low, test.p_value) if sign else ""
    ends = f"[{test.low:.3g}, {test.high:.3g}], p = {test.p_value:.2g}"
    return Verdict(question, task, claim, f"difference {test.difference:+.3g} {ends}", judged)


def _judged(mean: float, end: float, p_value: float = 0.0) -> str:
    if end > 0 and p_value <= LEVEL:
        return HOLDS
    return PARTLY if mean > 0 else FAILS


def number_only(question: int, task: str, claim: str, number: str | None) -> Verdict:
    """Return a number without a claim; None: it was not measured."""
    if number is None:
        return Verdict(question, task, claim, NO_NUMBER, UNKNOWN)
    return Verdict(question, task, claim, number, "")


def interval_text(interval: Interval) -> str:
    """Return a mean with the ends of its interval."""
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def mean_text(values: np.ndarray) -> str:
    """Return the mean over seeds."""
    interval = mean_interval(values)
    return NO_NUMBER if interval is None else f"{interval.value:.3g}"
