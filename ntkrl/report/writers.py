"""Writing a run directory: one JSON object per line, flushed, so that a crash costs one line.

Imports the standard library and this room only. Every name must be in the glossary, so a report
can say what it means; timings are apart since two runs with equal metrics differ in them. Loggers
get both.
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
from ntkrl.report.names import FAMILIES, GLOSSARY, NOT_TRAINING, is_known

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
FINISHED_FILE = "finished"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `timings.jsonl` of one run directory, and tells loggers."""

    def __init__(
        self,
        directory: str | os.PathLike,
        resume_step: int | None = None,
        loggers: Sequence[Logger] = (),
    ):
        """Open the files for appending; create the directory when there is none.

        A last line that a crash cut short is removed, and so is the mark of a finished run:
        a run that is being written is not finished.

        Args:
          directory: the run directory.
          resume_step: rollout steps the restored state has taken (optimizer steps for lines
            that name no rollout step); lines of later ones are removed first, since the run will
            write them again. None keeps every line.
          loggers: get every line's values too, and are closed with the files.

        Raises:
          ValueError: a line to be looked at is not a JSON object with an integer "step".
        """
        self._directory, self._loggers = Path(directory), list(loggers)
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / FINISHED_FILE).unlink(missing_ok=True)
        for name in (METRICS_FILE, TIMINGS_FILE):
            _trim(self._directory / name, resume_step)
        self._metrics = _append_to(self._directory / METRICS_FILE)
        self._timings = _append_to(self._directory / TIMINGS_FILE)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line of metrics.

        Args:
          step: optimizer steps taken, all stages together.
          values: a number per name of the glossary or its families; "stage" takes a text.
            NaN and infinities, which JSON does not have, become null.

        Raises:
          ValueError: a name is not known, or "step" is among the values.
        """
        _check_names(values)
        line = {"step": int(step)}
        for name, value in values.items():
            line[name] = str(value) if name == "stage" else _number(value)
        _write_line(self._metrics, line)
        self._tell(step, values)

    def write_timings(
        self, step: int, seconds: Mapping[str, float], rollout_step: int | None = None
    ) -> None:
        """Append one line of timings.

        Args:
          step: optimizer steps taken, all stages together.
          seconds: seconds spent per activity; names are free but end in `_seconds`.
          rollout_step: rollout steps taken, which tell apart steps without an update.

        Raises:
          ValueError: a name does not end in `_seconds`.
        """
        wrong = [name for name in seconds if not name.endswith("_seconds")]
        if wrong:
            raise ValueError(f"timings are named <activity>_seconds, got {', '.join(wrong)}")
        places = {"step": int(step)}
        if rollout_step is not None:
            places["rollout_step"] = int(rollout_step)
        _write_line(
            self._timings, places | {name: _number(value) for name, value in seconds.items()}
        )
        training = [value for name, value in seconds.items() if name not in NOT_TRAINING]
        timings = {f"timings/{name}": value for name, value in seconds.items()}
        self._tell(step, timings | {"step_time": sum(training)})

    def _tell(self, step: int, values: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.write(step, values)

    def close(self, failed: bool = False) -> None:
        """Close files and loggers, telling these whether the run failed; twice is allowed."""
        for file in (self._metrics, self._timings):
            with contextlib.suppress(OSError):  # what is left of a line that was told already
                file.close()
        while self._loggers:
            self._loggers.pop().close(failed)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None)


class NoWriter(contextlib.nullcontext):
    """What a process that does not write has in place of a MetricsWriter."""

    def __enter__(self) -> NoWriter:
        return self

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write nothing."""

    def write_timings(self, step: int, seconds: Mapping[str, float], rollout_step: int) -> None:
        """Write nothing."""


def mark_finished(directory: str | os.PathLike) -> None:
    """Write the empty file that says the run in `directory` ended normally."""
    (Path(directory) / FINISHED_FILE).touch()


def _check_names(names: Iterable[str]) -> None:
    """Raise for all unknown names at once."""
    if "step" in names:
        raise ValueError('"step" is an argument of its own and must not be among the values')
    problems = []
    for name in names:
        if is_known(name):
            continue
        near = difflib.get_close_matches(name, GLOSSARY, n=1)
        problems.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if problems:
        raise ValueError(
            f"unknown metric {', '.join(problems)}: add it to GLOSSARY in ntkrl/report/names.py "
            f"with its unit and meaning, or use one of the families {', '.join(FAMILIES)}"
        )


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _append_to(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _write_line(file: TextIO, line: Mapping[str, Any]) -> None:
    # One write per line: a kill in between leaves whole lines.
    try:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        raise OSError(
            f"{file.name} takes no more lines: {error.strerror}; make room, and run the same "
            "command again: it goes on from the last checkpoint."
        ) from error


def _trim(path: Path, resume_step: int | None) -> None:
    """Keep the whole lines up to `resume_step` (all of them for None), byte for byte."""
    if not path.exists():
        return
    before = path.read_bytes()
    lines = before.split(b"\n")
    tail = lines.pop()  # empty when the file ends in a newline
    if tail and _is_object(tail):  # only the newline was lost
        lines.append(tail)
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
    """Return the rollout step of a line; one without (the start, or supervised) has its step."""
    try:
        held = json.loads(line)
        return int(held["rollout_step" if "rollout_step" in held else "step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with an integer step, got "
            f"{line[:60]!r}; remove the line to resume"
        ) from error
