"""Figures of single optimizer steps: waterfalls of a ledger's parts, and maps over completions.

A waterfall's bars each start at the end of the bar above, so that together they reach the actual
change. A cell of the influence map is Σ over the tokens of a probe completion of Δ log π by one
sample's terms; the similarity map shows cosines of the features of probe completions.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ntkrl.report.figure_text import TickNumbers, families, fitted, plain, short_exponent
from ntkrl.report.plotting import (
    HEADING_INCHES,
    PALETTE,
    REFERENCE_GREY,
    column,
    dress,
    head,
    label_bar,
    shown,
    titled_figure,
)
from ntkrl.report.records import StepLedger
from ntkrl.report.runs import Run, by_name, groups_with, mean_words

COLORS = {"R": PALETTE[0], "G": PALETTE[1], "momentum": PALETTE[3], "decay": PALETTE[5]}
COLORS |= {"optimizer": "#999999", "curvature": PALETTE[2], "actual": "#222222"}
QUANTITY = {"log_prob": "mean Δ log π", "entropy": "mean ΔH"}
MAX_SAMPLES = 32
"""Samples shown of a step: those with the largest Σ |influence|."""
MAX_PANELS = 4
LABELLED = 20
"""Most rows or columns that are all labelled."""


def last_ledgers(runs: Sequence[Run]) -> list[StepLedger]:
    """Return the ledgers of the last step common to all runs with ledgers, else each run's last."""
    ledgers_by_run = [run.ledgers for run in runs if run.ledgers]
    common = set.intersection(*map(set, ledgers_by_run)) if ledgers_by_run else set()
    return [ledgers[max(common) if common else max(ledgers)] for ledgers in ledgers_by_run]


def steps_of(ledgers: Sequence[StepLedger]) -> str:
    """Return the ledgers' steps, joined by "or"."""
    return " or ".join(str(step) for step in sorted({ledger.step for ledger in ledgers}))


def part_means(ledgers: Sequence[StepLedger], measure: str) -> dict[str, float]:
    """Return the mean over probe tokens, and over ledgers, of each part and of "actual" (last).

    A part that a ledger lacks counts as 0.
    """
    means = {part: 0.0 for ledger in ledgers for part in ledger.parts[measure]} | {"actual": 0.0}
    for ledger in ledgers:
        for part, values in (ledger.parts[measure] | {"actual": ledger.actual[measure]}).items():
            means[part] += float(values.mean()) / len(ledgers)
    return means


