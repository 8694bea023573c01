"""A rollout step between its dispatch and the writing of its metrics."""

import dataclasses
from typing import Any

from ntkrl.training.analysed_step import CompletedStep
from ntkrl.types import Array


@dataclasses.dataclass
class RolloutStep:
    """A rollout step whose work has been dispatched to the devices.

    rollout_step: from 1. optimizer_steps: steps taken by its end, in all stages. stage: its name.
    metrics: values known on the host.
    pending: metrics of its optimizer steps, on the devices until they are fetched, then None.
    counters: logged after those metrics.
    completed: its last optimizer step, where the probe hook analyses that.
    """

    rollout_step: int
    optimizer_steps: int
    stage: str
    metrics: dict[str, Any]
    pending: list[dict[str, Array]] | None
    counters: dict[str, Any] = dataclasses.field(default_factory=dict)
    completed: CompletedStep | None = None
