"""Every run of a study on a line: its command and the metrics that its claims read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntkrl import runtime
from ntkrl.evaluation import powers
from ntkrl.report import Run, series
from ntkrl.study import results as found
from ntkrl.study.plan import StudySettings
from ntkrl.study.results import Results

METRICS = (  # and best of N, at every N
    *("eval/reward", "eval/distinct_completions", "reward", "loss"),
    *("probe/confidence", "probe/entropy", "probe/head_norm", "probe/feature_distortion_relative"),
    *("probe/cosine_within_response", "probe/cosine_across_responses"),
    *("probe/cosine_across_prompts", "predict/correlation", "predict/relative_error"),
    *("predict/head_share", "diversity/distinct_answers"),
    *(f"diversity/support_{word}" for word in ("kept", "lost", "gained")),
)
DIGITS = 6
PLACE = re.compile(r"--config=[^:]+:(\w+)/(\w+),seed=(\d+)")


def write_summaries(results: Results) -> Path:
    """Write `runs.jsonl`: of each finished run its command, and of each metric first, last, mean.

    Args:
      results: the runs, those that rates were chosen by among them.

    Returns:
      The file.
    """
    study = results.study
    words, rows = _commands(study), []
    names = (*METRICS, *(f"diversity/best_of_{n}" for n in powers(study.samples)))
    for place, run in _finished(results):
        told: dict[str, Any] = {"run": str(place.relative_to(study.root))}
        told |= {"command": words.get(place), "seconds": _digits(found.seconds(run, math.inf))}
        told["head_share"] = _digits(found.head_part(run))
        for name in names:
            values = series(run, name)[1]
            if values.size:
                ends = float(values[0]), float(values[-1]), float(values.mean())
                told[name] = [_digits(value) for value in ends]
        rows.append(json.dumps(told))
    path = study.root / "runs.jsonl"
    runtime.save_text(path, "".join(row + "\n" for row in rows))
    return path


def _finished(results: Results) -> Iterator[tuple[Path, Run]]:
    for size in results.study.sizes:
        for mark in sorted((results.study.root / size).glob("**/finished")):
            run = results.at(mark.parent)
            if run is not None:
                yield mark.parent, run


def _commands(study: StudySettings) -> dict[Path, str]:
    """Return the trainings that were started, by directory."""
    path, told = study.root / "commands.txt", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        named, moved = PLACE.search(line), re.search(r"--config\.run_dir=(\S+)", line)
        if named and line.startswith("ntkrl train"):
            size, arm, seed = named.groups()
            told[Path(moved[1]) if moved else study.place(size, arm, int(seed))] = line
    return told


def _digits(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