def bar_ends(values: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and ends of a waterfall's bars; the last, "actual", starts at 0."""
    ends = np.cumsum(list(values.values())[:-1])
    return np.array([0.0, *ends[:-1], 0.0]), np.array([*ends, values["actual"]])


def waterfalls(measure: str, title: str, runs: Sequence[Run]) -> Figure | None:
    """Draw the parts' contributions to a measure of the probe tokens, one panel per method."""
    groups = {name: last_ledgers(group) for name, group in by_name(runs).items()}
    groups = {name: ledgers for name, ledgers in groups.items() if ledgers}
    if not groups:
        return None
    means = {name: part_means(ledgers, measure) for name, ledgers in groups.items()}
    counts = [len(values) for values in means.values()]
    inches = 0.27 * sum(counts) + 1.05 * len(counts) + 0.4
    figure, axes = column(title, inches, len(means), height_ratios=counts)
    for axis, (name, ledgers) in zip(axes, groups.items(), strict=True):
        _waterfall(axis, means[name])
        axis.set_xlabel(f"{QUANTITY[measure]} of the probe tokens (nats)", fontsize=12)
        head(axis, f"{plain(name)}, step {steps_of(ledgers)}{mean_words(ledgers)}")
    return figure


def _waterfall(axis: Axes, values: dict[str, float]) -> None:
    dress(axis)
    axis.grid(False, axis="y")
    names, (starts, ends) = list(values), bar_ends(values)
    for row, (name, start, end) in enumerate(zip(names, starts, ends, strict=True)):
        color = COLORS[name if name in COLORS else name[-1]]  # of a term: its role, R or G
        axis.barh(row, end - start, 0.72, left=start, color=color)
        if row + 1 < len(names):
            axis.plot([end, end], [row, row + 1], color=REFERENCE_GREY, linewidth=0.8)
        background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        text = short_exponent(f"{values[name]:+.2g}").replace("-", "−")
        label_bar(axis, max(start, end), row, text, bbox=background)
    axis.axvline(0, color=REFERENCE_GREY, linewidth=0.8)
    axis.set_yticks(range(len(names)), [shown(name, 16) for name in names])
    axis.set_ylabel("part", fontsize=12)
    axis.set_ylim(len(names) - 0.4, -0.6)
    low, high = min(0.0, ends.min()), max(0.0, ends.max())
    span = high - low if high > low else 1.0
    axis.set_xlim(low - 0.05 * span, high + 0.25 * span)  # room for the numbers at the bars
    axis.locator_params(axis="x", nbins=4)


def first_by_sample(runs: Sequence[Run]) -> list[tuple[Run, StepLedger]]:
    """Return each method's first seed with ledgers by sample, and the last of these."""

    def last(run: Run) -> tuple[Run, StepLedger] | None:
        steps = [step for step, ledger in run.ledgers.items() if ledger.influence is not None]
        return (run, run.ledgers[max(steps)]) if steps else None

    return [pairs[0] for pairs in groups_with(runs, last).values()]


def influence_map(ledger: StepLedger, limit: int = MAX_SAMPLES) -> tuple[list[int], np.ndarray]:
    """Sum a ledger by sample over the tokens of each probe completion.

    Args:
      ledger: with an influence.
      limit: most samples to return.

    Returns:
      rows: the most influential samples, by advantage, falling.
      values: `[rows, S]` nats.

    Raises:
      ValueError: the ledger is by group.
    """
    if ledger.influence is None:
        raise ValueError(f"the ledger of step {ledger.step} is by group; expected by sample.")
    values = ledger.texts.sums(ledger.influence).T
    strongest = np.argsort(-np.abs(values).sum(axis=1), kind="stable")[:limit]
    rows = sorted(strongest.tolist(), key=lambda row: (-ledger.samples[row].advantage, row))
    return rows, values[rows]


def influence(title: str, runs: Sequence[Run]) -> Figure | None:
    """Draw the influence of samples on probe completions: the first seed of each method."""
    first = first_by_sample(runs)[:MAX_PANELS]
    if not first:
        return None
    maps = [influence_map(ledger) for _, ledger in first]
    heights = [0.17 * len(rows) + 1.1 for rows, _ in maps]
    figure, axes = column(title, sum(heights) + 0.4, len(maps), height_ratios=heights)
    for axis, (run, ledger), (rows, values) in zip(axes, first, maps, strict=True):
        limit = float(np.abs(values).max(initial=0)) or 1.0
        image = axis.imshow(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        labels = [f"A = {ledger.samples[row].advantage:+.2f}" for row in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_ylabel("sample", fontsize=12)
        _label_completions(axis, values.shape[1])
        head(axis, f"{plain(run.name)}, seed {run.seed}, step {ledger.step}")
        _color_bar(axis, image, "Σ Δ log π (nats)")
    return figure


def similarity(title: str, runs: Sequence[Run]) -> Figure | None:
    """Draw the cosines of features between probe completions at the first and last probe."""

    def ends(run: Run) -> dict[int, np.ndarray]:
        steps = sorted(step for step, arrays in run.probes.items() if "cosines" in arrays)
        return {step: run.probes[step]["cosines"] for step in (*steps[:1], *steps[-1:])}

    groups = list(groups_with(runs, ends).items())[:MAX_PANELS]
    first: dict[str, dict[int, np.ndarray]] = {name: values[0] for name, values in groups}
    if not first:
        return None
    figure = titled_figure(title, 2.9 * len(first) + 0.9)
    grid = figure.subplots(len(first), 2, squeeze=False)
    drawn = [array for by_step in first.values() for array in by_step.values()]
    low, high = (float(of([of(array) for array in drawn])) for of in (np.nanmin, np.nanmax))
    # features of one model mostly point the same way; a scale from −1 to 1 would hide differences
    largest = min(1.0, max(1.0, np.ceil(20 * max(high, -low))) / 20)
    low, cmap = (-largest, "RdBu_r") if low < 0 else (np.floor(20 * low - 0.5) / 20, "Blues")
    for axes, (name, by_step) in zip(grid, first.items(), strict=True):
        heading = f"{fitted(plain(name), 11, HEADING_INCHES)}\n"  # above both panels
        for axis, (step, cosines) in zip(axes, by_step.items(), strict=False):
            image = axis.imshow(cosines, cmap=cmap, vmin=low, vmax=largest, interpolation="nearest")
            _label_completions(axis, len(cosines))
            axis.set_yticks(*_numbers(len(cosines)))
            axis.set_ylabel("probe completion", fontsize=10)
            style = {"fontsize": 11, "fontfamily": families()}
            axis.set_title(f"{heading}step {step}", loc="left", **style)
            heading = ""
        for axis in axes[len(by_step) :]:
            axis.remove()
    place = {"location": "bottom", "shrink": 0.7, "aspect": 30, "format": TickNumbers()}
    bar = figure.colorbar(image, ax=figure.axes, **place)
    bar.set_label("mean cosine of features", fontsize=12)
    bar.outline.set_visible(False)
    return figure


def _label_completions(axis: Axes, count: int) -> None:
    axis.spines[:].set_visible(False)
    axis.tick_params(labelsize=8, length=2)
    axis.set_xticks(*_numbers(count))
    axis.set_xlabel("probe completion", fontsize=10)


def _numbers(count: int) -> tuple[list[int], list[str]]:
    """Return positions and labels of ticks, counted from 1; of many, every tenth is labelled."""
    labels = range(1, count + 1) if count <= LABELLED else [1, *range(10, count + 1, 10)]
    return [number - 1 for number in labels], [str(number) for number in labels]


def _color_bar(axis: Axes, image: AxesImage, words: str) -> None:
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02, shrink=0.9, format=TickNumbers())
    bar.ax.tick_params(labelsize=9)
    bar.ax.set_ylabel(words, fontsize=10)
    bar.outline.set_visible(False)
