"""The progress bar of a run: no time is predicted before two steps are done."""

import time
from typing import Any

from tqdm import tqdm

STEPS_BEFORE_PREDICTION = 2


class StepBar(tqdm):
    """Counts rollout steps; its rate leaves out the first, which compiles the programs.

    first_end: time at which the first step ended, None before.
    """

    first_end: float | None = None

    def update(self, n: float | None = 1) -> bool | None:
        """Count steps, and note the end of the first."""
        if self.first_end is None:
            self.first_end = time.perf_counter()
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values of the bar's text; a rate of 0 is shown as "?", and so is the time left."""
        values = super().format_dict
        steps = self.n - self.initial
        values["rate"] = 0.0
        if self.first_end is not None and steps >= STEPS_BEFORE_PREDICTION:
            values["rate"] = (steps - 1) / max(time.perf_counter() - self.first_end, 1e-9)
        return values
