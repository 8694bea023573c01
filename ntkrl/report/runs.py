"""Run directories of finished, running or crashed runs, read into frozen records.

Imports numpy, the standard library and this room only, so that a report can be built on any
machine. Missing parts are named in notes and never filled in.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import directory_kinds
from ntkrl.json_files import parse_json, read_object
from ntkrl.report.line_record import METRICS_FILE, TIMINGS_FILE, finished_problems
from ntkrl.report.metric_names import is_known
from ntkrl.report.records import (
    ProbeTexts,
    StepLedger,
    read_ledgers,
    read_probes,
    read_starts,
    read_texts,
)

PROBE_METRICS = ("probe/", "predict/", "ledger/")
"""Prefixes of metrics that are measured on the probe set."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Contents of one run directory.

    path: the directory.
    name: label of the method, from the config; runs of one name differ in the seed.
    seed: from the config.
    config: the complete config.
    metrics, timings: lines of metrics.jsonl and timings.jsonl in file order.
    texts: the probe set as text, None in older runs.
    probes: per step, arrays `[O]` over probe tokens, and `cosines` `[S, S]`.
    ledgers: by step.
    evaluations: metrics of `ntkrl evaluate`, by name of the evaluation.
    finished: whether the run ended normally.
    notes: missing or unusable parts, in words.
    starts: command, versions and machine of each start, as JSON objects; none in older runs.
    """

    path: Path
    name: str
    seed: int
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    texts: ProbeTexts | None
    probes: dict[int, dict[str, np.ndarray]]
    ledgers: dict[int, StepLedger]
    evaluations: dict[str, dict[str, float]]
    finished: bool
    notes: tuple[str, ...]
    starts: tuple[dict[str, Any], ...] = ()


def read_run(path: str | os.PathLike) -> Run:
    """Read one run directory.

    Args:
      path: the directory a training run wrote.

    Returns:
      The Run; `notes` name what a running or crashed run lacks.

    Raises:
      ValueError: the path is not a run directory, or its config has no name or seed.
    """
    path = Path(path)
    config = _read_config(path)
    metrics, metric_notes = _read_lines(path / METRICS_FILE)
    timings, timing_notes = _read_lines(path / TIMINGS_FILE)
    texts, text_notes = read_texts(path)
    probes, probe_notes = read_probes(path, texts)
    ledgers, ledger_notes = read_ledgers(path, texts)
    evaluations, evaluation_notes = _read_evaluations(path / "evaluations")
    starts, start_notes = read_starts(path)
    problems = finished_problems(path, exports=False)
    notes = [*metric_notes, *_content_notes(metrics), *timing_notes, *text_notes]
    notes += [*probe_notes, *ledger_notes, *evaluation_notes, *start_notes]
    if problems:
        damages = f"marked as finished, but {'; '.join(problems)}; run its command again to mend it"
        notes.insert(0, damages)
    elif problems is None:
        last = max((line["step"] for line in metrics), default=0)
        notes.insert(0, f"not finished: still running or stopped; last step seen is {last}")
    return Run(
        path=path,
        name=str(config["name"]),
        seed=int(config["seed"]),
        config=config,
        metrics=metrics,
        timings=timings,
        texts=texts,
        probes=probes,
        ledgers=ledgers,
        evaluations=evaluations,
        finished=problems == [],
        notes=tuple(notes),
        starts=starts,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a run's metrics."""
    return _read_lines(path / METRICS_FILE)[0]


def read_runs(paths: Sequence[str | os.PathLike]) -> tuple[Run, ...]:
    """Read several run directories, in the order of `ordered`.

    Args:
      paths: run directories in any order.

    Returns:
      The runs.

    Raises:
      ValueError: no path, a repeated path, or a path that is not a run directory.
    """
    if not paths:
        raise ValueError("no run directories were given; name at least one")
    resolved = [Path(path).resolve() for path in paths]
    repeated = sorted({str(path) for path in resolved if resolved.count(path) > 1})
    if repeated:
        raise ValueError(f"run directories given more than once: {', '.join(repeated)}")
    return ordered([read_run(path) for path in paths])


