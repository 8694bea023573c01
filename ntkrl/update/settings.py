"""Settings of the schedule and its stages, and progress through the stages."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ntkrl import runtime
from ntkrl.messages import quoted
from ntkrl.update.stages import Stage, check_stages

LOG_RATIO_TOLERANCES = {"float32": 1e-3, "float16": 0.25, "bfloat16": 2.0}
"""Nats by dtype of the network or the cache, whichever is larger; measured in configs/README.md."""


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """Optimizer steps on a rollout; configs/base.py describes the other keys.

    minibatches: equal parts of a rollout, one optimizer step each; divides the prompts.
    microbatches: equal parts of a minibatch for gradient accumulation; divides its completions
      (examples). None for the fewest that fit the devices' memory.
    inner_epochs: passes over a rollout.
    log_ratio_tolerance: largest |log π(trainer) − log π(sampler)| before an update (nats); None
      for that of the dtypes in LOG_RATIO_TOLERANCES.
    resample_rounds: further batches of prompts that may replace groups of equal rewards.
    """

    minibatches: int
    microbatches: int | None
    inner_epochs: int
    chunk_tokens: int
    offload_optimizer: bool
    log_ratio_tolerance: float | None
    resample_rounds: int
    on_no_signal: str
    reference_sync_steps: int | None
    reference_mixup_alpha: float

    def __post_init__(self):
        counts = ("minibatches", "microbatches", "inner_epochs", "chunk_tokens", "resample_rounds")
        problems = [
            f"schedule.{name} must be ≥ 1, not {getattr(self, name)}"
            for name in counts
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.on_no_signal not in ("skip", "stop"):
            problems.append(f"schedule.on_no_signal {self.on_no_signal!r} is not among skip, stop")
        if self.log_ratio_tolerance is not None and not self.log_ratio_tolerance > 0:
            problems.append(
                f"schedule.log_ratio_tolerance must be > 0 or None, not {self.log_ratio_tolerance}"
            )
        if self.reference_sync_steps is not None and self.reference_sync_steps < 1:
            problems.append(
                "schedule.reference_sync_steps must be ≥ 1 or None, not "
                f"{self.reference_sync_steps}"
            )
        if not 0 < self.reference_mixup_alpha <= 1:
            problems.append(
                "schedule.reference_mixup_alpha must be in (0, 1], not "
                f"{self.reference_mixup_alpha}"
            )
        if problems:
            raise ValueError("; ".join(problems) + ".")

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout step, if none is skipped."""
        return self.minibatches * self.inner_epochs


@dataclasses.dataclass(frozen=True)
class PreferenceSettings:
    """Loss of a reward model."""

    centering_coefficient: float

    def __post_init__(self):
        if not 0 <= self.centering_coefficient < math.inf:
            raise ValueError(
                "preference.centering_coefficient must be finite and ≥ 0, not "
                f"{self.centering_coefficient}."
            )


def is_due(every_steps: int | None, rollout_step: int) -> bool:
    """Return whether an event of period `every_steps` (None: never) follows this rollout step."""
    return every_steps is not None and rollout_step % every_steps == 0


def read_stages(rows: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Return the stages of a config's rows, each checked and against the one before.

    Raises:
      ValueError: all problems of all stages, in one message.
    """
    if not rows:
        raise ValueError("stages is empty; give at least one row (see configs/base.py).")
    stages, problems = [], []
    for number, row in enumerate(rows):
        if not (isinstance(row, Mapping) or hasattr(row, "to_dict")):  # or a ConfigDict
            problems.append(
                f"stages[{number}] is {quoted(row)}; rows are those of base.stage(...) in a config "
                f"file. On the command line set one field: --config.stages[{number}].steps=10."
            )
            continue
        try:
            stages.append(runtime.parse_section(Stage, row, f"stages[{number}]"))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    check_stages(stages)
    return tuple(stages)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress through the stages; JSON values, saved with every checkpoint.

    stage: index of the stage of the last rollout step.
    steps: rollout steps done in it.
    rewards: mean rewards of its last rollout steps, newest last; twice the plateau's window.
    ended: the reason why it ended, or None.
    """

    stage: int = 0
    steps: int = 0
    rewards: Sequence[float] = ()
    ended: str | None = None


def advance(stage: Stage, progress: Progress, metrics: Mapping[str, Any]) -> Progress:
    """Count a rollout step, and end the stage by its length or a stopping rule.

    Args:
      stage: the current one, its length in steps.
      progress: before the rollout step.
      metrics: metrics of the rollout step; stopping rules read `reward` and `kl`. A step without
        an update may have no `kl`.
    """
    steps, window, rewards = progress.steps + 1, stage.plateau_window, ()
    reasons = [_steps_are_done(steps)] if steps >= stage.max_steps else []
    if window is not None:
        rewards = (*progress.rewards, metrics["reward"])[-2 * window :]
        before, last = sum(rewards[:window]) / window, sum(rewards[window:]) / window
        if len(rewards) == 2 * window and not last - before > stage.plateau_tolerance:
            reasons.append(
                f"mean reward of the last {window} steps is {last:.4g}, of the {window} before "
                f"{before:.4g}: no gain above {stage.plateau_tolerance:.4g}"
            )
    has_kl = stage.kl_budget is not None and "kl" in metrics
    if has_kl and not metrics["kl"] <= stage.kl_budget:
        reasons.append(f"kl {metrics['kl']:.4g} exceeds its budget of {stage.kl_budget:.4g}")
    ended = " and ".join(reasons) if reasons else None
    return Progress(progress.stage, steps, rewards, ended)


def _steps_are_done(steps: int) -> str:
    return f"its {steps} steps are done"


def reopened(stages: Sequence[Stage], progress: Progress) -> Progress:
    """Return the progress of a resumed run, whose stage may have become longer since it ended.

    A stage that a rule ended stays at its end.
    """
    longer = progress.steps < stages[progress.stage].max_steps
    if longer and progress.ended == _steps_are_done(progress.steps):
        return dataclasses.replace(progress, ended=None)
    return progress


def enter_stage(progress: Progress) -> Progress:
    """Return the progress that a rollout step starts from: the next stage's if one has ended."""
    return progress if progress.ended is None else Progress(progress.stage + 1)


def steps_left(stages: Sequence[Stage], progress: Progress) -> int:
    """Return the most rollout steps that are left; 0 at the end of the last stage."""
    current = 0 if progress.ended is not None else stages[progress.stage].max_steps - progress.steps
    return current + sum(stage.max_steps for stage in stages[progress.stage + 1 :])
