"""An arm of a study: its runs over seeds, and the settings that claims depend on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from ntkrl.configs.evidence.verdict import mean_text
from ntkrl.study import Measure, Results


class Plan(Protocol):
    """Settings that claims depend on; see `arm_study.StudySettings`."""

    arms: dict[str, tuple[str, ...]]
    samples: int
    task: str
    step_rates: dict[str, tuple[float, ...]]
    sizes: list[str]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds of an arm."""


class Arm(NamedTuple):
    """An arm of a size, with the study it belongs to."""

    results: Results
    plan: Plan
    size: str
    name: str

    @property
    def task(self) -> str:
        """Name of the runs' task."""
        tasks = {"rlhf": "learned reward", "sft": "supervised", "tied": "tied head"}
        return f"{self.size}, {tasks.get(self.name.split('_')[0], self.plan.task)}"

    def other(self, name: str) -> Arm:
        """Return another arm of the size."""
        return self._replace(name=name)

    def over_seeds(self, measure: Measure) -> np.ndarray:
        """Return a measure of each seed's finished run `[seeds]`, NaN without one."""
        return self.results.over_seeds(self.size, self.name, measure)

    def mean(self, measure: Measure) -> str:
        """Return the mean of a measure over seeds in words."""
        return mean_text(self.over_seeds(measure))
