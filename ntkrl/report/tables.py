"""Tables of a report: methods against the starting model, similarity of features, best of N.

Means and standard deviations (n − 1 in the denominator) are over the runs of one name.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.messages import printable
from ntkrl.report.metric_names import training_timings
from ntkrl.report.runs import Run, by_name, series, stage_ends

MAX_COLUMNS = 100
BASE_LABEL = "base"
NO_VALUE = "–"
PAIRS = {
    "within_response": "same response",
    "across_responses": "same prompt",
    "across_prompts": "other prompts",
}
"""Kinds of pairs of positions whose features are compared, in words."""
GAP = "diversity/gap_best_of_"


class Table(NamedTuple):
    """A table as text.

    title: heading.
    heads: of the columns.
    rows: cells; the first of each row is its label.
    notes: sentences below the table.
    css: class of the HTML table.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    css: str = ""


@dataclasses.dataclass(frozen=True)
class Stat:
    """Mean over runs, standard deviation (NaN below two runs) and number of runs with a value."""

    mean: float
    sd: float
    count: int


NO_STAT = Stat(math.nan, math.nan, 0)


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """Numbers of one method, or of the starting model.

    label: name of the method, or "base".
    runs: number of runs.
    unfinished: number of runs that did not end normally.
    end_steps: steps of the last evaluations, rising, without repetition.
    noise: standard deviation of eval/reward over samplings of the starting models, or NaN.
    reward_start, reward_end: eval/reward at step 0 and at the last evaluation.
    gain: mean of (end − start) over runs, in units of noise.
    pass_at_k, distinct: at the last evaluation.
    entropy_start, entropy, confidence_start, confidence: on the probe set, step 0 and last.
    head_share, correlation: means over the probed steps of the last stage. Earlier stages are
        left out since a stage that trains the head alone has share 1 by construction.
    seconds: time spent training, without probes and evaluations.
    """

    label: str
    runs: int
    noise: float
    reward_start: Stat
    pass_at_k: Stat
    distinct: Stat
    entropy_start: Stat
    entropy: Stat
    confidence_start: Stat
    confidence: Stat
    unfinished: int = 0
    end_steps: tuple[int, ...] = ()
    reward_end: Stat = NO_STAT
    gain: float = math.nan
    head_share: Stat = NO_STAT
    correlation: Stat = NO_STAT
    seconds: Stat = NO_STAT


def summaries(runs: Sequence[Run]) -> tuple[MethodSummary, ...]:
    """Summarise runs by method.

    Args:
      runs: any runs, in any order.

    Returns:
      The starting model, from the step-0 evaluations of all runs, then each method in the order of
      names. Unmeasured numbers are NaN.
    """
    noise = _over(runs, lambda run: _at_start(run, "eval/reward_sd")).mean
    noise = noise if noise > 0 else math.nan  # 0 of greedy samples is no measure of it
    base = _levels(BASE_LABEL, runs, noise, _at_start)
    return base, *(_method(name, group, noise) for name, group in by_name(runs).items())


def _levels(
    label: str, runs: Sequence[Run], noise: float, level: Callable[[Run, str], float]
) -> MethodSummary:
    """Summarise the metrics at the start, and those that `level` reads from a run."""

    def over(metric: str, read: Callable[[Run, str], float]) -> Stat:
        return _over(runs, lambda run: read(run, metric))

    return MethodSummary(
        label=label,
        runs=len(runs),
        noise=noise,
        reward_start=over("eval/reward", _at_start),
        pass_at_k=over("eval/pass@k", level),
        distinct=over("eval/distinct_solutions", level),
        entropy_start=over("probe/entropy", _at_start),
        entropy=over("probe/entropy", level),
        confidence_start=over("probe/confidence", _at_start),
        confidence=over("probe/confidence", level),
    )


def _method(name: str, runs: Sequence[Run], noise: float) -> MethodSummary:
    gain = _over(runs, lambda run: _at_end(run, "eval/reward") - _at_start(run, "eval/reward"))
    ends = {int(steps[-1]) for steps, _ in (series(r, "eval/reward") for r in runs) if steps.size}
    return dataclasses.replace(
        _levels(name, runs, noise, _at_end),
        unfinished=sum(not run.finished for run in runs),
        end_steps=tuple(sorted(ends)),
        reward_end=_over(runs, lambda run: _at_end(run, "eval/reward")),
        gain=gain.mean / noise,
        head_share=_over(runs, lambda run: _last_stage_mean(run, "predict/head_share")),
        correlation=_over(runs, lambda run: _last_stage_mean(run, "predict/correlation")),
        seconds=_over(runs, _training_seconds),
    )


