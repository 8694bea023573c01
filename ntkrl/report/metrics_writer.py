"""Writer of metrics.jsonl and timings.jsonl: a flushed JSON object per line.

A crash costs at most one line. Every metric must be in the glossary; timings have a file of their
own, since runs with equal metrics differ in them. Loggers get both.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ntkrl.report.loggers import Logger
from ntkrl.report.metric_names import GLOSSARY, PATTERNS, is_known, training_timings

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
FINISHED_FILE = "finished"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `timings.jsonl` of a run directory, and logs to loggers."""

    def __init__(
        self,
        directory: str | os.PathLike,
        resume_step: int | None = None,
        loggers: Sequence[Logger] = (),
    ):
        """Open the files for appending; create the directory if needed.

        A truncated last line is removed, and so is the file that marks a finished run.

        Args:
          directory: the run directory.
          resume_step: rollout steps of the restored state (optimizer steps for lines without a
            rollout step); later lines are removed, since the run will write them again. None keeps
            every line.
          loggers: get every line's values too, and are closed with the files.

        Raises:
          ValueError: with a resume_step, a line is not a JSON object with an integer "step".
        """
        self._directory, self._loggers = Path(directory), list(loggers)
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / FINISHED_FILE).unlink(missing_ok=True)
        for name in (METRICS_FILE, TIMINGS_FILE):
            _trim(self._directory / name, resume_step)
        self._metrics = (self._directory / METRICS_FILE).open("a", encoding="utf-8")
        self._timings = (self._directory / TIMINGS_FILE).open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line of metrics.

        Args:
          step: optimizer steps taken, all stages together.
          values: a number per name of the glossary or its patterns, a text for "stage"; NaN and
            infinities become null.

        Raises:
          ValueError: a name is not known, or "step" is among the values.
        """
        _check_names(values)
        line: dict[str, Any] = {"step": int(step)}
        for name, value in values.items():
            line[name] = str(value) if name == "stage" else _number(value)
        _write_line(self._metrics, line)
        self._log(step, values)

    def write_timings(
        self, step: int, seconds: Mapping[str, float], rollout_step: int | None = None
    ) -> None:
        """Append one line of timings.

        Args:
          step: optimizer steps taken, all stages together.
          seconds: seconds spent per activity; names are free but end in `_seconds`.
          rollout_step: rollout steps taken; distinguishes rollout steps without an update.

        Raises:
          ValueError: a name does not end in `_seconds`.
        """
        wrong = [name for name in seconds if not name.endswith("_seconds")]
        if wrong:
            raise ValueError(f"timings are named <activity>_seconds, got {', '.join(wrong)}")
        line: dict[str, Any] = {"step": int(step)}
        if rollout_step is not None:
            line["rollout_step"] = int(rollout_step)
        _write_line(self._timings, line | {n: _number(value) for n, value in seconds.items()})
        timings = {f"timings/{name}": value for name, value in seconds.items()}
        self._log(step, timings | {"step_time": sum(training_timings(seconds).values())})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.write(step, values)

    def close(self, failed: bool = False) -> None:
        """Close files and loggers, which get `failed`; closing twice is allowed."""
        for file in (self._metrics, self._timings):
            with contextlib.suppress(OSError):  # of the failed write reported before
                file.close()
        while self._loggers:
            self._loggers.pop().close(failed)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.close(failed=kind is not None)


class NoWriter(contextlib.nullcontext):
    """A MetricsWriter that writes nothing, for processes other than the writer."""

    def __enter__(self) -> NoWriter:
        return self

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write nothing."""

    def write_timings(self, step: int, seconds: Mapping[str, float], rollout_step: int) -> None:
        """Write nothing."""


def mark_finished(directory: str | os.PathLike) -> None:
    """Write the empty file that marks a run directory as finished."""
    (Path(directory) / FINISHED_FILE).touch()


def _check_names(names: Iterable[str]) -> None:
    """Raise for all unknown names at once."""
    if "step" in names:
        raise ValueError('"step" is a separate argument and must not be among the values')
    problems = []
    for name in names:
        if is_known(name):
            continue
        near = difflib.get_close_matches(name, GLOSSARY, n=1)
        problems.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if problems:
        raise ValueError(
            f"unknown metric {', '.join(problems)}: add it to "
            "ntkrl/report/metrics.toml with its unit and meaning, or use one of "
            f"the patterns {', '.join(PATTERNS)}"
        )


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _write_line(file: TextIO, line: Mapping[str, Any]) -> None:
    # One write per line: a kill in between leaves complete lines.
    try:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        raise OSError(
            f"{file.name} cannot be written: {error.strerror}; free disk space and run the same "
            "command again: it resumes from the last checkpoint."
        ) from error


def _trim(path: Path, resume_step: int | None) -> None:
    """Keep the complete lines up to `resume_step` (all for None), byte for byte."""
    if not path.exists():
        return
    before = path.read_bytes()
    lines = before.split(b"\n")
    if not _is_object(lines[-1]):  # empty after a newline, or truncated; else it lost its newline
        lines.pop()
    if resume_step is not None:
        lines = [
            line for number, line in enumerate(lines, 1) if _step(path, number, line) <= resume_step
        ]
    after = b"".join(line + b"\n" for line in lines)
    if after == before:
        return
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _step(path: Path, number: int, line: bytes) -> int:
    """Return the rollout step of a line, or its step where it names none."""
    try:
        values = json.loads(line)
        return int(values["rollout_step" if "rollout_step" in values else "step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with an integer step, got "
            f"{line[:60]!r}; remove the line to resume"
        ) from error
