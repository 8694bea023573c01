"""The files of a run directory that are neither checkpoints nor metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.runtime.config import differences
from ntkrl.runtime.processes import agree

SHARED_SECONDS = 60.0
"""Time until a new file is visible on every host."""
ALLOWED = {
    "checkpoint": "when and what is kept, not what is computed",
    "logging": "what is told elsewhere, not what is computed",
    "mesh": "the same numbers but for rounding",
    "run_dir": "where the run lies",
}
"""Sections of a config that a resumed run may change, and why: with them it still computes what it
would have computed. Any other difference would make one run of two, and is refused."""


def changes(saved: Mapping[str, Any], given: Mapping[str, Any], what: str) -> list[str]:
    """Compare the config that something was made with and the config of this run.

    Args:
      saved, given: as JSON values.
      what: was made with `saved`, as messages call it.

    Returns:
      Every difference that ALLOWED names, with the reason.

    Raises:
      ValueError: any other difference; all of both kinds are named.
    """
    refused = differences(*map(config_identity, (saved, given)))
    sections = [name for name in ALLOWED if name in saved and name in given]
    allowed = [
        f"{change} ({ALLOWED[name]})"
        for name in sections
        for change in differences({name: saved[name]}, {name: given[name]})
    ]
    if not refused:
        return allowed
    beside = f" Allowed beside: {'; '.join(allowed)}." if allowed else ""
    raise ValueError(
        f"{what} was begun with another config: {'; '.join(refused)}.{beside} Set what was changed "
        "back, give another --config.run_dir, or remove the directory to start over."
    )


def config_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that all of a run must share: everything but ALLOWED."""
    return {name: value for name, value in values.items() if name not in ALLOWED}


def check_claim(directory: Path, given: Mapping[str, Any]) -> list[str] | None:
    """Check that a run directory, if it is one already, belongs to the same config.

    Args:
      directory: the run directory.
      given: the config as JSON values.

    Returns:
      The allowed differences, see `changes`; None where it is none yet.

    Raises:
      ValueError: it was begun with another config.
    """
    path = directory / "config.json"
    if not path.exists():
        return None
    return changes(json.loads(path.read_text(encoding="utf-8")), given, str(directory))


def claim(directory: Path, given: Mapping[str, Any]) -> None:
    """Write config.json, and again where an allowed part of it has changed.

    Args:
      directory: the run directory, made if missing.
      given: the config as JSON values.

    Raises:
      ValueError: as `check_claim`.
    """
    if check_claim(directory, given) == []:
        return
    text = json.dumps(given, indent=2, sort_keys=True) + "\n"
    save_text(directory / "config.json", text)


def save_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz whole or not at all; arrays of numbers only, so no pickle is needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def check_shared(directory: Path) -> None:
    """Check that every process sees the run directory of the first.

    Raises:
      ValueError: this process does not see the config that the first one wrote.
    """
    paths = agree("the run directory", str(directory.absolute()))
    deadline = time.monotonic() + SHARED_SECONDS if len(paths) > 1 else 0.0
    while not (directory / "config.json").exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{directory} is not the directory that process 0 writes to ({paths[0]} there); "
                "give a run_dir on a file system that all hosts share."
            )
        time.sleep(0.5)
