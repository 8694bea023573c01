"""Curves over the number of samples: pass@k and best-of-N, before and after training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from ntkrl.intervals import mean_interval
from ntkrl.report.plotting import REFERENCE_GREY, finish, looks, panels
from ntkrl.report.runs import Run, by_name, series

ROWS = (("pass@", "pass@k (fraction)", "k"), ("best_of_", "best of N (reward)", "N"))
DRAWS = 2000


def sampling(runs: Sequence[Run]) -> Figure | None:
    """Draw pass@k over k and best-of-N over N at step 0 and at the last evaluation."""
    rows = [row for row in ROWS if any(_numbers(run, row[0]) for run in runs)]
    if not rows:
        return None
    figure, axes = panels(len(rows), "What many samples of one prompt reach")
    ticks: set[int] = set()
    for axis, (kind, words, letter) in zip(axes, rows, strict=True):
        ticks |= {number for run in runs for number in _numbers(run, kind)}
        for name, group in by_name(runs).items():
            color = looks(runs)[name].color
            _draw(axis, group, kind, 0, {"linestyle": "--", "linewidth": 1.4, "color": color})
            bold = {"linewidth": 2.2, "color": color, "marker": looks(runs)[name].marker}
            _draw(axis, group, kind, -1, bold | {"markersize": 4.5})
        axis.set_ylabel(words, fontsize=12)
        axis.set_xlabel(f"samples per prompt, {letter}", fontsize=12)
        axis.tick_params(labelbottom=True)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    dashed = Line2D([], [], color=REFERENCE_GREY, linestyle="--", linewidth=1.4)
    return finish(figure, runs, [(dashed, "dashed: starting model")], "95 % bootstrap")


def _numbers(run: Run, kind: str) -> list[int]:
    """Return the k, or N, that the metrics of a run name."""
    start = f"diversity/{kind}"
    words = {name.removeprefix(start) for line in run.metrics for name in line}
    return sorted(int(word) for word in words if word.isdecimal())


def _draw(axis: Axes, runs: Sequence[Run], kind: str, place: int, look: dict) -> None:
    """Draw the curve of a method at its first (place 0) or last evaluation (place −1)."""
    numbers = sorted(set().union(*(_numbers(run, kind) for run in runs)))
    found = []
    for number in numbers:
        curves = [series(run, f"diversity/{kind}{number}") for run in runs]
        values = [
            values[place]
            for steps, values in curves
            if steps.size and (steps[place] > 0) == (place < 0) and np.isfinite(values[place])
        ]
        if values:
            found.append((number, mean_interval(values, draws=DRAWS), len(values)))
    if not found:
        return
    x = [number for number, _, _ in found]
    axis.plot(x, [interval.value for _, interval, _ in found], **look)
    if place < 0 and max(count for _, _, count in found) > 1:
        low = [interval.low for _, interval, _ in found]
        high = [interval.high for _, interval, _ in found]
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