def ordered(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Sort by name, then seed, then directory, independent of the file system's order."""
    return tuple(sorted(runs, key=lambda run: (run.name, run.seed, str(run.path))))


def by_name(runs: Sequence[Run]) -> dict[str, tuple[Run, ...]]:
    """Group runs by method; methods and seeds in the order of `ordered`."""
    groups: dict[str, tuple[Run, ...]] = {}
    for run in ordered(runs):
        groups[run.name] = (*groups.get(run.name, ()), run)
    return groups


def mean_words(averaged: Sequence[Any]) -> str:
    """Return ", mean of N runs" for several runs, or what is averaged over them, else ""."""
    return f", mean of {len(averaged)} runs" if len(averaged) > 1 else ""


def groups_with(runs: Sequence[Run], value: Callable[[Run], Any]) -> dict[str, list[Any]]:
    """Return each method's truthy values of its runs; methods without any are left out."""
    groups = {
        name: [v for run in group if (v := value(run))] for name, group in by_name(runs).items()
    }
    return {name: values for name, values in groups.items() if values}


def comparable(runs: Sequence[Run]) -> tuple[tuple[Run, ...], str]:
    """Drop probe measurements of runs that were probed on different tokens.

    Args:
      runs: any runs.

    Returns:
      runs: the same, without probes, ledgers and the metrics of probe tokens where digests of
        their probe sets differ.
      refusal: the runs of each probe set, in words; "" where the sets are equal.
    """
    digests: dict[str, list[str]] = {}
    for run in ordered(runs):
        if run.texts is not None:
            digests.setdefault(run.texts.digest, []).append(run.path.name)
    if len(digests) < 2:
        return tuple(runs), ""
    sets = "; ".join(f"{', '.join(names)}: set {digest}" for digest, names in digests.items())
    refusal = (
        f"Refused: comparing these runs on their probe sets, since they were probed on different "
        f"tokens ({sets}). Figures, columns and tests of probe tokens are left out."
    )
    return tuple(_without_probes(run) for run in runs), refusal


def _without_probes(run: Run) -> Run:
    metrics = [
        {name: value for name, value in line.items() if not name.startswith(PROBE_METRICS)}
        for line in run.metrics
    ]
    return dataclasses.replace(run, metrics=metrics, probes={}, ledgers={})


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return one metric over steps.

    Args:
      run: the run.
      name: a numeric name of the glossary.

    Returns:
      steps: `[n]` int, rising; only steps at which the metric was written.
      values: `[n]` float64, NaN where it was not finite. A step written twice counts once,
        with the value written last.

    Raises:
      ValueError: the name is not known or has no numbers.
    """
    if not is_known(name) or name == "stage":
        raise ValueError(f"{name!r} is not a numeric metric of the glossary")
    values_by_step = {line["step"]: line[name] for line in run.metrics if name in line}
    steps = sorted(values_by_step)
    values = [math.nan if (v := values_by_step[step]) is None else float(v) for step in steps]
    return np.array(steps, dtype=int), np.array(values, dtype=float)


def stage_ends(run: Run) -> tuple[tuple[str, int], ...]:
    """Return (name, last step) of every stage but the current or last one.

    The stages are those in the metrics, or those of the config where the metrics name none.
    """
    labelled = [(line["step"], line["stage"]) for line in run.metrics if "stage" in line]
    labelled = [(step, stage) for step, stage in sorted(labelled) if step > 0]
    if labelled:
        pairs = zip(labelled, labelled[1:], strict=False)
        return tuple((str(stage), step) for (step, stage), (_, after) in pairs if stage != after)
    ends, total = [], 0
    for stage in run.config.get("stages", ())[:-1]:
        if stage["steps"] is None:  # in epochs: the number of prompts decides
            break
        total += int(stage["steps"])
        ends.append((str(stage["name"]), total))
    return tuple(ends)


def _read_config(path: Path) -> dict[str, Any]:
    expected = (
        "expected a directory with config.json (with a name and a seed) and metrics.jsonl, as "
        "training writes it"
    )
    file = path / "config.json"
    if not path.is_dir():
        wrong = "is a file, not a directory" if path.is_file() else "is not a directory"
        hint = directory_kinds.nearest(path, directory_kinds.is_run)
        raise ValueError(f"{path} {wrong}{hint or f'; {expected}'}")
    if directory_kinds.is_model(path):
        raise ValueError(f"{path} {directory_kinds.not_a_run(path)}")
    if not file.is_file():
        raise ValueError(f"{path} is not a run directory, it has no config.json; {expected}")
    try:
        config = read_object(file, finite=False)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); {expected}") from error
    missing = [key for key in ("name", "seed") if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{file} has no {' and no '.join(missing)}; {expected}")
    return config


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the valid lines of a JSONL file, with a note for each other line."""
    if not path.exists():
        return [], [f"no {path.name}"]
    lines, notes = [], []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = parse_json(text, finite=False)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number == len(texts):  # no newline after it
            notes.append(f"the last line of {path.name} is cut short and was left out")
        else:
            notes.append(f"line {number} of {path.name} cannot be read and was left out")
    return lines, notes


def _content_notes(metrics: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    if not any("eval/reward" in line for line in metrics):
        notes.append("no held-out evaluation (eval/reward)")
    elif not any("eval/reward" in line and line["step"] == 0 for line in metrics):
        notes.append("no held-out evaluation of the starting model (eval/reward at step 0)")
    if not any("predict/head_share" in line for line in metrics):
        notes.append("no predicted changes (predict/…)")
    counts = Counter(
        name
        for line in metrics
        for name, value in line.items()
        if value is None or (isinstance(value, float) and not math.isfinite(value))
    )
    notes.extend(f"{name} is not finite at {count} steps" for name, count in sorted(counts.items()))
    return notes


def _read_evaluations(directory: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Read the metrics in `NAME.json`; `NAME.rewards.json` holds none."""
    evaluations, notes = {}, []
    for path in sorted(directory.glob("*.json")):
        if path.name.endswith(".rewards.json"):
            continue
        try:
            metrics = read_object(path)
            evaluations[path.stem] = {
                name: math.nan if metrics[name] is None else float(metrics[name])
                for name in sorted(metrics)
            }
        except (OSError, ValueError, TypeError):
            notes.append(f"evaluations/{path.name} cannot be read and was left out")
    return evaluations, notes
