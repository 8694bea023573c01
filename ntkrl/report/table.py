"""The comparison in numbers: one row for the starting model and one per method.

Means and standard deviations (n − 1 in the denominator) are over the runs of one name.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np

from ntkrl.report.names import NOT_TRAINING
from ntkrl.report.runs import Run, by_name, series, stage_ends

MAX_COLUMNS = 100
BASE_LABEL = "base"


@dataclasses.dataclass(frozen=True)
class Stat:
    """Mean over runs, their standard deviation (NaN below two runs) and how many had a value."""

    mean: float
    sd: float
    count: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One method, or the starting model.

    label: name of the method, or "base".
    runs: how many runs it is about.
    unfinished: how many of them did not end normally.
    end_steps: steps of the last evaluations, rising, without repetition.
    noise: standard deviation of eval/reward over repeated samplings of the starting models.
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
    unfinished: int
    end_steps: tuple[int, ...]
    noise: float
    reward_start: Stat
    reward_end: Stat
    gain: float
    pass_at_k: Stat
    distinct: Stat
    entropy_start: Stat
    entropy: Stat
    confidence_start: Stat
    confidence: Stat
    head_share: Stat
    correlation: Stat
    seconds: Stat


def summary_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    """Compute the rows of the table.

    Args:
      runs: any runs, in any order.

    Returns:
      The base row, which is the step-0 evaluation over all runs, then one row per method in
      the order of their names. What no run holds is NaN.
    """
    noise = _over(runs, lambda run: _at_start(run, "eval/reward_sd")).mean
    rows = [_base_row(runs, noise)]
    rows.extend(_method_row(name, group, noise) for name, group in by_name(runs).items())
    return tuple(rows)


def format_table(runs: Sequence[Run]) -> str:
    """Format the rows for a terminal.

    Args:
      runs: any runs, in any order.

    Returns:
      Lines of at most 100 characters: the table, then what its columns mean and its caveats.
    """
    rows = summary_rows(runs)
    cells = [[column.cell(row) for column in COLUMNS] for row in rows]
    heads = [[column.head[line] for column in COLUMNS] for line in (0, 1)]
    widths = [max(len(line[index]) for line in heads + cells) for index in range(len(COLUMNS))]
    # The label gives way: it is the only cell whose length the user chooses.
    room = MAX_COLUMNS - sum(widths[1:]) - 2 * (len(COLUMNS) - 1)
    widths[0] = min(widths[0], room)
    lines = [_join(line, widths) for line in heads]
    lines.append("-" * min(MAX_COLUMNS, sum(widths) + 2 * (len(widths) - 1)))
    lines.extend(_join(line, widths) for line in cells)
    return "\n".join([*lines, "", *_wrap(table_notes(rows))]) + "\n"


def table_notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return what a reader of the table must know, in sentences."""
    notes = [
        "end: last evaluation; ± sd over runs (n); Δ/noise: (end − start) / noise, noise = sd of "
        "eval reward over repeated samplings of the starting model.",
        "R share and corr.: means over the probed steps of the last stage; train s: without "
        "probes and evaluations.",
    ]
    ends = {row.label: row.end_steps for row in rows[1:]}
    if len(set(ends.values())) > 1 or any(len(steps) > 1 for steps in ends.values()):
        told = [f"{label} at step {_or(steps)}" for label, steps in ends.items() if steps]
        notes.append(f"The last evaluations are at different steps: {'; '.join(told)}.")
    open_runs = [f"{row.label} {row.unfinished} of {row.runs}" for row in rows if row.unfinished]
    if open_runs:
        notes.append(f"* runs that are not finished: {', '.join(open_runs)}.")
    starts = [row.reward_start.mean for row in rows[1:] if math.isfinite(row.reward_start.mean)]
    # Six standard deviations apart, equal starting models would be a very rare accident.
    if starts and max(starts) - min(starts) > 6 * rows[0].noise:
        notes.append("The starting evaluations differ by more than noise: not one base model?")
    return tuple(notes)


def number(value: float) -> str:
    """Write a number in at most six characters where that is possible; "–" for none."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, digits in ((9.9995, 3), (99.995, 2), (999.95, 1), (99999.5, 0)):
        if size < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0e}"


def spread(stat: Stat) -> str:
    """Write a mean with its standard deviation, where there is one."""
    if not math.isfinite(stat.sd):
        return number(stat.mean)
    return f"{number(stat.mean)} ± {number(stat.sd)}"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: a head of two short lines, a title for the page, and its cell."""

    head: tuple[str, str]
    title: str
    cell: Callable[[Row], str]


def _end_cell(row: Row) -> str:
    if row.label == BASE_LABEL and not row.end_steps:
        return f"± {number(row.noise)} noise"
    return spread(row.reward_end)


def _signed(value: float) -> str:
    """Write a multiple of the noise with its sign; digits beyond the first say nothing."""
    return f"{value:+.1f}" if math.isfinite(value) else number(value)


def _or(steps: Sequence[int]) -> str:
    return " or ".join(str(step) for step in steps)


