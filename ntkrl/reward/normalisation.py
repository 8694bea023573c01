"""Shift and scale of rewards from precomputed ones: (reward − mean) / √(variance + 1e-8).

`ntkrl evaluate` writes such a file; the variance is the unbiased one over all its entries. As in
the recipe of princeton-pli/what-makes-good-rm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EPSILON = 1e-8
FORM = 'expected {"rewards": {"NAME": [numbers]}}, as `ntkrl evaluate` writes it'


def write_rewards(path: Path, per_function: Mapping[str, Sequence[float]]) -> None:
    """Write rewards by function name as JSON; rows a function does not apply to as null."""
    held = {
        name: [None if value != value else float(value) for value in values]
        for name, values in per_function.items()
    }
    path.write_text(json.dumps({"rewards": held}) + "\n", encoding="utf-8")


def read_normalisation(path: str | Path) -> dict[str, tuple[float, float]]:
    """Read `{function: (shift, scale)}` off a file of precomputed rewards.

    Raises:
      ValueError: no such file, another form, or fewer than two rewards of a function.
    """
    found = {}
    for name, values in _held(Path(path), "reward.normalisation").items():
        numbers = (
            [v for v in values if isinstance(v, int | float)] if isinstance(values, list) else []
        )
        if len(numbers) < 2 or not np.isfinite(numbers).all():
            raise ValueError(
                f"reward.normalisation {path}: {name!r} needs two finite rewards at least; {FORM}."
            )
        found[name] = (float(np.mean(numbers)), float(np.sqrt(np.var(numbers, ddof=1) + EPSILON)))
    return found


def read_rewards(path: Path, setting: str) -> dict[str, np.ndarray]:
    """Read what `write_rewards` wrote.

    Args:
      path: the file.
      setting: of the config, which messages name.

    Returns:
      Name to `[B]` float32, NaN where the function does not apply.

    Raises:
      ValueError: no such file, or another form.
    """
    found = {}
    for name, values in _held(path, setting).items():
        numbers = isinstance(values, list) and all(
            value is None or isinstance(value, int | float) for value in values
        )
        if not numbers:
            raise ValueError(f"{setting} {path}: {name!r} is no list of numbers; {FORM}.")
        found[name] = np.array(values, np.float32)
    return found


def _held(path: Path, setting: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{setting} {path} cannot be read ({error}); {FORM}.") from error
    held = raw["rewards"] if isinstance(raw, dict) and "rewards" in raw else None
    if not isinstance(held, dict) or not held:
        raise ValueError(f"{setting} {path} holds no rewards; {FORM}.")
    return held
