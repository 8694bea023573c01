"""Elements shared by the figures: colours, panels, curves over runs, stage marks, files.

Everything is set on Figure and Axes objects; no pyplot, hence no state between figures. Sizes
are chosen for a phone: 5.2 inches drawn on 350 pixels leave 11 points at about 10 pixels.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ntkrl.messages import printable
from ntkrl.report.figure_text import TickNumbers, families, fitted, plain
from ntkrl.report.metric_names import GLOSSARY
from ntkrl.report.runs import Run, by_name, mean_words, series, stage_ends

# Okabe and Ito's palette without yellow (too light on white) and black (kept for references).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH_INCHES = 5.2
REFERENCE_GREY = "#555555"
LABEL_CHARACTERS = 28
HEADING_INCHES = 3.6
"""Room above axes, whose left end the longest labels move furthest."""
LINE_INCHES = 0.19
"""Height of a line of a heading or legend, 11 points."""
DOTS_PER_INCH = 180
LEGEND_INCHES = 4.4
STAGE_POINTS = 13.0
"""Height of a line about the end of a stage, 10 points."""
FORMATS = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}
"""File formats of a figure, each without the metadata that would differ between equal figures."""


class Look(NamedTuple):
    """Colour and marker of one method, equal in all figures of a report."""

    color: str
    marker: str


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """Assign each method a look, by the order of names.

    Beyond six methods colours repeat with other markers, so up to 36 looks differ.
    """
    count = len(PALETTE)
    return {
        name: Look(PALETTE[index % count], MARKERS[(index + index // count) % count])
        for index, name in enumerate(by_name(runs))
    }


def figure_bytes(figure: Figure, suffix: str, dots_per_inch: int = DOTS_PER_INCH) -> bytes:
    """Return a figure as file of a format; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "ntkrl"}):
        # texts of runs may hold characters that the font lacks; it draws boxes for them
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=suffix, dpi=dots_per_inch, metadata=FORMATS[suffix])
    return buffer.getvalue()


def shown(text: str, limit: int = LABEL_CHARACTERS) -> str:
    """Shorten a user's text, without control codes, and escape dollars: matplotlib's formulas."""
    line = printable(text.replace("\n", " "))
    short = line if len(line) <= limit else line[: limit - 1] + "…"
    return short.replace("$", r"\$")


def has(runs: Sequence[Run], name: str) -> bool:
    """Return whether any run has a finite value of the metric."""
    return any(np.isfinite(series(run, name)[1]).any() for run in runs)


def column(title: str, inches: float, count: int, **layout: Any) -> tuple[Figure, list[Axes]]:
    """Return a titled figure of `count` axes below each other, and the axes."""
    figure = titled_figure(title, inches)
    return figure, list(figure.subplots(count, 1, squeeze=False, **layout)[:, 0])


def titled_figure(title: str, inches: float) -> Figure:
    """Return an empty figure of a height, with its title."""
    figure = Figure(figsize=(WIDTH_INCHES, inches), layout="constrained", facecolor="white")
    words = fitted(title, 13, 0.95 * WIDTH_INCHES, "bold")
    style = {"fontsize": 13, "fontweight": "bold", "fontfamily": families()}
    figure.suptitle(words, x=0.02, ha="left", **style)
    return figure


def head(axis: Axes, text: str, pad: float = 6.0) -> None:
    """Write a heading above axes, in as many lines as it needs."""
    style = {"fontsize": 11, "fontfamily": families()}
    axis.set_title(fitted(text, 11, HEADING_INCHES), loc="left", pad=pad, **style)


def panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels below each other that share their horizontal axis."""
    # A single panel may be taller; the title and the legend need 0.9 inches.
    inches = 3.0 if count == 1 else 2.2 * count
    figure, axes = column(title, inches + 0.9, count, sharex=True)
    for axis in axes:
        dress(axis)
    return figure, axes


def dress(axis: Axes) -> None:
    """Apply the style common to all axes."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=11)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_formatter(TickNumbers())
    axis.yaxis.set_major_formatter(TickNumbers())


def label_steps(axis: Axes) -> None:
    """Label the horizontal axis of the lowest panel."""
    axis.set_xlabel(f"optimizer {GLOSSARY['step'][0]}", fontsize=12)


def label_values(axis: Axes, metric: str, words: str) -> None:
    """Label the vertical axis in words, with the metric's unit from the glossary."""
    unit = GLOSSARY[metric][0]
    label = words if unit in words else f"{words}\n({unit})"
    axis.set_ylabel(label, fontsize=12)


