"""What a study's runs found: numbers by arm and seed, and statistics over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import intervals
from ntkrl.report import Run, read_arrays, read_run, series, step_files
from ntkrl.study.plan import StudySettings

TRAINING = ("sample", "reward", "score", "update", "data")
"""Activities that a run's wall time is made of; evaluations and probes are not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The run directories of a study, read as they are asked for."""

    study: StudySettings
    held: dict[Path, Run | None] = dataclasses.field(default_factory=dict)

    def run(self, size: str, arm: str, seed: int) -> Run | None:
        """Return a run, None where there is none that has begun."""
        return self.at(self.study.place(size, arm, seed))

    def at(self, place: Path) -> Run | None:
        """Return the run of a directory, None where none has begun."""
        if place not in self.held:
            begun = (place / "metrics.jsonl").exists()
            self.held[place] = read_run(place) if begun else None
        return self.held[place]

    def over_seeds(self, size: str, arm: str, measure: Callable[[Run], float]) -> np.ndarray:
        """Return a number of each seed's finished run `[seeds]`, NaN where there is none."""
        runs = [self.run(size, arm, seed) for seed in self.study.seeds]
        done = [run if run is not None and run.finished else None for run in runs]
        return np.array([math.nan if run is None else measure(run) for run in done])

    def told(self, size: str, arm: str, name: str, file: str) -> np.ndarray:
        """Return a metric of each seed's evaluation `[seeds]`: `{arm}-{seed}/FILE/evaluations`."""
        found = []
        for seed in self.study.seeds:
            place = self.study.place(size, arm, seed)
            path = place / file / "evaluations" / f"{place.name}.json"
            value = _json(path)[name] if path.exists() else None
            found.append(math.nan if value is None else value)
        return np.array(found, float)

    @property
    def missing(self) -> list[str]:
        """Runs that are not there or not finished, in words."""
        lost = []
        for size in self.study.sizes:
            for arm in self.study.arms[size]:
                if arm.startswith("sgd"):
                    continue
                seeds = [s for s in self.study.seeds if not _finished(self.run(size, arm, s))]
                if seeds:
                    lost.append(f"{size} {arm}: seeds {', '.join(map(str, seeds))}")
        return lost


def first(name: str) -> Callable[[Run], float]:
    """Return the measure of a run: a metric's first value."""
    return lambda run: _at(run, name, 0)


def last(name: str) -> Callable[[Run], float]:
    """Return the measure of a run: a metric's last value."""
    return lambda run: _at(run, name, -1)


def change(name: str) -> Callable[[Run], float]:
    """Return the measure of a run: a metric's last value less its first."""
    return lambda run: _at(run, name, -1) - _at(run, name, 0)


def mean_of(name: str) -> Callable[[Run], float]:
    """Return the measure of a run: the mean of a metric over steps."""
    return lambda run: _mean(series(run, name)[1])


def area(run: Run) -> float:
    """Return the mean of the held-out reward over the steps of a run: area under its curve."""
    steps, values = series(run, "eval/reward")
    if steps.size < 2:
        return math.nan
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def seconds(run: Run, step: float) -> float:
    """Return the wall time of training up to an optimizer step (s).

    Of each stage the median step counts, so that compiling does not.
    """
    stages = {line["step"]: line["stage"] for line in run.metrics if "stage" in line}
    spent: dict[str, list[float]] = {}
    for line in run.timings:
        if line["step"] in stages:
            told = [line[n] for a in TRAINING if (n := f"{a}_seconds") in line]
            spent.setdefault(stages[line["step"]], []).append(sum(told))
    counts = {s: sum(1 for at, own in stages.items() if own == s and at <= step) for s in spent}
    return float(sum(np.median(spent[stage]) * counts[stage] for stage in spent))


def reward_at(run: Run, limit: float) -> float:
    """Return the held-out reward after so many seconds of training, between evaluations linearly.

    NaN where the run ended before.
    """
    steps, values = series(run, "eval/reward")
    times = [seconds(run, step) for step in steps]
    return float(np.interp(limit, times, values)) if steps.size and limit <= times[-1] else math.nan


def mean_interval(values: np.ndarray) -> intervals.Interval | None:
    """Return the mean over seeds with its bootstrap interval; None without a value."""
    held = values[np.isfinite(values)]
    return intervals.mean_interval(held) if held.size else None


def paired(one: np.ndarray, other: np.ndarray) -> intervals.Paired | None:
    """Return the test of other − one over the seeds both have; None below two."""
    both = np.isfinite(one) & np.isfinite(other)
    return intervals.paired_difference(one[both], other[both]) if both.sum() > 1 else None


def entropy_shares(run: Run) -> tuple[float, float]:
    """Return the change of the probe's entropy in the accounted steps by R and by the rest.

    Every column of a ledger (samples, momentum, decay) has a part of the head's role (R) and of the
    others (G); mean over probe tokens, summed over steps (nats).
    """
    head = body = 0.0
    for _, path in step_files(run.path / "ledger", ".npz"):
        arrays = read_arrays(path)
        for name, value in ({} if arrays is None else arrays).items():
            if not name.startswith("entropy/") or name.count("/") != 2:
                continue
            amount = float(np.sum(value) / value.shape[0])
            if name.endswith("/head"):
                head += amount
            else:
                body += amount
    return head, body


def head_part(run: Run) -> float:
    """Return R's share of the first-order change of the entropy, NaN where there is no ledger."""
    head, body = entropy_shares(run)
    return head / (head + body) if head + body else math.nan


def _at(run: Run, name: str, place: int) -> float:
    values = series(run, name)[1]
    return float(values[place]) if values.size else math.nan


def _mean(values: Sequence[float] | np.ndarray) -> float:
    held = np.asarray(values, float)
    held = held[np.isfinite(held)]
    return float(held.mean()) if held.size else math.nan


def _finished(run: Run | None) -> bool:
    return run is not None and run.finished


def _json(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
