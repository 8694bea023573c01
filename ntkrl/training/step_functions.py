"""The parts of a rollout step as functions of the run's position, for the loop and for callers.

They do what `Loop` does with them, and write no metrics and no checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from ntkrl import runtime, update
from ntkrl.evaluation import evaluate_policy, make_evaluation_sampler
from ntkrl.generate import Clock, SampleFn
from ntkrl.setup import RunSetup
from ntkrl.softmax import OutputHead
from ntkrl.training.analysed_step import StepSnapshot
from ntkrl.training.batch_sources import Batch, StepBatches, StepContext
from ntkrl.training.probe_hook import ProbeHook
from ntkrl.training.rollout_source import BATCH_SOURCES
from ntkrl.training.sample_weights import SampleWeights
from ntkrl.training.train_state import JittedStep, TrainStates
from ntkrl.types import Array, Params, TrainState, UpdateBatch
from ntkrl.update import is_due

# streams of keys drawn from a seed, besides the training stream that TrainState carries
EVAL_STREAM, PROBE_STREAM = 1, 2
START: Mapping[str, Any] = {"progress": {}, "num_tokens": 0, "prompt_batches": 0}
"""Position of a new run, as `RunPosition.saved` returns it."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunPosition:
    """State of a run between two steps.

    state: without a reference; donated by the next update.
    reference: params of the reference policy where they move, or None.
    progress: in the current stage.
    rollout_step: begun or finished last. optimizer_steps: taken in all stages.
    stage_updates: optimizer steps of the current optimizer.
    tokens: in all batches so far. batches: of prompts drawn so far.
    key: of the current rollout step, None before the first.
    """

    state: TrainState
    reference: Params | None
    progress: update.Progress
    rollout_step: int
    optimizer_steps: int
    stage_updates: int
    tokens: int
    batches: int
    key: Array | None = None

    def __repr__(self) -> str:
        steps = f"{self.progress.steps} steps of stage {self.progress.stage}"
        return (
            f"RunPosition in rollout step {self.rollout_step}: {steps} done\n"
            f"  {self.optimizer_steps} optimizer steps taken\n"
            f"  {self.batches} batches of prompts drawn, {self.tokens} tokens trained on"
        )

    def saved(self) -> dict[str, Any]:
        """Return the JSON values that a checkpoint holds besides the arrays."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "num_tokens": self.tokens,
            "prompt_batches": self.batches,
        }

    def full_state(self) -> TrainState:
        """Return the arrays that a checkpoint holds."""
        return dataclasses.replace(self.state, reference=self.reference)


class StepFunctions:
    """Functions of a run's position, bound to its model, prompts and stages."""

    def __init__(self, setup: RunSetup, directory: Path):
        """Bind stages, source and probes.

        Raises:
          ValueError: stages or probes that do not fit the model.
        """
        self.setup, self.settings, self.model = setup, setup.settings, setup.model
        self.stages = setup.stages
        self.source = BATCH_SOURCES[self.settings.method.name](setup)
        self.bound_stages = update.bind_stages(
            self.stages, self.model.network, self.model.params, self.settings.schedule.updates
        )
        self.update_reference = jax.jit(optax.incremental_update, donate_argnums=1)
        self.jitted_steps: dict[tuple[int, int, bool], JittedStep] = {}
        self.states = TrainStates(self.settings, self.model)
        self.sample_weights: SampleWeights | None = None
        self.probe_hook: ProbeHook | None = None
        self.eval_sampler: SampleFn | None = None
        held_out, term_losses = setup.held_out is not None, self.source.term_losses
        if held_out and self.settings.evaluates and not self.settings.method.reward_model:
            self.eval_sampler = make_evaluation_sampler(self.settings, self.model)
        if self.settings.method.samples and self.settings.objective.entropy_budget is not None:
            assert term_losses is not None  # as of every run that samples
            self.sample_weights = SampleWeights(
                self.settings, self.model, term_losses, self.bound_stages
            )
        if held_out and self.settings.probes and term_losses is not None:
            # the same seed for every run of a model, so that runs share one probe set
            key = _stream(0, PROBE_STREAM, 0)
            self.probe_hook = ProbeHook(setup, term_losses, self.bound_stages, directory, key)

    def start(self) -> RunPosition:
        """Return the position of a new run."""
        return self.position(0, START, self.states.initial_state(self.bound_stages[0]))

    def position(
        self, rollout_step: int, saved: Mapping[str, Any], state: TrainState
    ) -> RunPosition:
        """Return the position with what a checkpoint holds, see `RunPosition.saved`."""
        return RunPosition(
            # not part of what the step donates, since the step may read its head
            state=dataclasses.replace(state, reference=None),
            reference=state.reference,
            progress=update.reopened(self.stages, update.Progress(**saved["progress"])),
            rollout_step=rollout_step,
            # counted on the host from here on, so that no step waits for the devices
            optimizer_steps=int(state.step),
            stage_updates=update.steps_taken(state.opt_state),
            tokens=saved["num_tokens"],
            batches=saved["prompt_batches"],
        )

    def template(self, saved: Mapping[str, Any]) -> TrainState:
        """Return the shapes and shardings of a checkpoint's arrays."""
        stage = update.Progress(**saved["progress"]).stage
        template = self.states.abstract_state(self.bound_stages[stage])
        return dataclasses.replace(template, key=self.states.initial_key())

    def steps_left(self, at: RunPosition) -> int:
        """Return the rollout steps to the end of all stages, at most."""
        return update.steps_left(self.stages, at.progress)

    def begin(self, at: RunPosition) -> RunPosition:
        """Begin a rollout step: enter the next stage where one has ended, and split the key."""
        if at.progress.ended is not None:
            progress = update.enter_stage(at.progress)
            state = self.states.next_stage_state(self.bound_stages[progress.stage], at.state)
            taken = update.steps_taken(state.opt_state)
            at = dataclasses.replace(at, progress=progress, state=state, stage_updates=taken)
        if at.progress.steps == 0:
            warning = self.bound_stages[at.progress.stage].warning(at.state.params)
            if warning is not None:
                runtime.log(warning)
        next_key, key = jax.random.split(at.state.key)
        state = dataclasses.replace(at.state, key=next_key)
        return dataclasses.replace(at, rollout_step=at.rollout_step + 1, state=state, key=key)

    def context(self, at: RunPosition, clock: Clock) -> StepContext:
        """Return what the source reads of a position; the source goes to its place."""
        bound_stages = self.bound_stages[: at.progress.stage + 1]
        self.source.position = at.batches
        assert at.key is not None  # as after `begin`
        return StepContext(
            params=at.state.params,
            reference=self.model.params if at.reference is None else at.reference,
            bound_stage=bound_stages[-1],
            features_fixed=all(stage.head_alone for stage in bound_stages),
            rollout_step=at.rollout_step,
            key=at.key,
            clock=clock,
            optimizer_steps=at.optimizer_steps,
            tokens=at.tokens,
        )

    def count(self, at: RunPosition, data: StepBatches) -> RunPosition:
        """Count the tokens of a step's batches, and the prompts that the source has drawn."""
        tokens = int(sum(np.count_nonzero(batch.mask) for batch in data.batches))
        return dataclasses.replace(at, tokens=at.tokens + tokens, batches=self.source.position)

    def _weigh(
        self, at: RunPosition, minibatch: Batch, reference: OutputHead | None
    ) -> tuple[Batch, Mapping[str, Any]]:
        """Return a minibatch with the weights of `objective.entropy_budget`, and their metrics."""
        if self.sample_weights is None:
            return minibatch, {}
        assert isinstance(minibatch, UpdateBatch)  # as of every run that samples
        return self.sample_weights.weigh(at.state, minibatch, reference, at.progress.stage)

    def snapshot(
        self, at: RunPosition, minibatch: Batch, reference: OutputHead | None
    ) -> StepSnapshot | None:
        """Copy what analyses of an optimizer step need before it, at rollout steps with any."""
        hook = self.probe_hook
        if hook is None or not hook.is_due(at.rollout_step):
            return None
        minibatch, weighed = self._weigh(at, minibatch, reference)
        assert isinstance(minibatch, UpdateBatch)  # as of every source with term losses
        # copy the buffers that the jitted step donates
        snapshot = hook.snapshot(at.state, minibatch, reference, at.progress.stage, at.rollout_step)
        return dataclasses.replace(snapshot, weight_metrics=weighed)

    def take(
        self,
        at: RunPosition,
        minibatch: Batch,
        reference: OutputHead | None,
        snapshot: StepSnapshot | None,
    ) -> tuple[RunPosition, update.StepResult]:
        """Take an optimizer step; the state of the position is donated.

        Args:
          at: position.
          minibatch: of the step.
          reference: head of the reference policy, see StepBatches.
          snapshot: of the step, or None.
        """
        if snapshot is None:
            plain, weighed = self._weigh(at, minibatch, reference)
            if isinstance(plain, UpdateBatch):  # for ledgers alone
                plain = dataclasses.replace(plain, kl_advantages=None)
        else:
            plain, weighed = snapshot.batch, snapshot.weight_metrics
        batch = runtime.place_rows(plain, self.model.mesh)
        per_term = snapshot is not None and snapshot.with_ledger
        step = self._jitted_step(at, batch, reference, per_term)
        result = step(at.state, batch, reference)
        moved = dataclasses.replace(
            at,
            state=result.state,
            optimizer_steps=at.optimizer_steps + 1,
            stage_updates=at.stage_updates + 1,
        )
        return moved, result._replace(metrics={**result.metrics, **weighed})

    def _jitted_step(
        self, at: RunPosition, batch: Batch, head: OutputHead | None, per_term: bool
    ) -> JittedStep:
        """Return the stage's train step, jitted once per number of rows."""
        stage, rows = at.progress.stage, jax.tree.leaves(batch)[0].shape[0]
        if (stage, rows, per_term) not in self.jitted_steps:
            bound_stage = self.bound_stages[stage]
            microbatches = self.settings.microbatches
            if per_term:
                losses = self.source.term_losses
                assert losses is not None  # as in every run with ledgers
                step = update.make_step_with_term_gradients(bound_stage, losses, microbatches)
            else:
                step = update.make_step(bound_stage, self.source.loss, microbatches)
            self.jitted_steps[stage, rows, per_term] = self.states.jitted_step(
                bound_stage, step, at.state, batch, head
            )
        return self.jitted_steps[stage, rows, per_term]

    def end(
        self, at: RunPosition, metrics: Mapping[str, Any]
    ) -> tuple[RunPosition, dict[str, Any]]:
        """Count a rollout step in its stage, and synchronise the reference policy when due.

        Args:
          at: position after the step's updates.
          metrics: of the step; those of its updates count for stages with a `kl_budget` alone.

        Returns:
          The position, and the metrics that count steps.
        """
        bound_stage, reference = self.bound_stages[at.progress.stage], at.reference
        progress = update.advance(bound_stage.stage, at.progress, metrics)
        if progress.ended is not None:
            runtime.log(f"stage {bound_stage.stage.name!r} ends: {progress.ended}")
        if is_due(self.settings.schedule.reference_sync_steps, at.rollout_step):
            alpha = self.settings.schedule.reference_mixup_alpha
            reference = self.update_reference(at.state.params, reference, alpha)
        counters = {
            "stage": bound_stage.stage.name,
            "rollout_step": at.rollout_step,
            "num_tokens": at.tokens,
            "learning_rate": bound_stage.learning_rate(max(at.stage_updates - 1, 0)),
        }
        return dataclasses.replace(at, progress=progress, reference=reference), counters

    def evaluate(self, at: RunPosition) -> dict[str, Any]:
        """Return the metrics of held-out data."""
        metrics = self.source.evaluate(at.state.params)
        if self.eval_sampler is None:
            return metrics
        key = _stream(self.settings.seed, EVAL_STREAM, at.rollout_step)
        setup = self.setup.during(at.optimizer_steps, at.batches, at.tokens)
        sampled, _ = evaluate_policy(setup, self.eval_sampler, at.state.params, key)
        return sampled | metrics

    def measures(self, at: RunPosition) -> dict[str, float]:
        """Return the measures of the probe set, if there is one."""
        if self.probe_hook is None:
            return {}
        return self.probe_hook.measures(at.state.params, at.rollout_step)


def _stream(seed: int, stream: int, number: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)
