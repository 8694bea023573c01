"""The reward functions of a run: the config's reward section."""

import dataclasses
import math
from typing import Any

MAX_TIMEOUT = 1e6
"""Seconds; the system's waits are limited to little more."""


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Reward functions and how they are called.

    functions: `(specification, weight)` pairs; none for supervised runs without a reward.
    timeout: seconds a call of a user's function may take, at most MAX_TIMEOUT.
    on_failure: reward of every row of a failed call, or None to stop.
    normalisation: file of precomputed rewards, or None.
    dtype, batch_size: of reward models.
    options: `{built-in function: {argument: value}}`.
    """

    functions: tuple[tuple[str, float], ...]
    timeout: float
    on_failure: float | None
    normalisation: str | None
    dtype: str
    batch_size: int
    options: dict[str, dict[str, Any]]

    def __post_init__(self):
        problems = []
        if not 0 < self.timeout <= MAX_TIMEOUT:
            problems.append(
                f"reward.timeout must be above 0 seconds, not {self.timeout} "
                f"(at most {MAX_TIMEOUT:g})"
            )
        if self.batch_size < 1:
            problems.append(f"reward.batch_size must be ≥ 1, not {self.batch_size}")
        numbers = {f"reward.weights of {name}": weight for name, weight in self.functions}
        if self.on_failure is not None:
            numbers["reward.on_failure"] = self.on_failure
        problems += [
            f"{name} must be finite, not {number}"
            for name, number in numbers.items()
            if math.isinf(number)
        ]
        if problems:
            raise ValueError("; ".join(problems) + ".")
