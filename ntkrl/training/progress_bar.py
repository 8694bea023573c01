"""The progress bar of a run: no time is predicted before two steps are done."""

import time
from collections import deque
from typing import Any

from tqdm import tqdm

RECENT_STEPS = 30


class StepBar(tqdm):
    """Counts rollout steps; its rate is that of recent steps, without the first.

    The first step compiles the programs: it would predict hours.

    ends: times at which the last steps ended.
    """

    ends: deque[float]

    def __init__(self, *arguments: Any, **options: Any):
        self.ends = deque(maxlen=RECENT_STEPS + 1)
        super().__init__(*arguments, **options)

    def update(self, n: float | None = 1) -> bool | None:
        """Count a step, and note its end."""
        self.ends.append(time.perf_counter())
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values of the bar's text; a rate of 0 is shown as "?", and so is the time left."""
        values = super().format_dict
        values["rate"] = 0.0
        if len(self.ends) > 1:
            values["rate"] = (len(self.ends) - 1) / max(self.ends[-1] - self.ends[0], 1e-9)
        return values
