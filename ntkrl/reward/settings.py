"""The reward functions of a run: the config's reward section."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Reward functions and how they are called.

    functions: `(specification, weight)` pairs; none for supervised runs without a reward.
    timeout: seconds a call of a user's function may take.
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
        if not self.timeout > 0 or self.batch_size < 1:
            raise ValueError("reward.timeout must be positive and reward.batch_size ≥ 1.")
