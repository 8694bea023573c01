"""Two tables beside the comparison: how alike features are, and the best of N samples."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.report.runs import Run, by_name, series
from ntkrl.report.table import BASE_LABEL, number

PAIRS = {
    "within_response": "same response",
    "across_responses": "same prompt",
    "across_prompts": "other prompts",
}
GAP = "diversity/gap_best_of_"


class Table(NamedTuple):
    """A table in words: title, heads, rows (the first cell is a label), and what to know."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def tables(runs: Sequence[Run]) -> list[Table]:
    """Return those of the tables that the runs hold anything for."""
    return [table for table in (similarity(runs), best_of(runs)) if table is not None]


def similarity(runs: Sequence[Run]) -> Table | None:
    """Tell mean and variance of the cosines of features, of the starting model and each method.

    Args:
      runs: any runs; what they measured on the probe set counts.
    """
    names = [f"probe/cosine_{how}{kind}" for kind in PAIRS for how in ("", "variance_")]
    rows = [(BASE_LABEL, *(_mean(runs, name, 0) for name in names))]
    rows += [
        (name, *(_mean(group, metric, -1) for metric in names))
        for name, group in by_name(runs).items()
    ]
    if all(cell == number(math.nan) for _, *cells in rows for cell in cells):
        return None
    heads = [f"{words}, {what}" for words in PAIRS.values() for what in ("mean", "variance")]
    return Table(
        "How alike features are",
        ("cosines of features", *heads),
        tuple(rows),
        "Cosines of the features of two positions of the probe set: in the same response, in two "
        f"responses to a prompt, in responses to two prompts. {BASE_LABEL}: the starting model; "
        "methods at their last probe, means over runs.",
    )


def best_of(runs: Sequence[Run]) -> Table | None:
    """Compare the best of N samples with that of the policy an evaluation was compared with.

    Args:
      runs: any runs; their evaluations with eval.base count.
    """
    found = [
        (run, name, told)
        for run in runs
        for name, told in run.evaluations.items()
        if any(metric.startswith(GAP) for metric in told)
    ]
    if not found:
        return None
    counts = sorted({int(n) for _, _, told in found for n in _counts(told)})
    rows = []
    for run, name, told in found:
        label = f"{run.name}, seed {run.seed}: {name}"
        base, own, gap = ([_cell(told, count)[part] for count in counts] for part in range(3))
        rows += [(f"{label}, before", *base), (f"{label}, after", *own), (f"{label}, gap", *gap)]
    return Table(
        "Best of N",
        ("mean largest reward of", *(f"{count} sample{'s' * (count > 1)}" for count in counts)),
        tuple(rows),
        "Of each prompt's samples, unbiased; before: the policy of eval.base on the same prompts; "
        "gap: after − before with its 95 % bootstrap interval over prompts. Where training only "
        "sharpens what was there, the gap closes as N grows.",
    )


def as_html(table: Table) -> str:
    """Return a table as a section of the page."""
    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in table.heads)
    rows = [
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    ]
    return (
        f'<section><h2>{html.escape(table.title)}</h2>\n<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
        f'</div>\n<div class="small"><p>{html.escape(table.note)}</p></div></section>'
    )


def _mean(runs: Sequence[Run], name: str, place: int) -> str:
    """Write the mean over runs of a metric at the start (0) or at the last probe (−1)."""
    values = []
    for run in runs:
        steps, found = series(run, name)
        if steps.size and (steps[place] == 0) == (place == 0):
            values.append(found[place])
    finite = [value for value in values if math.isfinite(value)]
    return number(float(np.mean(finite)) if finite else math.nan)


def _counts(told: dict[str, float]) -> list[str]:
    counts = [metric.removeprefix(GAP) for metric in told if metric.startswith(GAP)]
    return [count for count in counts if count.isdigit()]


def _cell(told: dict[str, float], count: int) -> tuple[str, str, str]:
    """Write before, after and gap of the best of `count` samples."""
    gap, own = f"{GAP}{count}", f"diversity/best_of_{count}"
    if gap not in told or own not in told:
        return ("–",) * 3
    ends = [told[f"{gap}_{end}"] if f"{gap}_{end}" in told else math.nan for end in ("low", "high")]
    interval = f" ({number(ends[0])} to {number(ends[1])})"
    return number(told[own] - told[gap]), number(told[own]), number(told[gap]) + interval
