"""The files of a run directory that are neither checkpoints nor metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.runtime.config import differences

FREE_SECTIONS = ("logging",)
"""Sections of a config that a resumed run may change: they reach no number of the run."""


def check_claim(directory: Path, given: Mapping[str, Any]) -> bool:
    """Check that a run directory, if it is one already, belongs to the same config.

    Args:
      directory: the run directory.
      given: the config as JSON values; FREE_SECTIONS are not compared.

    Returns:
      Whether it is one already.

    Raises:
      ValueError: it was begun with another config; every difference is named.
    """
    path = directory / "config.json"
    if not path.exists():
        return False
    saved = json.loads(path.read_text(encoding="utf-8"))
    changed = differences(*map(_fixed, (saved, given)))
    if changed:
        raise ValueError(
            f"{directory} was begun with another config: {'; '.join(changed)}. Give another "
            "--config.run_dir, or remove the directory to start over."
        )
    return True


def claim(directory: Path, given: Mapping[str, Any]) -> None:
    """Write config.json, unless it is there already.

    Args:
      directory: the run directory, made if missing.
      given: the config as JSON values.

    Raises:
      ValueError: as `check_claim`.
    """
    if check_claim(directory, given):
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(given, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in FREE_SECTIONS}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz whole or not at all; arrays of numbers only, so no pickle is needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)
