"""When a stage ends: rules on the values a run logs, and what of them a resume needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ntkrl.update.stages import Stage


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands in its stages; JSON values only, saved with every checkpoint.

    stage: index of the stage the last rollout step belonged to.
    steps: rollout steps taken in it.
    rewards: mean rewards of its last rollout steps, newest last; twice the plateau's window.
    ended: why it ended, or None while it goes on.
    """

    stage: int = 0
    steps: int = 0
    rewards: Sequence[float] = ()
    ended: str | None = None


def advance(stage: Stage, progress: Progress, metrics: Mapping[str, Any]) -> Progress:
    """Count a rollout step, and end the stage where it or one of its rules says so.

    Args:
      stage: the current one, its length given in steps.
      progress: before the rollout step.
      metrics: of the rollout step; `reward` and `kl` are read where a rule needs them. A step
        without an update may have no `kl`.
    """
    steps, window, rewards = progress.steps + 1, stage.plateau_window, ()
    reasons = [f"its {steps} steps are done"] if steps >= stage.steps else []
    if window is not None:
        rewards = (*progress.rewards, metrics["reward"])[-2 * window :]
        before, last = sum(rewards[:window]) / window, sum(rewards[window:]) / window
        if len(rewards) == 2 * window and not last - before > stage.plateau_tolerance:
            reasons.append(
                f"mean reward of the last {window} steps is {last:.4g}, of the {window} before "
                f"{before:.4g}: no gain above {stage.plateau_tolerance:.4g}"
            )
    spent = stage.kl_budget is not None and "kl" in metrics
    if spent and not metrics["kl"] <= stage.kl_budget:
        reasons.append(f"kl {metrics['kl']:.4g} exceeds its budget of {stage.kl_budget:.4g}")
    ended = " and ".join(reasons) if reasons else None
    return Progress(progress.stage, steps, rewards, ended)


def enter_stage(progress: Progress) -> Progress:
    """Return the progress a rollout step starts with: in the next stage where one has ended."""
    return progress if progress.ended is None else Progress(progress.stage + 1)


def steps_left(stages: Sequence[Stage], progress: Progress) -> int:
    """Return how many rollout steps are left at most, 0 at the end of the last stage."""
    own = 0 if progress.ended is not None else stages[progress.stage].steps - progress.steps
    return own + sum(stage.steps for stage in stages[progress.stage + 1 :])
