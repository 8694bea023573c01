"""Plots of metrics over steps, of predicted against actual changes, and of sampling curves.

A plot takes a title and runs, and returns a Figure, or None where no run has data for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from ntkrl.intervals import mean_interval
from ntkrl.report.figure_text import plain
from ntkrl.report.plotting import (
    REFERENCE_GREY,
    STAGE_POINTS,
    add_legend,
    column,
    draw_curves,
    draw_mean,
    draw_stages,
    draw_thin,
    dress,
    has,
    head,
    label_steps,
    label_values,
    looks,
    panels,
    recorded,
)
from ntkrl.report.runs import Run, by_name, groups_with, mean_words
from ntkrl.report.tables import number

Plot = Callable[[str, Sequence[Run]], Figure | None]
"""Draws runs under a title."""
Line = tuple[str, str, str]
"""Words, colour and style of a line."""

MAX_POINTS = 3000
"""Points drawn per scatter panel; its numbers are computed from all of them."""
DRAWS = 2000
SAMPLING_ROWS = (("pass@", "pass@k (fraction)", "k"), ("best_of_", "best of N (reward)", "N"))


def metric_panels(*rows: tuple[str, str], levels: Sequence[float] = ()) -> Plot:
    """Return the plot of (metric, words) rows: a panel per metric that some run has.

    Metrics measured now and then get markers; `levels` are drawn as grey lines.
    """

    def plot(title: str, runs: Sequence[Run]) -> Figure | None:
        recorded_rows = [(metric, words) for metric, words in rows if has(runs, metric)]
        if not recorded_rows:
            return None
        figure, axes = panels(len(recorded_rows), title)
        for axis, (metric, words) in zip(axes, recorded_rows, strict=True):
            draw_curves(axis, runs, metric, marked="/" in metric)
            label_values(axis, metric, words)
        draw_stages(axes, runs)
        label_steps(axes[-1])
        add_legend(figure, runs)
        _draw_levels(axes, levels)
        return figure

    return plot


def method_panels(words: str, lines: dict[str, Line], levels: Sequence[float] = ()) -> Plot:
    """Return the plot of several metrics (name → line) in one panel per method."""

    def plot(title: str, runs: Sequence[Run]) -> Figure | None:
        styles = {metric: line for metric, line in lines.items() if has(runs, metric)}
        if not styles:
            return None
        groups = by_name(runs)
        figure, axes = panels(len(groups), title)
        for axis, (name, group) in zip(axes, groups.items(), strict=True):
            for metric, (_, color, style) in styles.items():
                curves = recorded(group, metric)
                marks = {"marker": "o", "markersize": 3.5, "linewidth": 1.8}
                if curves:
                    draw_mean(axis, curves, color=color, linestyle=style, **marks)
            band = ", lowest to highest" if len(group) > 1 else ""
            names = draw_stages([axis], group)
            head(axis, f"{plain(name)}{mean_words(group)}{band}", pad=6 + STAGE_POINTS * names)
            axis.set_ylabel(words, fontsize=12)
        label_steps(axes[-1])
        handles = [
            Line2D([], [], color=color, linestyle=style, linewidth=1.8, label=label)
            for label, color, style in styles.values()
        ]
        place = {"loc": "outside lower left", "ncols": 3}
        figure.legend(handles=handles, fontsize=11, frameon=False, **place)
        _draw_levels(axes, levels)
        return figure

    return plot


def _draw_levels(axes: Sequence[Axes], levels: Sequence[float]) -> None:
    for axis in axes:
        for level in levels:
            axis.axhline(level, color=REFERENCE_GREY, linewidth=0.8)


def reward(title: str, runs: Sequence[Run]) -> Figure | None:
    """Draw training reward (thin) and held-out reward (bold) over steps."""
    if not has(runs, "reward") and not has(runs, "eval/reward"):
        return None
    figure, (axis,) = panels(1, title)
    draw_thin(axis, runs, "reward")
    draw_curves(axis, runs, "eval/reward")
    label_values(axis, "reward", "mean reward")
    draw_stages([axis], runs)
    label_steps(axis)
    thin = Line2D([], [], color=REFERENCE_GREY, linewidth=0.8)
    return add_legend(figure, runs, [(thin, "thin: training batches")])


def prediction(title: str, runs: Sequence[Run]) -> Figure | None:
    """Scatter predicted against actual change of probe tokens, one panel per method."""
    groups = groups_with(runs, lambda run: run.probes)
    if not groups:
        return None
    figure, axes = column(title, 4.4 * len(groups) + 0.4, len(groups))
    for axis, (name, probes) in zip(axes, groups.items(), strict=True):
        predicted, actual = pooled_changes(probes)
        correlation, error = agreement(predicted, actual)
        words = f"{plain(name)}: correlation {number(correlation)}, rel. error {number(error)}"
        _scatter(axis, looks(runs)[name].color, predicted, actual)
        head(axis, words)
    return figure


def pooled_changes(
    probes: Sequence[dict[int, dict[str, np.ndarray]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Join the probe tokens of all probed steps of several runs.

    Args:
      probes: `Run.probes` of each run; at least one step in all.

    Returns:
      predicted: `[n]` nats, head + body (+ cross).
      actual: `[n]` nats.
    """
    predicted, actual = [], []
    for steps in probes:
        for step in sorted(steps):
            arrays = steps[step]
            total = arrays["predicted_head"] + arrays["predicted_body"]
            if "predicted_cross" in arrays:
                total = total + arrays["predicted_cross"]
            predicted.append(total)
            actual.append(arrays["actual"])
    return np.concatenate(predicted).astype(float), np.concatenate(actual).astype(float)