COLUMNS: tuple[Column, ...] = (
    Column(("", "method"), "method", lambda row: row.label + ("*" if row.unfinished else "")),
    Column(("", "n"), "runs", lambda row: str(row.runs)),
    Column(("reward", "start"), "eval reward, start", lambda row: number(row.reward_start.mean)),
    Column(("reward", "end ± sd"), "eval reward, end ± sd", _end_cell),
    Column(("Δ/", "noise"), "Δ in units of noise", lambda row: _signed(row.gain)),
    Column(("pass", "@k"), "pass@k", lambda row: number(row.pass_at_k.mean)),
    Column(("dis-", "tinct"), "distinct solutions", lambda row: number(row.distinct.mean)),
    Column(("ent-", "ropy"), "probe entropy, nats", lambda row: number(row.entropy.mean)),
    Column(("confi-", "dence"), "probe confidence", lambda row: number(row.confidence.mean)),
    Column(("R", "share"), "R share, last stage", lambda row: number(row.head_share.mean)),
    Column(("pred.", "corr."), "prediction correlation", lambda r: number(r.correlation.mean)),
    Column(("train", "s"), "training, s", lambda row: number(row.seconds.mean)),
)


def _base_row(runs: Sequence[Run], noise: float) -> Row:
    none = Stat(math.nan, math.nan, 0)

    def start(name: str) -> Stat:
        return _over(runs, lambda run: _at_start(run, name))

    return Row(
        label=BASE_LABEL,
        runs=len(runs),
        unfinished=0,
        end_steps=(),
        noise=noise,
        reward_start=start("eval/reward"),
        reward_end=none,
        gain=math.nan,
        pass_at_k=start("eval/pass@k"),
        distinct=start("eval/distinct_solutions"),
        entropy_start=start("probe/entropy"),
        entropy=start("probe/entropy"),
        confidence_start=start("probe/confidence"),
        confidence=start("probe/confidence"),
        head_share=none,
        correlation=none,
        seconds=none,
    )


def _method_row(name: str, runs: Sequence[Run], noise: float) -> Row:
    def start(metric: str) -> Stat:
        return _over(runs, lambda run: _at_start(run, metric))

    def end(metric: str) -> Stat:
        return _over(runs, lambda run: _at_end(run, metric))

    def late(metric: str) -> Stat:
        return _over(runs, lambda run: _last_stage_mean(run, metric))

    gain = _over(runs, lambda run: _at_end(run, "eval/reward") - _at_start(run, "eval/reward"))
    ends = {int(steps[-1]) for steps, _ in (series(r, "eval/reward") for r in runs) if steps.size}
    return Row(
        label=name,
        runs=len(runs),
        unfinished=sum(not run.finished for run in runs),
        end_steps=tuple(sorted(ends)),
        noise=noise,
        reward_start=start("eval/reward"),
        reward_end=end("eval/reward"),
        gain=gain.mean / noise if noise > 0 else math.nan,
        pass_at_k=end("eval/pass@k"),
        distinct=end("eval/distinct_solutions"),
        entropy_start=start("probe/entropy"),
        entropy=end("probe/entropy"),
        confidence_start=start("probe/confidence"),
        confidence=end("probe/confidence"),
        head_share=late("predict/head_share"),
        correlation=late("predict/correlation"),
        seconds=_over(runs, _training_seconds),
    )


def _over(runs: Sequence[Run], value: Callable[[Run], float]) -> Stat:
    """Mean and standard deviation over the runs whose value is finite."""
    values = [value(run) for run in runs]
    values = [item for item in values if math.isfinite(item)]
    if not values:
        return Stat(math.nan, math.nan, 0)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Stat(float(np.mean(values)), sd, len(values))


def _at_start(run: Run, name: str) -> float:
    steps, values = series(run, name)
    return float(values[0]) if steps.size and steps[0] == 0 else math.nan


def _at_end(run: Run, name: str) -> float:
    """Return the last value, provided that it is not the one of the starting model."""
    steps, values = series(run, name)
    return float(values[-1]) if steps.size and steps[-1] > 0 else math.nan


def _last_stage_mean(run: Run, name: str) -> float:
    steps, values = series(run, name)
    ends = stage_ends(run)
    after = ends[-1][1] if ends else -1
    late = values[(steps > after) & np.isfinite(values)]
    return float(late.mean()) if late.size else math.nan


def _training_seconds(run: Run) -> float:
    """Sum over all activities but probing and evaluating; NaN when nothing was timed."""
    spent = [
        seconds
        for line in run.timings
        for name, seconds in line.items()
        if name.endswith("_seconds") and name not in NOT_TRAINING and seconds is not None
    ]
    return float(sum(spent)) if spent else math.nan


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align the label left and numbers right, and cut what is too long."""
    cut = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(cells, widths, strict=True)]
    parts = [cut[0].ljust(widths[0])]
    parts.extend(cell.rjust(width) for cell, width in zip(cut[1:], widths[1:], strict=True))
    return "  ".join(parts).rstrip()


def _wrap(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, MAX_COLUMNS)]
