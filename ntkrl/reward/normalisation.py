"""Shift and scale of rewards from precomputed ones: (reward − mean) / √(variance + 1e-8).

`ntkrl evaluate` writes such a file; the variance is the unbiased one over all its entries. As in
the recipe of princeton-pli/what-makes-good-rm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

EPSILON = 1e-8


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
    path = Path(path)
    form = 'expected {"rewards": {"NAME": [numbers]}}, as `ntkrl evaluate` writes it'
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"reward.normalisation {path} cannot be read ({error}); {form}."
        ) from error
    held = raw["rewards"] if isinstance(raw, dict) and "rewards" in raw else None
    if not isinstance(held, dict) or not held:
        raise ValueError(f"reward.normalisation {path} holds no rewards; {form}.")
    found = {}
    for name, values in held.items():
        numbers = (
            [v for v in values if isinstance(v, int | float)] if isinstance(values, list) else []
        )
        if len(numbers) < 2 or not np.isfinite(numbers).all():
            raise ValueError(
                f"reward.normalisation {path}: {name!r} needs two finite rewards at least; {form}."
            )
        found[name] = (float(np.mean(numbers)), float(np.sqrt(np.var(numbers, ddof=1) + EPSILON)))
    return found