def agreement(predicted: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Return correlation and ‖actual − predicted‖ / ‖actual‖, NaN where undefined."""
    varies = predicted.size > 1 and predicted.std() > 0 and actual.std() > 0
    correlation = float(np.corrcoef(predicted, actual)[0, 1]) if varies else float("nan")
    norm = np.linalg.norm(actual)
    error = float(np.linalg.norm(actual - predicted) / norm) if norm > 0 else float("nan")
    return correlation, error


def _scatter(axis: Axes, color: str, predicted: np.ndarray, actual: np.ndarray) -> None:
    """Draw points with equal scales and the diagonal."""
    dress(axis)
    every = -(-predicted.size // MAX_POINTS)
    axis.scatter(predicted[::every], actual[::every], s=9, alpha=0.35, color=color, linewidths=0)
    larger = np.maximum(np.abs(predicted), np.abs(actual))
    # A few tokens move many times more than the others, which the full range would hide.
    limit = min(larger.max(initial=0), 2 * np.quantile(larger, 0.99)) if larger.size else 0.0
    limit = 1.05 * float(limit) if limit > 0 else 1.0
    outside = int((larger > limit).sum())
    if outside:
        words = f"{outside} of {larger.size} tokens outside"
        axis.text(0.97, 0.03, words, fontsize=10, ha="right", transform=axis.transAxes)
    axis.plot([-limit, limit], [-limit, limit], color=REFERENCE_GREY, linewidth=1)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axis.locator_params(nbins=5)
    axis.set_xlabel("predicted Δ log π (nats)", fontsize=12)
    axis.set_ylabel("actual Δ log π (nats)", fontsize=12)


def sampling(title: str, runs: Sequence[Run]) -> Figure | None:
    """Draw pass@k over k and best-of-N over N at step 0 and at the last evaluation."""
    rows = [row for row in SAMPLING_ROWS if _sample_counts(runs, row[0])]
    if not rows:
        return None
    figure, axes = panels(len(rows), title)
    ticks: set[int] = set()
    for axis, (kind, words, letter) in zip(axes, rows, strict=True):
        ticks.update(_sample_counts(runs, kind))
        for name, group in by_name(runs).items():
            color, marker = looks(runs)[name]
            start = {"linestyle": "--", "linewidth": 1.4, "color": color}
            end = {"linewidth": 2.2, "color": color, "marker": marker, "markersize": 4.5}
            _draw_sampling(axis, group, kind, 0, start)
            _draw_sampling(axis, group, kind, -1, end)
        axis.set_ylabel(words, fontsize=12)
        axis.set_xlabel(f"samples per prompt, {letter}", fontsize=12)
        axis.tick_params(labelbottom=True)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    dashed = Line2D([], [], color=REFERENCE_GREY, linestyle="--", linewidth=1.4)
    return add_legend(figure, runs, [(dashed, "dashed: starting model")], "95 % bootstrap")


def _sample_counts(runs: Sequence[Run], kind: str) -> list[int]:
    """Return the k, or N, in the metrics of the runs."""
    start = f"diversity/{kind}"
    words = {name.removeprefix(start) for run in runs for line in run.metrics for name in line}
    return sorted(int(word) for word in words if word.isdecimal())


def _draw_sampling(
    axis: Axes, runs: Sequence[Run], kind: str, index: int, style: dict[str, Any]
) -> None:
    """Draw the curve of a method at its first (index 0) or last evaluation (index −1)."""
    counts, intervals, most_seeds = [], [], 0
    for count in _sample_counts(runs, kind):
        values = [
            values[index]
            for steps, values in recorded(runs, f"diversity/{kind}{count}")
            if (steps[index] > 0) == (index < 0) and np.isfinite(values[index])
        ]
        if values:
            counts.append(count)
            intervals.append(mean_interval(np.array(values), draws=DRAWS))
            most_seeds = max(most_seeds, len(values))
    if not counts:
        return
    axis.plot(counts, [interval.value for interval in intervals], **style)
    if index < 0 and most_seeds > 1:
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        axis.fill_between(counts, low, high, color=style["color"], alpha=0.18, linewidth=0)
