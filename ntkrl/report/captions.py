"""Sentences of captions that state what runs measured.

A caption defines what a figure shows. Whatever it states about its runs is computed here, so
that it holds for them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.report.plotting import coinciding, recorded
from ntkrl.report.runs import Run, by_name
from ntkrl.report.tables import number, signed

MOST_CHANGES = 12
"""Changes listed below a figure; of more there is no list."""
SIGNS = (
    "Signs, everywhere on this page: a change is the later value minus the earlier one, a "
    "difference of two methods the first named minus the second. A positive part or influence "
    "raises the log-probability or entropy, a negative one lowers it; in maps red raises and blue "
    "lowers. A share is positive where a part goes in the direction of the measured change."
)


class Change(NamedTuple):
    """First and last value of a metric, means over the runs of a method."""

    first: float
    last: float

    @property
    def words(self) -> str:
        """Both values and the signed difference."""
        return f"{number(self.first)} → {number(self.last)} ({signed(self.last - self.first)})"


def change(runs: Sequence[Run], metric: str) -> Change | None:
    """Return the change of a metric between the first and last step that all its runs have."""
    curves = recorded(runs, metric)
    if not curves:
        return None
    steps, values = coinciding(curves)
    finite = np.isfinite(values).all(axis=0)
    means = values[:, finite].mean(axis=0)
    return Change(float(means[0]), float(means[-1])) if finite.sum() > 1 else None


def changes(runs: Sequence[Run], metrics: Sequence[tuple[str, str]]) -> str:
    """Return the changes of (metric, words) by method as a sentence, "" where there are none.

    Args:
      runs: any runs.
      metrics: names of metrics, and what to call them.
    """
    parts = []
    for name, group in by_name(runs).items():
        measured = [(words, change(group, metric)) for metric, words in metrics]
        lines = [f"{words} {value.words}" for words, value in measured if value is not None]
        if lines:
            parts.append(f"{name}: {', '.join(lines)}")
    if not parts or len(parts) * len(metrics) > MOST_CHANGES:
        return ""
    return f"First → last: {'; '.join(parts)}."
