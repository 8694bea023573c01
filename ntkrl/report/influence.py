"""Which training completion moved which probe completion: maps of one optimizer step.

A cell is Σ over the tokens of a probe completion of what one sample's terms did to log π; a
second map shows how alike the features of probe completions are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ntkrl.report.ledgers import StepLedger
from ntkrl.report.plotting import WIDTH_INCHES, shown
from ntkrl.report.probes import ProbeTexts
from ntkrl.report.runs import Run, by_name

MAX_SAMPLES = 32
"""Samples shown of a step: those with the largest Σ |influence|."""
MAX_PANELS = 4
NAMED = 20
"""Rows or columns that can be labelled each."""


def influence(runs: Sequence[Run]) -> Figure | None:
    """Draw the influence of samples on probe completions, one panel per method."""
    chosen = [run for group in by_name(runs).values() for run in group if last_by_sample(run)]
    chosen = list({run.name: run for run in reversed(chosen)}.values())[::-1][:MAX_PANELS]
    if not chosen:
        return None
    maps = [influence_map(last_by_sample(run), run.texts) for run in chosen]
    heights = [0.17 * len(rows) + 1.1 for rows, _ in maps]
    figure = Figure((WIDTH_INCHES, sum(heights) + 0.4), layout="constrained", facecolor="white")
    title = "Which sample moved which probe completion"
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", fontweight="bold")
    axes = figure.subplots(len(chosen), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, run, (rows, values) in zip(axes, chosen, maps, strict=True):
        ledger = last_by_sample(run)
        limit = float(np.abs(values).max(initial=0)) or 1.0
        image = axis.imshow(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        labels = [f"A = {ledger.samples[row].advantage:+.2f}" for row in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_ylabel("sample", fontsize=12)
        _label_completions(axis, values.shape[1])
        title = f"{shown(run.name)}, seed {run.seed}, step {ledger.step}"
        axis.set_title(title, fontsize=11, loc="left")
        _bar(axis, image, "Σ Δ log π (nats)")
    return figure


def influence_map(
    ledger: StepLedger, texts: ProbeTexts, limit: int = MAX_SAMPLES
) -> tuple[list[int], np.ndarray]:
    """Sum a ledger by sample over the tokens of each probe completion.

    Args:
      ledger: with an influence.
      texts: its probe set.
      limit: most samples to return.

    Returns:
      rows: the most influential samples, by advantage, falling.
      values: `[rows, S]` nats.
    """
    values = texts.sums(ledger.influence).T
    strongest = np.argsort(-np.abs(values).sum(axis=1), kind="stable")[:limit]
    rows = sorted(strongest.tolist(), key=lambda row: (-ledger.samples[row].advantage, row))
    return rows, values[rows]


def similarity(runs: Sequence[Run]) -> Figure | None:
    """Draw the cosines of features between probe completions at the first and last probe."""
    chosen = {}
    for name, group in by_name(runs).items():
        for run in group:
            steps = [step for step in sorted(run.probes) if "cosines" in run.probes[step]]
            if steps and name not in chosen and len(chosen) < MAX_PANELS:
                chosen[name] = run, sorted({steps[0], steps[-1]})
    if not chosen:
        return None
    figure = Figure((WIDTH_INCHES, 2.9 * len(chosen) + 0.9), layout="constrained")
    title = "Similarity of probe completions' features"
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", fontweight="bold")
    grid = figure.subplots(len(chosen), 2, squeeze=False)
    shown_cosines = [
        run.probes[step]["cosines"] for run, steps in chosen.values() for step in steps
    ]
    # features of one model mostly point the same way; a scale from −1 to 1 would hide differences
    low, high = (
        float(of([of(cosines) for cosines in shown_cosines])) for of in (np.nanmin, np.nanmax)
    )
    largest = min(1.0, max(1.0, np.ceil(20 * max(high, -low))) / 20)
    low, cmap = (-largest, "RdBu_r") if low < 0 else (np.floor(20 * low - 0.5) / 20, "Blues")
    for axes, (run, steps) in zip(grid, chosen.values(), strict=True):
        for axis, step in zip(axes, steps, strict=False):
            cosines = run.probes[step]["cosines"]
            image = axis.imshow(cosines, cmap=cmap, vmin=low, vmax=largest, interpolation="nearest")
            _label_completions(axis, len(cosines))
            axis.set_yticks(*_numbers(len(cosines)))
            axis.set_ylabel("probe completion", fontsize=10)
            axis.set_title(f"{shown(run.name, 14)}, step {step}", fontsize=11, loc="left")
        for axis in axes[len(steps) :]:
            axis.remove()
    bar = figure.colorbar(image, ax=figure.axes, location="bottom", shrink=0.7, aspect=30)
    bar.set_label("mean cosine of features", fontsize=12)
    bar.outline.set_visible(False)
    return figure


def last_by_sample(run: Run) -> StepLedger | None:
    """Return the last ledger that keeps samples apart."""
    steps = [step for step, ledger in run.ledgers.items() if ledger.influence is not None]
    return run.ledgers[max(steps)] if steps else None


def _label_completions(axis: Axes, count: int) -> None:
    axis.spines[:].set_visible(False)
    axis.tick_params(labelsize=8, length=2)
    axis.set_xticks(*_numbers(count))
    axis.set_xlabel("probe completion", fontsize=10)


def _numbers(count: int) -> tuple[list[int], list[int]]:
    """Return places and labels of ticks: the first is 1, and of many every tenth is named."""
    named = range(1, count + 1) if count <= NAMED else [1, *range(10, count + 1, 10)]
    return [number - 1 for number in named], list(named)


def _bar(axis: Axes, image: AxesImage, words: str) -> None:
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02, shrink=0.9)
    bar.ax.tick_params(labelsize=9)
    bar.ax.set_ylabel(words, fontsize=10)
    bar.formatter.set_powerlimits((-2, 3))
    bar.outline.set_visible(False)
