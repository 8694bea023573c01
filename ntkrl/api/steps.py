"""A run's rollout steps in parts, for a loop of the caller's.

The loop in the room's README takes every step of `ntkrl.train`, with the same bits.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkrl import training
from ntkrl.api.call import Arguments, read_call
from ntkrl.api.keywords import with_hints
from ntkrl.api.step_arguments import checked
from ntkrl.generate import Clock, RewardedRollout, SampledTexts
from ntkrl.types import UpdateBatch
from ntkrl.update import StepResult, describe, is_due


class Steps:
    """Functions of a run's position, bound to its model, prompts, rewards and stages.

    A position is not changed: `begin`, `advantages`, `update` and `end` return the next. `update`
    donates the arrays of the position that it gets, which cannot be read afterwards.
    """

    @with_hints
    def __init__(
        self,
        model: Any = None,
        prompts: Any = None,
        rewards: Any = None,
        method: str = "rl",
        *,
        learning_rate: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        run_dir: str | os.PathLike | None = None,
        eval_prompts: Any = None,
        config: Any = None,
    ):
        """Load and check the parts of a run.

        Args:
          model, prompts, rewards, method, learning_rate, steps, seed, run_dir, eval_prompts,
            config: as for `ntkrl.train`; probes and ledgers are written to `run_dir`.

        Raises:
          ValueError: a mistake in the arguments.
        """
        call = read_call(
            Arguments(
                model=model,
                prompts=prompts,
                rewards=rewards,
                method=method,
                learning_rate=learning_rate,
                steps=steps,
                seed=seed,
                run_dir=run_dir,
                eval_prompts=eval_prompts,
                config=config,
            )
        )
        call.save_start()
        self.functions = training.open_steps(call.config, call.inputs)
        source = self.functions.source
        assert isinstance(source, training.RolloutSource)  # as `open_steps` checks
        if self.functions.settings.objective.group_filter == "resample":
            raise ValueError(
                'objective.group_filter "resample" draws until a step has enough groups; choose '
                "another one for a loop of your own, or use ntkrl.train."
            )
        self.source = source

    def __repr__(self) -> str:
        settings, stages = self.functions.settings, self.functions.stages
        lengths = ", ".join(f"{stage.name} {stage.max_steps}" for stage in stages)
        return (
            f"Steps of {settings.name}, seed {settings.seed}: rollout steps {lengths}\n"
            f"  {describe(settings.objective)}\n"
            f"  model {settings.model.path}, {self.functions.setup.train.size} prompts"
        )

    def start(self) -> training.RunPosition:
        """Return the position of a new run: params, optimizer, PRNG key, place in the prompts."""
        return self.functions.start()

    @checked
    def left(self, at: training.RunPosition) -> int:
        """Return the rollout steps that are left, at most."""
        return self.functions.steps_left(at)

    @checked
    def begin(self, at: training.RunPosition) -> training.RunPosition:
        """Begin a rollout step: enter the next stage where one has ended, and split the key."""
        return self.functions.begin(at)

    @checked
    def sample(self, at: training.RunPosition) -> SampledTexts:
        """Sample completions of the step's prompts."""
        return self.source.sample(self._context(at))

    @checked
    def reward(self, at: training.RunPosition, sampled: SampledTexts) -> RewardedRollout:
        """Reward completions: each function's rewards, and their weighted sum.

        Raises:
          ValueError: what the reward functions did wrong.
        """
        context = self._context(at)
        self.source.position += 1  # the prompts of these completions are drawn
        return self.source.reward(context, sampled)

    @checked
    def advantages(
        self, at: training.RunPosition, rewarded: RewardedRollout
    ) -> tuple[training.RunPosition, training.StepBatches]:
        """Return the minibatches of the step, with the advantage of each token, and its metrics.

        Minibatches are repeated for `schedule.inner_epochs`; those without a gradient are left out.
        """
        context = self._context(at)
        self.source.position += 1
        data = self.source.weigh(context, rewarded)
        at = self.functions.count(at, data)
        epochs = self.functions.settings.schedule.inner_epochs
        return at, data._replace(batches=[*data.batches] * epochs)

    @checked
    def snapshot(
        self, at: training.RunPosition, batch: UpdateBatch, data: training.StepBatches
    ) -> training.StepSnapshot | None:
        """Copy what a probe needs of the position before an update; None at steps without one."""
        return self.functions.snapshot(at, batch, data.reference)

    @checked
    def update(
        self,
        at: training.RunPosition,
        batch: UpdateBatch,
        data: training.StepBatches,
        before: training.StepSnapshot | None = None,
    ) -> tuple[training.RunPosition, StepResult]:
        """Take an optimizer step on a minibatch, and donate the arrays of the position.

        Args:
          at: position.
          batch: one of `data.batches`.
          data: of the step.
          before: snapshot of the same position, or None.
        """
        return self.functions.take(at, batch, data.reference, before)

    @checked
    def summary(self, at: training.RunPosition, results: Sequence[StepResult]) -> dict[str, float]:
        """Return the metrics of a step's updates.

        Raises:
          ValueError: sampler and trainer disagree before the first update.
        """
        values = [{name: float(v) for name, v in r.metrics.items()} for r in results]
        return self.source.summary(values, at.rollout_step)

    @checked
    def end(
        self, at: training.RunPosition, metrics: dict[str, Any]
    ) -> tuple[training.RunPosition, dict[str, Any]]:
        """End a rollout step; return the position and the metrics that count steps.

        Args:
          at: position after the updates.
          metrics: of the step, on which the end of a stage may depend.
        """
        return self.functions.end(at, metrics)

    @checked
    def probe(
        self, at: training.RunPosition, before: training.StepSnapshot, result: StepResult
    ) -> training.StepReading:
        """Read the probe set before and after an update, and predict its change from kernels.

        Args:
          at: position after the update.
          before: snapshot before it.
          result: of the update.
        """
        hook = self.functions.probe_hook
        assert hook is not None  # as of every run with snapshots
        step = training.CompletedStep(before, result.state, result.term_gradients)
        return hook.read(step, at.rollout_step)

    @checked
    def ledger(
        self, reading: training.StepReading
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Attribute the change of every probe token to samples, momentum and decay.

        Returns:
          Arrays by `MEASURE/PART/GROUP`, and metrics; both empty at steps without a ledger.
        """
        hook = self.functions.probe_hook
        assert hook is not None  # as of every run with snapshots
        return hook.account(reading)

    @checked
    def evaluates(self, at: training.RunPosition) -> bool:
        """Return whether `ntkrl.train` evaluates after this rollout step."""
        every = self.functions.settings.evaluation.every_steps
        return self.left(at) == 0 or is_due(every, at.rollout_step)

    @checked
    def evaluate(self, at: training.RunPosition) -> dict[str, Any]:
        """Return the metrics of completions of the held-out prompts."""
        return self.functions.evaluate(at)

    @checked
    def measures(self, at: training.RunPosition) -> dict[str, float]:
        """Return the measures of the probe set."""
        return self.functions.measures(at)

    def _context(self, at: training.RunPosition) -> training.StepContext:
        return self.functions.context(at, Clock())
