"""Curves over the number of samples, and over steps those of a ledger's parts and of families."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from ntkrl.intervals import mean_interval
from ntkrl.report.plotting import (
    PALETTE,
    REFERENCE_GREY,
    coinciding,
    draw_stages,
    finish,
    has,
    label_steps,
    looks,
    panels,
    shown,
)
from ntkrl.report.runs import Run, by_name, series
from ntkrl.report.waterfall import COLORS

ROWS = (("pass@", "pass@k (fraction)", "k"), ("best_of_", "best of N (reward)", "N"))
DRAWS = 2000
KINDS = ("own", "other", "reference", "rejected", "paraphrased", "shuffled")
"""Families of probe completions, in the order of their colours."""
SHARES = {
    "head": ("R (head)", COLORS["R"], "-"),
    "body": ("G (body)", COLORS["G"], "-"),
    "momentum": ("momentum", COLORS["momentum"], "-"),
    "decay": ("decay", COLORS["decay"], "-"),
    "kl": ("KL, in R and G", "#56B4E9", "--"),
    "curvature": ("curvature", COLORS["curvature"], "-"),
}
"""Parts of the `ledger/<part>_share` metrics: words, colour and line."""


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


def ledger_shares(runs: Sequence[Run]) -> Figure | None:
    """Draw the parts' shares of the measured change over steps, one panel per method."""
    lines = {f"ledger/{part}_share": look for part, look in SHARES.items()}
    figure = _by_method(runs, "Shares of the measured change", "share", lines)
    for axis in () if figure is None else figure.axes:
        for level in (0.0, 1.0):
            axis.axhline(level, color=REFERENCE_GREY, linewidth=0.8)
    return figure


def families(runs: Sequence[Run]) -> Figure | None:
    """Draw the log-prob of each family of probe completions, one panel per method."""
    lines = {
        f"probe/{kind}/log_prob": (kind, color, "-")
        for kind, color in zip(KINDS, PALETTE, strict=True)
    }
    return _by_method(
        runs, "Log-probability by kind of probe completion", "mean log π (nats)", lines
    )


def _by_method(
    runs: Sequence[Run], title: str, words: str, lines: dict[str, tuple[str, str, str]]
) -> Figure | None:
    """Draw metrics, each with its words, colour and line, over steps: a panel per method."""
    lines = {metric: look for metric, look in lines.items() if has(runs, metric)}
    if not lines:
        return None
    groups = by_name(runs)
    figure, axes = panels(len(groups), title)
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        for metric, (_, color, style) in lines.items():
            curves = [curve for curve in (series(run, metric) for run in group) if curve[0].size]
            if curves:
                steps, values = coinciding(curves)
                look = {"color": color, "linestyle": style, "marker": "o", "markersize": 3.5}
                axis.plot(steps, values.mean(axis=0), linewidth=1.8, **look)
                low, high = values.min(axis=0), values.max(axis=0)
                axis.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        mean = f", mean of {len(group)} runs, lowest to highest" if len(group) > 1 else ""
        axis.set_title(f"{shown(name)}{mean}", fontsize=11, loc="left", pad=16)
        axis.set_ylabel(words, fontsize=12)
        draw_stages([axis], group)
    label_steps(axes[-1])
    handles = [
        Line2D([], [], color=color, linestyle=style, linewidth=1.8)
        for _, color, style in lines.values()
    ]
    named = [name for name, _, _ in lines.values()]
    figure.legend(handles, named, loc="outside lower left", ncols=3, fontsize=11, frameon=False)
    return figure


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