def _over(runs: Sequence[Run], value: Callable[[Run], float]) -> Stat:
    """Return mean and standard deviation over the runs whose value is finite."""
    values = [v for v in map(value, runs) if math.isfinite(v)]
    if not values:
        return NO_STAT
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Stat(float(np.mean(values)), sd, len(values))


def _at_start(run: Run, name: str) -> float:
    steps, values = series(run, name)
    return float(values[0]) if steps.size and steps[0] == 0 else math.nan


def _at_end(run: Run, name: str) -> float:
    """Return the last value, unless it is the starting model's."""
    steps, values = series(run, name)
    return float(values[-1]) if steps.size and steps[-1] > 0 else math.nan


def _last_stage_mean(run: Run, name: str) -> float:
    steps, values = series(run, name)
    ends = stage_ends(run)
    after = ends[-1][1] if ends else -1
    late = values[(steps > after) & np.isfinite(values)]
    return float(late.mean()) if late.size else math.nan


def _training_seconds(run: Run) -> float:
    """Return the seconds spent training in all, NaN without timings."""
    spent = [seconds for line in run.timings for seconds in training_timings(line).values()]
    return float(sum(spent)) if spent else math.nan


def number(value: float) -> str:
    """Format a number in at most six characters where possible; "–" for none."""
    if not math.isfinite(value):
        return NO_VALUE
    size = abs(value)
    for limit, digits in ((9.9995, 3), (99.995, 2), (999.95, 1), (99999.5, 0)):
        if size < limit:
            return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
    return f"{value:.0e}".replace("-", "−")


def signed(value: float) -> str:
    """Format a number with its sign."""
    return ("+" if value > 0 else "") + number(value)


def spread(stat: Stat) -> str:
    """Format a mean with its standard deviation, where there is one."""
    if not math.isfinite(stat.sd):
        return number(stat.mean)
    return f"{number(stat.mean)} ± {number(stat.sd)}"


def _end_cell(row: MethodSummary) -> str:
    if row.label == BASE_LABEL and not row.end_steps:
        return f"± {number(row.noise)} noise" if math.isfinite(row.noise) else NO_VALUE
    return spread(row.reward_end)


class Column(NamedTuple):
    """One column: two short lines of heading, a title for the page, and its cell."""

    head: tuple[str, str]
    title: str
    cell: Callable[[MethodSummary], str]


COLUMNS: tuple[Column, ...] = (
    Column(("", "method"), "method", lambda row: row.label + ("*" if row.unfinished else "")),
    Column(("", "n"), "runs", lambda row: str(row.runs)),
    Column(("reward", "start"), "eval reward, start", lambda row: number(row.reward_start.mean)),
    Column(("reward", "end ± sd"), "eval reward, end ± sd", _end_cell),
    Column(
        ("Δ/", "noise"),
        "Δ in units of noise",
        lambda row: f"{row.gain:+.1f}".replace("-", "−") if math.isfinite(row.gain) else NO_VALUE,
    ),
    Column(("pass", "@k"), "pass@k", lambda row: number(row.pass_at_k.mean)),
    Column(("dis-", "tinct"), "distinct solutions", lambda row: number(row.distinct.mean)),
    Column(("ent-", "ropy"), "probe entropy, nats", lambda row: number(row.entropy.mean)),
    Column(("confi-", "dence"), "probe confidence", lambda row: number(row.confidence.mean)),
    Column(("R", "share"), "R share, last stage", lambda row: number(row.head_share.mean)),
    Column(("pred.", "corr."), "prediction correlation", lambda r: number(r.correlation.mean)),
    Column(("train", "s"), "training, s", lambda row: number(row.seconds.mean)),
)


def summary_table(rows: Sequence[MethodSummary]) -> Table:
    """Return the summaries as a table, with sentences a reader needs beside it."""
    notes = [
        "end: last evaluation; ± sd over runs (n); Δ/noise: (end − start) / noise, noise = sd of "
        "eval reward over samplings of the starting model, – where it was not measured.",
        "R share and corr.: means over the probed steps of the last stage; train s: without "
        "probes and evaluations.",
    ]
    ends = {row.label: row.end_steps for row in rows[1:]}
    if len(set(ends.values())) > 1 or any(len(steps) > 1 for steps in ends.values()):
        places = [
            f"{label} at step {' or '.join(map(str, steps))}"
            for label, steps in ends.items()
            if steps
        ]
        notes.append(f"The last evaluations are at different steps: {'; '.join(places)}.")
    open_runs = [f"{row.label} {row.unfinished} of {row.runs}" for row in rows if row.unfinished]
    if open_runs:
        notes.append(f"* runs that are not finished: {', '.join(open_runs)}.")
    starts = [row.reward_start.mean for row in rows[1:] if math.isfinite(row.reward_start.mean)]
    # Six standard deviations apart, equal starting models would be a very rare accident.
    if starts and max(starts) - min(starts) > 6 * rows[0].noise:
        notes.append("The starting evaluations differ by more than noise: not one base model?")
    heads = tuple(column.title for column in COLUMNS)
    cells = tuple(tuple(column.cell(row) for column in COLUMNS) for row in rows)
    return Table("Comparison", heads, cells, tuple(notes))


