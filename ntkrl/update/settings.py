"""How a run goes on in time: the config's schedule section and its stages."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from ntkrl import runtime
from ntkrl.update.stages import Stage, check_stages


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """How a rollout becomes optimizer steps.

    minibatches: equal parts a rollout is cut in, one optimizer step each; divides the prompts.
    microbatches: equal parts of a minibatch that are read one after another, their gradients
      added; divides the completions (examples) of a minibatch.
    inner_epochs: passes over a rollout.
    chunk_tokens: positions whose logits exist at a time on each device.
    offload_optimizer: optimizer moments lie in the host's memory but during a step.
    log_ratio_tolerance: largest |log π(trainer) − log π(sampler)| before an update (nats).
    resample_rounds: further batches of prompts that may replace groups of equal rewards, where
      the objective's group_filter is "resample".
    on_no_signal: "skip" a step whose completions have nothing to learn from, or "stop" the run.
    reference_sync_steps: rollout steps between syncs of the reference policy with the policy, or
        None to keep the starting params.
    reference_mixup_alpha: α of a sync, reference ← α policy + (1 − α) reference, in (0, 1].
    """

    minibatches: int
    microbatches: int
    inner_epochs: int
    chunk_tokens: int
    offload_optimizer: bool
    log_ratio_tolerance: float
    resample_rounds: int
    on_no_signal: str
    reference_sync_steps: int | None
    reference_mixup_alpha: float

    def __post_init__(self):
        counts = ("minibatches", "microbatches", "inner_epochs", "chunk_tokens", "resample_rounds")
        problems = [
            f"schedule.{name} must be ≥ 1, not {getattr(self, name)}"
            for name in counts
            if getattr(self, name) < 1
        ]
        if self.on_no_signal not in ("skip", "stop"):
            problems.append(f"schedule.on_no_signal {self.on_no_signal!r} is not among skip, stop")
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
        """Optimizer steps per rollout step, where none is skipped."""
        return self.minibatches * self.inner_epochs


def due(every_steps: int | None, rollout_step: int) -> bool:
    """Tell whether what happens every so many rollout steps (None: never) happens after this."""
    return every_steps is not None and rollout_step % every_steps == 0


def read_stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Read every row and check how they follow each other.

    Raises:
      ValueError: everything that is wrong in any row, in one message.
    """
    if not config.stages:
        raise ValueError("stages is empty; give at least one row (see configs/base.py).")
    stages, problems = [], []
    for number, row in enumerate(config.stages):
        try:
            stages.append(runtime.parse_section(Stage, row, f"stages[{number}]"))
        except ValueError as error:
            problems.append(str(error))
    ruled = [s.name for s in stages if (s.plateau_window, s.kl_budget) != (None, None)]
    if ruled and config.method != "rl":
        problems.append(
            f"plateau_window and kl_budget need a reward and a reference: method {config.method!r} "
            f"has neither; remove them from stages {', '.join(ruled)}."
        )
    if problems:
        raise ValueError("\n".join(problems))
    check_stages(stages)
    return tuple(stages)
