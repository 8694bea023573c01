"""Results of a study's runs: measures by arm and seed, statistics over seeds, choice of rates.

A run of an arm and seed is in `ROOT/GROUP/ARM-SEED`; groups hold what shares a base model or a
task.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ntkrl import durable_files, intervals
from ntkrl.json_files import read_object
from ntkrl.report import Run, read_run, series, training_timings

Measure = Callable[[Run], float]
"""A number of one run."""
Point = dict[str, float]
"""Values of a grid's keys."""
DIGITS = 6
LAST_VALUES = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The runs of a study, read on first use.

    root: directory of the study.
    seeds: of the runs that are compared.
    """

    root: Path
    seeds: tuple[int, ...]
    _cache: dict[Path, Run | None] = dataclasses.field(default_factory=dict)

    def place(self, group: str, arm: str, seed: int) -> Path:
        """Return the directory of a run."""
        return self.root / group / f"{arm}-{seed}"

    def at(self, place: Path) -> Run | None:
        """Return the run of a directory, None where none has begun."""
        if place not in self._cache:
            begun = (place / "metrics.jsonl").exists()
            self._cache[place] = read_run(place) if begun else None
        return self._cache[place]

    def runs(self, group: str, arm: str) -> list[Run | None]:
        """Return the runs of an arm by seed, None where none has begun."""
        return [self.at(self.place(group, arm, seed)) for seed in self.seeds]

    def over_seeds(self, group: str, arm: str, measure: Measure) -> np.ndarray:
        """Return a measure of each seed's finished run `[seeds]`, NaN where there is none."""
        runs = self.runs(group, arm)
        return np.array([measure(r) if r is not None and r.finished else math.nan for r in runs])

    def evaluated(self, group: str, arm: str, directory: str, metric: str) -> np.ndarray:
        """Return a metric of each seed's evaluation in a directory of the run `[seeds]`."""
        values = []
        for seed in self.seeds:
            place = self.place(group, arm, seed)
            path = place / directory / "evaluations" / f"{place.name}.json"
            metrics = read_object(path) if path.exists() else {}
            values.append(math.nan if metrics.get(metric) is None else metrics[metric])
        return np.array(values, float)

    def missing(self, group: str, arm: str, seeds: Sequence[int]) -> Iterator[str]:
        """Yield an arm with missing or unfinished runs, and their seeds."""
        runs = {seed: self.at(self.place(group, arm, seed)) for seed in seeds}
        open_seeds = [str(seed) for seed, run in runs.items() if run is None or not run.finished]
        if open_seeds:
            yield f"{group} {arm}: seeds {', '.join(open_seeds)}"

    def finished(self, group: str) -> Iterator[Run]:
        """Yield every finished run below the directory of a group, whatever its arm and seed."""
        for mark in sorted((self.root / group).glob("**/finished")):
            run = self.at(mark.parent)
            if run is not None:
                yield run


def first(metric: str) -> Measure:
    """Return the measure: a metric's first value."""
    return lambda run: _value(run, metric, 0)


def last(metric: str) -> Measure:
    """Return the measure: a metric's last value."""
    return lambda run: _value(run, metric, -1)


def change(metric: str) -> Measure:
    """Return the measure: a metric's last value less its first."""
    return lambda run: _value(run, metric, -1) - _value(run, metric, 0)


def mean_of(metric: str) -> Measure:
    """Return the measure: the mean of a metric's finite values."""

    def measure(run: Run) -> float:
        values = series(run, metric)[1]
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if finite.size else math.nan

    return measure


def area(metric: str) -> Measure:
    """Return the measure: the area under a metric's curve, divided by its steps."""

    def measure(run: Run) -> float:
        steps, values = series(run, metric)
        if steps.size < 2:
            return math.nan
        return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))

    return measure


def training_seconds(run: Run, step: float = math.inf) -> float:
    """Return the wall time of training up to an optimizer step (s).

    Each step counts as its stage's median one, which leaves out compilation. Activities are those
    of `report.training_timings`.
    """
    stages = {line["step"]: line["stage"] for line in run.metrics if "stage" in line}
    spent: dict[str, list[float]] = {}
    for line in run.timings:
        if line["step"] in stages:
            seconds = sum(training_timings(line).values())
            spent.setdefault(stages[line["step"]], []).append(seconds)
    counts = {s: sum(stage == s and at <= step for at, stage in stages.items()) for s in spent}
    return float(sum(np.median(spent[stage]) * counts[stage] for stage in spent))


def at_time(run: Run, metric: str, limit: float) -> float:
    """Return a metric after `limit` seconds of training, interpolated; NaN past the run's end."""
    steps, values = series(run, metric)
    times = [training_seconds(run, step) for step in steps]
    return float(np.interp(limit, times, values)) if steps.size and limit <= times[-1] else math.nan


def mean_interval(values: np.ndarray) -> intervals.Interval | None:
    """Return the mean over seeds with its bootstrap interval; None without a value."""
    finite = values[np.isfinite(values)]
    return intervals.mean_interval(finite) if finite.size else None


def paired(first_values: np.ndarray, second_values: np.ndarray) -> intervals.Paired | None:
    """Return the test of second − first over the seeds with both; None below two."""
    both = np.isfinite(first_values) & np.isfinite(second_values)
    if both.sum() < 2:
        return None
    return intervals.paired_difference(first_values[both], second_values[both])


def grid_points(grid: Mapping[str, Sequence[float]]) -> list[Point]:
    """Return every combination of a grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def rank_points(
    points: Sequence[Point], runs: Sequence[Sequence[Run]], metric: str
) -> tuple[Point, list[Point]]:
    """Choose the point of the highest metric.

    Args:
      points: of a grid.
      runs: of each point, over tuning seeds.
      metric: a run counts with the mean of its last LAST_VALUES values.

    Returns:
      The best point, and every point with its mean over runs as "reward".
    """
    means = [
        float(np.mean([np.mean(series(run, metric)[1][-LAST_VALUES:]) for run in group]))
        for group in runs
    ]
    rows = [{**point, "reward": mean} for point, mean in zip(points, means, strict=True)]
    return points[int(np.argmax(means))], rows


def write_run_metrics(
    path: Path,
    runs: Sequence[tuple[str, str | None, Run]],
    measures: Mapping[str, Measure],
    metrics: Sequence[str],
) -> None:
    """Write a JSON line per run: its measures, and first, last and mean of each metric it has.

    Args:
      path: of the JSONL file.
      runs: name, command and run of each line.
      measures: by name.
      metrics: of the glossary.
    """
    rows = []
    for name, command, run in runs:
        row: dict[str, object] = {"run": name, "command": command}
        row |= {key: _rounded(measure(run)) for key, measure in measures.items()}
        for metric in metrics:
            values = series(run, metric)[1]
            if values.size:
                row[metric] = [_rounded(v) for v in (values[0], values[-1], values.mean())]
        rows.append(json.dumps(row) + "\n")
    durable_files.save_text(path, "".join(rows))


def _value(run: Run, metric: str, index: int) -> float:
    values = series(run, metric)[1]
    return float(values[index]) if values.size else math.nan


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
