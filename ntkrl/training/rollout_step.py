"""A rollout step between its dispatch and the writing of its metrics."""

import dataclasses
from typing import Any

import numpy as np

from ntkrl.generate import RewardedRollout
from ntkrl.training.analysed_step import CompletedStep
from ntkrl.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedRollout:
    """A rewarded rollout and the weights of its tokens, on the host.

    rewarded: without features. advantages: `[B, C]`, 0 where a token does not count.
    log_ratio: `[B, C]` log-prob of the trainer before the update less the sampler's (nats); None
      where the step does not read the trainer's.
    """

    rewarded: RewardedRollout
    advantages: np.ndarray
    log_ratio: np.ndarray | None


@dataclasses.dataclass
class RolloutStep:
    """A rollout step whose work has been dispatched to the devices.

    rollout_step: from 1. optimizer_steps: steps taken by its end, in all stages. stage: its name.
    metrics: values known on the host.
    pending: metrics of its optimizer steps, on the devices until they are fetched, then None.
    counters: logged after those metrics.
    completed: its last optimizer step, where the probe hook analyses that.
    rollouts: its completions, until they are logged; None without any.
    """

    rollout_step: int
    optimizer_steps: int
    stage: str
    metrics: dict[str, Any]
    pending: list[dict[str, Array]] | None
    counters: dict[str, Any] = dataclasses.field(default_factory=dict)
    completed: CompletedStep | None = None
    rollouts: WeightedRollout | None = None