def label_bar(axis: Axes, value: float, row: float, text: str, **style: Any) -> None:
    """Write a text beside the end of a horizontal bar."""
    style = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", **style}
    axis.annotate(text, (value, row), fontsize=10, **style)


def draw_curves(axis: Axes, runs: Sequence[Run], name: str, marked: bool = True) -> None:
    """Draw a metric: one thin line per run; for several, their bold mean and min–max band.

    Args:
      axis: where to draw.
      runs: all runs of the report.
      name: the metric.
      marked: put markers on the bold line, for metrics that are measured now and then.
    """
    groups = by_name(runs)
    for method, look in looks(runs).items():
        curves = recorded(groups[method], name)
        if not curves:
            continue
        if len(curves) > 1:
            for steps, values in curves:
                axis.plot(steps, values, color=look.color, linewidth=0.7, alpha=0.5)
        bold = {"color": look.color, "linewidth": 2.2}
        if marked:
            bold |= {"marker": look.marker, "markersize": 4.5}
        draw_mean(axis, curves, **bold)


def draw_mean(axis: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], **style: Any) -> None:
    """Draw the mean of curves and, for several, the band from lowest to highest."""
    steps, values = coinciding(curves)
    axis.plot(steps, values.mean(axis=0), **style)
    if len(curves) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)


def draw_thin(axis: Axes, runs: Sequence[Run], name: str) -> None:
    """Draw a noisy metric as one thin pale line per run."""
    for method, look in looks(runs).items():
        for run in by_name(runs)[method]:
            axis.plot(*series(run, name), color=look.color, linewidth=0.6, alpha=0.4)


def recorded(runs: Sequence[Run], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the series of a metric of every run that has it."""
    return [curve for curve in (series(run, name) for run in runs) if curve[0].size]


def coinciding(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Restrict curves to the steps they all have.

    Args:
      curves: at least one pair of steps `[n]` (rising) and values `[n]`.

    Returns:
      steps: `[m]` steps in every curve.
      values: `[curves, m]`.
    """
    common = curves[0][0]
    for steps, _ in curves[1:]:
        common = np.intersect1d(common, steps, assume_unique=True)
    return common, np.stack([values[np.isin(steps, common)] for steps, values in curves])


def draw_stages(axes: Sequence[Axes], runs: Sequence[Run]) -> int:
    """Mark the ends of stages with dashed lines, each named once above the first panel.

    Returns:
      Lines of text above that panel.
    """
    ends = sorted({(step, stage) for run in runs for stage, step in stage_ends(run)})
    last = max((line["step"] for run in runs for line in run.metrics), default=0)
    lines = 0
    for number, (step, stage) in enumerate(ends):
        for axis in axes:
            axis.axvline(step, color=REFERENCE_GREY, linestyle=(0, (4, 3)), linewidth=1.1)
        if stage in {name for _, name in ends[:number]}:  # runs differ in its length
            continue
        # Above the panel, where no curve can run through it, and the names below each other.
        right = step < 0.5 * last
        share = step / last if last > 0 else 0.0
        words = fitted(f"stage “{plain(stage)}” ends", 10, HEADING_INCHES * max(share, 1 - share))
        axes[0].annotate(
            words,
            xy=(step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + STAGE_POINTS * lines),
            textcoords="offset points",
            fontsize=10,
            fontfamily=families(),
            color=REFERENCE_GREY,
            ha="left" if right else "right",
            va="bottom",
        )
        lines += 1 + words.count("\n")
    return lines


def add_legend(
    figure: Figure,
    runs: Sequence[Run],
    extra: Sequence[tuple[Artist, str]] = (),
    band: str = "lowest to highest",
) -> Figure:
    """Add the legend of methods, bands over seeds and extra entries below the panels."""
    groups, entries = by_name(runs), list[tuple[Artist, str]]()
    for name, look in looks(runs).items():
        line = Line2D([], [], color=look.color, marker=look.marker, linewidth=2.2, markersize=5)
        words = fitted(plain(name) + mean_words(groups[name]), 11, LEGEND_INCHES)
        entries.append((line, words))
    entries += extra
    if any(len(group) > 1 for group in groups.values()):
        entries.append((Patch(color=REFERENCE_GREY, alpha=0.18), f"band: {band}"))
    handles, labels = zip(*entries, strict=True)
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 26 else 1
    lines = sum(1 + label.count("\n") for label in labels) / columns
    # a figure has room for three lines; more must not take the panels'
    figure.set_figheight(figure.get_figheight() + LINE_INCHES * max(0.0, lines - 3))
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        prop={"family": families(), "size": 11},
        frameon=False,
        handlelength=1.8,
    )
    return figure
