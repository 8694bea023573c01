"""Writer of metrics.jsonl and timings.jsonl: a flushed JSON object per line.

A crash costs at most one line; a power cut, those after the last `sync`, on which a checkpoint
stands. Every metric must be in the glossary; timings have a file of their own, since runs with
equal metrics differ in them. Loggers get both.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ntkrl import durable_files
from ntkrl.report.line_record import (
    FINISHED_FILE,
    METRICS_FILE,
    TIMINGS_FILE,
    LineRecord,
    LineRecorder,
    count_objects,
    is_object,
)
from ntkrl.report.loggers import Logger
from ntkrl.report.metric_names import GLOSSARY, PATTERNS, is_known, training_timings


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
            rollout step); later lines are removed, since the run will write them again: all lines
            for a negative number. None keeps every line.
          loggers: get every line's values too, and are closed with the files.

        Raises:
          ValueError: with a resume_step ≥ 0, a line of metrics is not a JSON object with an integer
            "step"; such lines of timings are removed.
        """
        self._directory, self._loggers = Path(directory), list(loggers)
        durable_files.make_directory(self._directory)
        if (self._directory / FINISHED_FILE).exists():
            (self._directory / FINISHED_FILE).unlink()
            durable_files.sync_directory(self._directory)
        for name in (METRICS_FILE, TIMINGS_FILE):
            _trim(self._directory / name, resume_step)
        self._recorder = LineRecorder()
        self._open()
        for line in (self._directory / METRICS_FILE).read_bytes().splitlines(keepends=True):
            self._recorder.add(line)
        self._timing_lines = count_objects(self._directory / TIMINGS_FILE)

    def _open(self) -> None:
        self._metrics = (self._directory / METRICS_FILE).open("a", encoding="utf-8")
        self._timings = (self._directory / TIMINGS_FILE).open("a", encoding="utf-8")
        durable_files.sync_directory(self._directory)

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
        self._recorder.add(_write_line(self._metrics, line))
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
        self._timing_lines += 1
        timings = {f"timings/{name}": value for name, value in seconds.items()}
        self._log(step, timings | {"step_time": sum(training_timings(seconds).values())})

    def sync(self, log: Callable[[str], None]) -> LineRecord:
        """Flush all lines to the disk; return their record.

        A file that something else removed or changed is restored first, and `log` gets a sentence.

        Raises:
          OSError: a file cannot be written.
        """
        for file in (self._metrics, self._timings):
            try:
                durable_files.sync_file(file)
            except OSError as error:
                raise _write_error(file, error) from error
        record = self._recorder.record(self._timing_lines)
        if not self._is_intact():
            path = self._directory / METRICS_FILE
            log(
                f"{path} was removed, replaced or changed by something else while the run wrote "
                f"it; its {record.lines} lines are written again"
            )
            self._close_files()
            with durable_files.replacing(path) as replacement:
                replacement.write(record.content())
            self._open()
        return record

    def _is_intact(self) -> bool:
        try:
            status = (self._directory / METRICS_FILE).stat()
        except FileNotFoundError:
            return False
        same_file = os.path.samestat(status, os.fstat(self._metrics.fileno()))
        return same_file and status.st_size == self._recorder.size

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.write(step, values)

    def close(self, failed: bool = False) -> None:
        """Close files and loggers, which get `failed`; closing twice is allowed."""
        self._close_files()
        while self._loggers:
            self._loggers.pop().close(failed)

    def _close_files(self) -> None:
        for file in (self._metrics, self._timings):
            with contextlib.suppress(OSError):  # of the failed write reported before
                file.close()

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

    def sync(self, log: Callable[[str], None]) -> None:
        """Do nothing."""


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


def _write_line(file: TextIO, line: Mapping[str, Any]) -> bytes:
    # One write per line: a kill in between leaves complete lines.
    text = json.dumps(line, allow_nan=False) + "\n"
    try:
        file.write(text)
        file.flush()
    except OSError as error:
        raise _write_error(file, error) from error
    return text.encode()


def _write_error(file: TextIO, error: OSError) -> OSError:
    return OSError(
        f"{file.name} cannot be written: {error.strerror}; free disk space and run the same "
        "command again: it resumes from the last checkpoint."
    )


def _trim(path: Path, resume_step: int | None) -> None:
    """Keep the complete lines up to `resume_step` (all for None), byte for byte."""
    if not path.exists():
        return
    before = path.read_bytes()
    lines = before.split(b"\n")
    if resume_step is not None and resume_step < 0:
        lines = []
    elif not is_object(lines[-1]):  # empty after a newline, or cut short; else it lost its newline
        lines.pop()
    if resume_step is not None:
        if path.name == TIMINGS_FILE:
            lines = list(filter(_has_step, lines))
        lines = [
            line for number, line in enumerate(lines, 1) if _step(path, number, line) <= resume_step
        ]
    after = b"".join(line + b"\n" for line in lines)
    if after != before:
        with durable_files.replacing(path) as file:
            file.write(after)


def _has_step(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return _step(Path(TIMINGS_FILE), 0, line) is not None
    return False


def _step(path: Path, number: int, line: bytes) -> int:
    """Return the rollout step of a line, or its step where it names none."""
    try:
        values = json.loads(line)
        return int(values["rollout_step" if "rollout_step" in values else "step"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with an integer step, got "
            f"{line[:60]!r}; remove the line to resume"
        ) from error
