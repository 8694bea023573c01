"""What moved the probe tokens in one optimizer step: the ledger's parts as a waterfall.

Each bar starts where the one above it ends, so that all of them together reach the actual change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkrl.report.ledgers import StepLedger
from ntkrl.report.plotting import PALETTE, REFERENCE_GREY, WIDTH_INCHES, dress, shown
from ntkrl.report.runs import Run, by_name

COLORS = {"R": PALETTE[0], "G": PALETTE[1], "momentum": PALETTE[3], "decay": PALETTE[5]}
COLORS |= {"optimizer": "#999999", "curvature": PALETTE[2], "actual": "#222222"}
QUANTITY = {"log_prob": "mean Δ log π", "entropy": "mean ΔH"}


def log_prob_waterfall(runs: Sequence[Run]) -> Figure | None:
    """Draw what each part did to the probe tokens' log-probs, one panel per method."""
    return _waterfalls(runs, "log_prob", "What moved the log-probs in one step")


def entropy_waterfall(runs: Sequence[Run]) -> Figure | None:
    """Draw what each part did to the entropy on the probe tokens, one panel per method."""
    return _waterfalls(runs, "entropy", "What moved the entropy in one step")


def means(ledgers: Sequence[StepLedger], measure: str) -> dict[str, float]:
    """Return the mean over probe tokens, and over ledgers, of each part and of "actual".

    A part that a ledger does not have was 0 in it.
    """
    found = {part: 0.0 for ledger in ledgers for part in ledger.parts[measure]} | {"actual": 0.0}
    for ledger in ledgers:
        for part, values in (ledger.parts[measure] | {"actual": ledger.actual[measure]}).items():
            found[part] += float(values.mean()) / len(ledgers)
    return found


def last_ledgers(runs: Sequence[Run]) -> list[StepLedger]:
    """Return the ledgers of the last step that all runs with ledgers have, else of their own."""
    with_some = [run.ledgers for run in runs if run.ledgers]
    common = set.intersection(*map(set, with_some)) if with_some else set()
    return [ledgers[max(common) if common else max(ledgers)] for ledgers in with_some]


def bars(values: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return where bars start and end: each where the one above ends; "actual", the last, at 0."""
    ends = np.cumsum(list(values.values())[:-1])
    return np.array([0.0, *ends[:-1], 0.0]), np.array([*ends, values["actual"]])


def color_of(part: str) -> str:
    """Return the colour of a part: terms by their role."""
    return COLORS[part if part in COLORS else part[-1]]


def _waterfalls(runs: Sequence[Run], measure: str, title: str) -> Figure | None:
    groups = {name: last_ledgers(group) for name, group in by_name(runs).items()}
    groups = {name: ledgers for name, ledgers in groups.items() if ledgers}
    if not groups:
        return None
    found = {name: means(ledgers, measure) for name, ledgers in groups.items()}
    counts = [len(values) for values in found.values()]
    size = (WIDTH_INCHES, 0.27 * sum(counts) + 1.05 * len(counts) + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", fontweight="bold")
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axis, (name, values) in zip(axes, found.items(), strict=True):
        _waterfall(axis, values)
        axis.set_xlabel(f"{QUANTITY[measure]} of the probe tokens (nats)", fontsize=12)
        axis.set_title(f"{shown(name)}, {_step(groups[name])}", fontsize=11, loc="left")
    return figure


def _step(ledgers: Sequence[StepLedger]) -> str:
    steps = " or ".join(str(step) for step in sorted({ledger.step for ledger in ledgers}))
    count = f", mean of {len(ledgers)} runs" if len(ledgers) > 1 else ""
    return f"step {steps}{count}"


def _waterfall(axis: Axes, values: dict[str, float]) -> None:
    dress(axis)
    axis.grid(False, axis="y")
    names, (starts, ends) = list(values), bars(values)
    for row, (name, start, end) in enumerate(zip(names, starts, ends, strict=True)):
        axis.barh(row, end - start, 0.72, left=start, color=color_of(name))
        if row + 1 < len(names):
            axis.plot([end, end], [row, row + 1], color=REFERENCE_GREY, linewidth=0.8)
        axis.annotate(
            f"{values[name]:+.2g}".replace("-", "−"),
            (max(start, end), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
    axis.axvline(0, color=REFERENCE_GREY, linewidth=0.8)
    axis.set_yticks(range(len(names)), [shown(name, 16) for name in names])
    axis.set_ylabel("part", fontsize=12)
    axis.set_ylim(len(names) - 0.4, -0.6)
    low, high = min(0.0, ends.min()), max(0.0, ends.max())
    span = high - low if high > low else 1.0
    axis.set_xlim(low - 0.05 * span, high + 0.25 * span)  # room for the numbers at the bars
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
