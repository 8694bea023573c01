"""config.json of a run directory, and changes of it that a resumed run may have."""

import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkrl.durable_files import save_text
from ntkrl.json_files import read_object
from ntkrl.run_lock import DirectoryLock
from ntkrl.runtime.config import differences
from ntkrl.runtime.distributed import allgather_object, is_writer
from ntkrl.user_files import IN_PROCESS

SHARED_SECONDS = 60.0
"""Time until a new file is visible on every host."""
TRAINING_FILES = (
    *("metrics.jsonl", "timings.jsonl", "layout.json", "finished", "checkpoints"),
    *("probes", "ledger", "rollouts", "export", "export_reference", "starts.jsonl"),
)
"""Files and directories that a run replaces or shortens."""
ALLOWED = {
    "checkpoint": "schedule and retention only, not the computation",
    "logging": "loggers only, not the computation",
    "mesh": "same numbers up to rounding",
    "rollout.mesh": "same numbers up to rounding",
    "run_dir": "path of the run",
    "schedule.log_ratio_tolerance": "a check only, not the computation",
}
"""Sections and fields of a config that a resumed run may change, and why: the run computes what it
would have computed. Any other difference would mix two runs, and is refused."""


def locked(
    directory: Path, command: str, done: str | None = None, name: str = "run"
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which process 0 has the lock of a directory, see `run_lock`.

    Args:
      directory: that the command writes into.
      command: in words.
      done: name of a file there that means that nothing will be written; no lock is taken then.
      name: of the lock.
    """
    finished = done is not None and (directory / done).exists()
    if finished or not is_writer():
        return contextlib.nullcontext()
    return DirectoryLock(directory, f"ntkrl {command}", name)


def config_changes(saved: Mapping[str, Any], config: Mapping[str, Any], subject: str) -> list[str]:
    """Return the differences that are ALLOWED between two configs, with the reason.

    Args:
      saved, config: as JSON values.
      subject: name, in messages, of what was created with `saved`.

    Raises:
      ValueError: any other difference; the message lists all of both kinds.
    """
    renamed = _with_functions(saved, config)
    refused = differences(config_identity(renamed), config_identity(config))
    reason = "the same function by its name"
    allowed = [f"{change} ({reason})" for change in differences(saved, renamed)]
    allowed += [
        f"{change} ({reason})"
        for name, reason in ALLOWED.items()
        for change in differences(_part(saved, name), _part(config, name))
    ]
    if not refused:
        return allowed
    also = f" Also changed, but allowed: {'; '.join(allowed)}." if allowed else ""
    raise ValueError(
        f"{subject} was begun with another config: {'; '.join(refused)}.{also} Undo these changes, "
        "set another --config.run_dir, or remove the directory to start over."
    )


def _with_functions(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the saved config with the config's name of reward functions that are the same.

    A program that calls a run names its functions `python:NAME`; the same run may go on with
    `FILE.py:NAME`, and the reverse.
    """
    sections = [values["reward"] if "reward" in values else {} for values in (saved, config)]
    texts = [section["function"] if "function" in section else None for section in sections]
    if texts[0] == texts[1] or None in texts:
        return saved
    pairs = list(itertools.zip_longest(*(text.split(",") for text in texts), fillvalue=""))
    same = all(
        before == after
        or (
            before.rpartition(":")[2] == after.rpartition(":")[2]
            and (before.startswith(IN_PROCESS) or after.startswith(IN_PROCESS))
        )
        for before, after in pairs
    )
    return {**saved, "reward": {**sections[0], "function": texts[1]}} if same else saved


def config_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that must not change within a run: all but ALLOWED."""
    identity = {name: value for name, value in values.items() if name not in ALLOWED}
    for name in ALLOWED:
        section, _, field = name.partition(".")
        if field and section in identity:
            fields = identity[section].items()
            identity[section] = {key: value for key, value in fields if key != field}
    return identity


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section, or a field of one, by its name; empty if the config does not have it."""
    section, _, field = name.partition(".")
    if section not in values or not field:
        return {name: values[section]} if section in values else {}
    return {name: values[section][field]} if field in values[section] else {}


def check_run_dir(
    directory: Path, config: Mapping[str, Any], files: Sequence[str] = TRAINING_FILES
) -> list[str] | None:
    """Check that a run directory belongs to the same config.

    Args:
      directory: the run directory.
      config: as JSON values.
      files: that will be replaced there.

    Returns:
      The allowed differences, see `config_changes`; None if it has no config.json yet.

    Raises:
      ValueError: it was begun with another config, or has files that no run of a config wrote.
    """
    path = directory / "config.json"
    if not path.exists():
        foreign = [name for name in files if _has_content(directory / name)]
        if foreign:
            raise ValueError(
                f"{directory} has no config.json, so its {', '.join(foreign)} may not be this "
                "program's and would be replaced; move them, or set another --config.run_dir."
            )
        return None
    return config_changes(read_object(path, finite=False), config, str(directory))


def _has_content(path: Path) -> bool:
    """Return whether there is a file, or a directory that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def claim_run_dir(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, creating the directory, unless it is up to date.

    Raises:
      ValueError: as `check_run_dir`.
    """
    if check_run_dir(directory, config, ()) != []:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        save_text(directory / "config.json", text)


def check_shared(directory: Path) -> None:
    """Check that every process sees the run directory of the first.

    Raises:
      ValueError: this process does not see the config that the first one wrote.
    """
    paths = allgather_object("the run directory", str(directory.absolute()))
    deadline = time.monotonic() + SHARED_SECONDS if len(paths) > 1 else 0.0
    while not (directory / "config.json").exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{directory} is not the directory that process 0 writes to ({paths[0]} there); "
                "give a run_dir on a file system that all hosts share."
            )
        time.sleep(0.5)