def format_table(runs: Sequence[Run]) -> str:
    """Format the summary table for a terminal.

    Args:
      runs: any runs, in any order.

    Returns:
      Lines of at most 100 characters: the table and its notes.
    """
    table = summary_table(summaries(runs))
    heads = [tuple(column.head[line] for column in COLUMNS) for line in (0, 1)]
    widths = [max(map(len, cells)) for cells in zip(*heads, *table.rows, strict=True)]
    # Only the label may be long, since the user chooses it: it is cut.
    widths[0] = min(widths[0], MAX_COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = [_align(cells, widths) for cells in (*heads, *table.rows)]
    lines.insert(2, "-" * min(MAX_COLUMNS, sum(widths) + 2 * (len(widths) - 1)))
    notes = [printable(t) for note in table.notes for t in textwrap.wrap(note, MAX_COLUMNS)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align the label left and numbers right, and cut what is too long."""
    cells = [printable(cell.replace("\n", " ")) for cell in cells]
    cut = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(cells, widths, strict=True)]
    parts = [cut[0].ljust(widths[0])]
    parts.extend(cell.rjust(width) for cell, width in zip(cut[1:], widths[1:], strict=True))
    return "  ".join(parts).rstrip()


def similarity_table(runs: Sequence[Run]) -> Table | None:
    """Return mean and variance of feature cosines, of the starting model and each method."""
    names = [f"probe/cosine_{how}{kind}" for kind in PAIRS for how in ("", "variance_")]
    rows = [(BASE_LABEL, runs, _at_start), *((n, g, _at_end) for n, g in by_name(runs).items())]
    cells = tuple(
        (label, *(number(_over(group, functools.partial(at, name=n)).mean) for n in names))
        for label, group, at in rows
    )
    if all(cell == NO_VALUE for _, *row in cells for cell in row):
        return None
    heads = [f"{words}, {how}" for words in PAIRS.values() for how in ("mean", "variance")]
    note = (
        "Cosines of the features of two positions of the probe set: in the same response, in two "
        f"responses to a prompt, in responses to two prompts. {BASE_LABEL}: the starting model; "
        "methods at their last probe, means over runs."
    )
    return Table("Cosines of features", ("features of", *heads), cells, (note,))


def by_label(runs: Sequence[Run]) -> list[tuple[str, dict[str, float]]]:
    """Return the metrics of every evaluation of `ntkrl evaluate`, with a label."""
    return [
        (f"{run.name}, seed {run.seed}: {name}", metrics)
        for run in runs
        for name, metrics in run.evaluations.items()
    ]


def best_of_table(runs: Sequence[Run]) -> Table | None:
    """Compare the best of N samples with that of the base policy (eval.base) of an evaluation."""
    evaluations = [(label, metrics) for label, metrics in by_label(runs) if _gap_counts(metrics)]
    if not evaluations:
        return None
    counts = sorted({count for _, metrics in evaluations for count in _gap_counts(metrics)})
    rows = []
    for label, metrics in evaluations:
        columns = zip(*(_best_of_cells(metrics, count) for count in counts), strict=True)
        kinds = ("before", "after", "gap")
        rows += [(f"{label}, {k}", *cells) for k, cells in zip(kinds, columns, strict=True)]
    heads = [f"{count} sample{'s' * (count > 1)}" for count in counts]
    note = (
        "Of each prompt's samples, unbiased; before: the policy of eval.base on the same prompts; "
        "gap: after − before with its 95 % bootstrap interval over prompts. Where training only "
        "sharpens what was there, the gap closes as N grows."
    )
    return Table("Best of N", ("mean largest reward of", *heads), tuple(rows), (note,))


def _gap_counts(metrics: dict[str, float]) -> list[int]:
    words = (metric.removeprefix(GAP) for metric in metrics if metric.startswith(GAP))
    return [int(word) for word in words if word.isdigit()]


def _best_of_cells(metrics: dict[str, float], count: int) -> tuple[str, str, str]:
    """Format base, policy and gap of the best of `count` samples."""
    gap, best = f"{GAP}{count}", f"diversity/best_of_{count}"
    if gap not in metrics or best not in metrics:
        return (NO_VALUE,) * 3
    low, high = (number(metrics.get(f"{gap}_{end}", math.nan)) for end in ("low", "high"))
    interval = f" ({low} to {high})"
    base = number(metrics[best] - metrics[gap])
    return base, number(metrics[best]), number(metrics[gap]) + interval
