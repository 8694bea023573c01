"""The training loop, for every method.

A rollout step asks its source for batches, takes an optimizer step on each under the current
stage, and every so often reads the probe set, evaluates and saves a checkpoint. Metrics are
fetched one rollout step late, so that the devices never wait for the host.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from ntkrl import report, runtime, update
from ntkrl.evaluation import evaluate_policy, make_evaluation_sampler
from ntkrl.generate import Clock, SampleFn
from ntkrl.runtime import PreemptionNotice
from ntkrl.setup import RunSetup
from ntkrl.softmax import OutputHead
from ntkrl.training.batch_sources import Batch, StepContext
from ntkrl.training.checkpointing import RunCheckpointer
from ntkrl.training.probe_hook import CompletedStep, ProbeHook
from ntkrl.training.progress_bar import StepBar
from ntkrl.training.rollout_source import BATCH_SOURCES
from ntkrl.training.rollout_step import RolloutStep
from ntkrl.training.train_state import JittedStep, TrainStates
from ntkrl.types import Array, Params, TrainState, UpdateBatch
from ntkrl.update import is_due

# streams of keys drawn from a seed, besides the training stream that TrainState carries
EVAL_STREAM, PROBE_STREAM = 1, 2


class Loop:
    """The state of one run.

    state: without a reference. reference: params of the reference policy where they move, or None.
    progress: in the current stage. tokens_seen: in all batches so far.
    step_count, stage_updates: optimizer steps in all stages, and of the current optimizer.
    writer, bar: metrics file and progress bar, while `run` trains.
    lines: record of the lines written, after `run`; None in processes that write none.
    """

    state: TrainState
    reference: Params | None
    progress: update.Progress
    tokens_seen: int
    step_count: int
    stage_updates: int
    writer: report.MetricsWriter | report.NoWriter
    bar: StepBar
    lines: report.LineRecord | None

    def __init__(
        self, setup: RunSetup, directory: Path, config: dict[str, Any], notice: PreemptionNotice
    ):
        """Bind stages, source, checkpoints and probes; `run` trains.

        Raises:
          ValueError: stages or probes that do not fit the model.
        """
        self.setup, self.settings, self.directory = setup, setup.settings, directory
        self.model, self.notice, self.stages = setup.model, notice, setup.stages
        self.source = BATCH_SOURCES[self.settings.method.name](setup)
        self.bound_stages = update.bind_stages(
            self.stages, self.model.network, self.model.params, self.settings.schedule.updates
        )
        self.update_reference = jax.jit(optax.incremental_update, donate_argnums=1)
        self.jitted_steps: dict[tuple[int, int, bool], JittedStep] = {}
        self.states = TrainStates(self.settings, self.model)
        self.checkpointer = RunCheckpointer(self.settings, config, directory)
        self.probe_hook: ProbeHook | None = None
        self.eval_sampler: SampleFn | None = None
        if setup.held_out is not None and not self.settings.method.reward_model:
            self.eval_sampler = make_evaluation_sampler(self.settings, self.model)
            term_losses = self.source.term_losses
            if self.settings.probes and term_losses is not None:
                # the same seed for every run of a model, so that runs share one probe set
                key = _stream(0, PROBE_STREAM, 0)
                self.probe_hook = ProbeHook(setup, term_losses, self.bound_stages, directory, key)
        self.clock = Clock()

    def run(self) -> int:
        """Train from the newest checkpoint to the end of all stages; return the rollout steps."""
        start = rollout_step = self._resume()
        previous: RolloutStep | None = None
        total, name, quiet = start + self._steps_left(), self.settings.name, not runtime.is_writer()
        bar = StepBar(total=total, initial=start, desc=name, mininterval=0.5, disable=quiet)
        with bar, self.checkpointer, self._open_writer(start) as writer:
            self.writer, self.bar = writer, bar
            if self.probe_hook is not None:
                self.probe_hook.write_set()
            if start == 0 and self.notice.received is None:
                self._write_start()
            while self._steps_left() > 0 and not self.notice.reached(rollout_step):
                rollout_step += 1
                try:
                    current = self._advance(rollout_step)
                except Exception:
                    self._write_metrics(previous)  # its non-finite loss is reported instead
                    raise
                self._write_metrics(previous)  # while the devices work on the current step
                previous, bar.total = current, rollout_step + self._steps_left()
                last = self._steps_left() == 0
                self._analyse(current)
                if last or is_due(self.settings.evaluation.every_steps, rollout_step):
                    self._fetch(current)
                    current.counters |= self._evaluate(rollout_step)
                if last or is_due(self.settings.checkpoint.every_steps, rollout_step):
                    self._write_metrics(current)
                    self._save(rollout_step, current.metrics)
                self.checkpointer.wait_for_save(block=False)
                runtime.record_resume_step(self.checkpointer.newest())
                writer.write_timings(current.optimizer_steps, self.clock.lap(), rollout_step)
            self._write_metrics(previous)
            left = self._steps_left() > 0
            if left and rollout_step > 0:
                self._save(rollout_step, {} if previous is None else previous.metrics)
            self.lines = writer.sync(runtime.log)
        if left:
            signal = self.notice.signal_name()
            raise runtime.PreemptedError(self.checkpointer.preemption_message(rollout_step, signal))
        return rollout_step

    def _advance(self, rollout_step: int) -> RolloutStep:
        """Dispatch one rollout step: make its batches and take an optimizer step on each."""
        runtime.heartbeat(f"rollout step {rollout_step}")
        self._enter_stage()
        next_key, key = jax.random.split(self.state.key)
        self.state = dataclasses.replace(self.state, key=next_key)
        data = self.source.batches(self._context(rollout_step, key))
        self.tokens_seen += int(sum(np.count_nonzero(batch.mask) for batch in data.batches))
        batches = [*data.batches] * self.settings.schedule.inner_epochs
        hook = self.probe_hook
        probed = bool(batches) and hook is not None and hook.is_due(rollout_step)
        stage, metrics, snapshot, completed = self.progress.stage, [], None, None
        for number, minibatch in enumerate(batches, start=1):
            plain: Batch = minibatch
            if isinstance(minibatch, UpdateBatch):  # only ledgers read the KL's part by itself
                plain = dataclasses.replace(minibatch, kl_advantages=None)
            if hook is not None and probed and number == len(batches):
                assert isinstance(minibatch, UpdateBatch)  # as of every source with term losses
                # copy the buffers that the jitted step donates
                snapshot = hook.snapshot(self.state, minibatch, data.reference, stage, rollout_step)
                plain = snapshot.batch
            batch = runtime.place_rows(plain, self.model.mesh)
            per_term = snapshot is not None and snapshot.with_ledger
            step = self._jitted_step(batch, data.reference, per_term)
            result = step(self.state, batch, data.reference)
            self.state = result.state
            metrics.append(result.metrics)
            if snapshot is not None:
                completed = CompletedStep(snapshot, result.state, result.term_gradients)
        self.clock("update")
        self.step_count += len(batches)
        self.stage_updates += len(batches)
        name = self.stages[stage].name
        current = RolloutStep(rollout_step, self.step_count, name, data.metrics, metrics)
        current.completed = completed
        self._end_rollout_step(current)
        return current

    def _jitted_step(self, batch: Batch, head: OutputHead | None, per_term: bool) -> JittedStep:
        """Return the stage's train step, jitted once per number of rows."""
        stage, rows = self.progress.stage, jax.tree.leaves(batch)[0].shape[0]
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
                bound_stage, step, self.state, batch, head
            )
        return self.jitted_steps[stage, rows, per_term]

    def _context(self, rollout_step: int, key: Array) -> StepContext:
        bound_stages = self.bound_stages[: self.progress.stage + 1]
        return StepContext(
            params=self.state.params,
            reference=self.model.params if self.reference is None else self.reference,
            bound_stage=bound_stages[-1],
            features_fixed=all(stage.head_alone for stage in bound_stages),
            rollout_step=rollout_step,
            key=key,
            clock=self.clock,
        )

    def _enter_stage(self) -> None:
        """Enter the next stage where one has ended: start its optimizer, or transfer the state."""
        if self.progress.ended is not None:
            self.progress = update.enter_stage(self.progress)
            bound_stage = self.bound_stages[self.progress.stage]
            self.state = self.states.next_stage_state(bound_stage, self.state)
            self.stage_updates = update.steps_taken(self.state.opt_state)
        if self.progress.steps == 0:
            warning = self.bound_stages[self.progress.stage].warning(self.state.params)
            if warning is not None:
                runtime.log(warning)

    def _end_rollout_step(self, current: RolloutStep) -> None:
        """Count a rollout step in its stage, and synchronise the reference policy when due."""
        bound_stage = self.bound_stages[self.progress.stage]
        if bound_stage.stage.kl_budget is not None:
            self._fetch(current)  # whether the stage ends depends on it
        self.progress = update.advance(bound_stage.stage, self.progress, current.metrics)
        if self.progress.ended is not None:
            runtime.log(f"stage {bound_stage.stage.name!r} ends: {self.progress.ended}")
        if is_due(self.settings.schedule.reference_sync_steps, current.rollout_step):
            alpha = self.settings.schedule.reference_mixup_alpha
            self.reference = self.update_reference(self.state.params, self.reference, alpha)
        current.counters = {
            "stage": bound_stage.stage.name,
            "rollout_step": current.rollout_step,
            "num_tokens": self.tokens_seen,
            "learning_rate": bound_stage.learning_rate(max(self.stage_updates - 1, 0)),
        }

    def _steps_left(self) -> int:
        return update.steps_left(self.stages, self.progress)

    def _fetch(self, step: RolloutStep) -> None:
        """Fetch the metrics of a step's optimizer steps, waiting for them to be computed.

        Raises:
          ValueError: a loss or gradient that is not finite, or what the source raises.
        """
        if step.pending is None:
            return
        values = [{name: float(v) for name, v in metrics.items()} for metrics in step.pending]
        for number, metrics in enumerate(values, start=step.optimizer_steps - len(values) + 1):
            self._check_finite(metrics, number, step)
        step.metrics |= self.source.summary(values, step.rollout_step)
        step.pending = None

    def _check_finite(self, metrics: dict[str, float], number: int, step: RolloutStep) -> None:
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if bad:
            self.checkpointer.wait_for_save()
            raise ValueError(
                f"{' and '.join(bad)} not finite at step {number} (rollout step "
                f"{step.rollout_step}, stage {step.stage!r}); the last good checkpoint is "
                f"{self.checkpointer.last_good()}. Lower the stage's learning rate or set its "
                "max_grad_norm."
            )

    def _write_metrics(self, step: RolloutStep | None) -> None:
        """Write the metrics of a rollout step, unless they are written."""
        if step is None or not step.counters:
            return
        self._fetch(step)
        step.metrics |= step.counters
        step.counters = {}
        self.writer.write(step.optimizer_steps, step.metrics)
        headline = self.settings.method.headline
        self.bar.set_postfix({headline: f"{step.metrics[headline]:.3f}", "stage": step.stage})
        self.bar.update()

    def _analyse(self, current: RolloutStep) -> None:
        """Add the measures of the probe hook, where it analyses the step."""
        if self.probe_hook is None or current.completed is None:
            return
        self._fetch(current)
        current.counters |= self.probe_hook.analyse(current.completed, current.rollout_step)
        current.completed = None
        self.clock("look")

    def _evaluate(self, rollout_step: int) -> dict[str, Any]:
        metrics = self.source.evaluate(self.state.params)
        if self.eval_sampler is None:
            return metrics
        key = _stream(self.settings.seed, EVAL_STREAM, rollout_step)
        sampled, _ = evaluate_policy(self.setup, self.eval_sampler, self.state.params, key)
        self.clock("eval")
        return sampled | metrics

    def _write_start(self) -> None:
        """Measure and write the metrics before the first step."""
        metrics = self._evaluate(0)
        if self.probe_hook is not None:
            metrics |= self.probe_hook.measures(self.state.params, 0)
        self.writer.write(0, metrics)
        self.clock.lap()

    def _open_writer(self, start: int) -> report.MetricsWriter | report.NoWriter:
        """Open metrics and loggers, in the process that writes."""
        if not runtime.is_writer():
            return report.NoWriter()
        settings, (resumed, logged) = self.settings, (start, self.step_count) if start else (-1, -1)
        loggers = report.open_loggers(settings.logging, self.directory, settings.name, logged)
        return report.MetricsWriter(self.directory, resumed, loggers)

    def _resume(self) -> int:
        """Set state, stage and counters from the newest checkpoint; return its rollout step."""
        start = 0
        position: dict[str, Any] = {"progress": {}, "num_tokens": 0, "prompt_batches": 0}
        checkpoint = self.checkpointer.resume(self._template)
        if checkpoint is None:
            state = self.states.initial_state(self.bound_stages[0])
        else:
            start, position, state = checkpoint
            runtime.log(f"resuming {self.directory} after rollout step {start}")
        self.progress = update.Progress(**position["progress"])
        self.tokens_seen = position["num_tokens"]
        self.source.position = position["prompt_batches"]
        # not part of what the step donates, since the step may read its head
        self.reference, self.state = state.reference, dataclasses.replace(state, reference=None)
        # counted on the host from here on, so that no step waits for the devices
        self.step_count = int(state.step)
        self.stage_updates = update.steps_taken(state.opt_state)
        runtime.record_resume_step(start)
        return start

    def _template(self, position: Mapping[str, Any]) -> TrainState:
        stage = update.Progress(**position["progress"]).stage
        template = self.states.abstract_state(self.bound_stages[stage])
        return dataclasses.replace(template, key=self.states.initial_key())

    def _save(self, rollout_step: int, metrics: dict[str, Any]) -> None:
        position = {
            "progress": dataclasses.asdict(self.progress),
            "num_tokens": self.tokens_seen,
            "prompt_batches": self.source.position,
        }
        state = dataclasses.replace(self.state, reference=self.reference)
        lines = self.writer.sync(runtime.log)
        self.checkpointer.save(rollout_step, state, position, metrics, lines)
        self.clock("checkpoint")


def _stream(seed: int, stream: int, number: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)
