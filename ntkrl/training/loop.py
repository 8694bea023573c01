"""The training loop, for every method.

A rollout step asks its source for batches, takes an optimizer step on each under the current
stage, and every so often reads the probe set, evaluates and saves a checkpoint. Metrics are
fetched one rollout step late, so that the devices never wait for the host.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntkrl import report, runtime
from ntkrl.generate import Clock
from ntkrl.runtime import PreemptionNotice
from ntkrl.setup import RunSetup
from ntkrl.training.analysed_step import CompletedStep
from ntkrl.training.checkpointing import RunCheckpointer
from ntkrl.training.progress_bar import StepBar
from ntkrl.training.rollout_log import RolloutLog
from ntkrl.training.rollout_step import RolloutStep
from ntkrl.training.step_functions import RunPosition, StepFunctions
from ntkrl.update import is_due

OnStep = Callable[[int, dict[str, Any]], Any]


class Loop:
    """The state of one run.

    at: position. writer, rollout_log, bar: metrics, log of completions and progress bar, while
      `run` trains.
    lines: record of the lines written, after `run`; None in processes that write none.
    """

    at: RunPosition
    writer: report.MetricsWriter | report.NoWriter
    rollout_log: RolloutLog
    bar: StepBar
    lines: report.LineRecord | None

    def __init__(
        self,
        setup: RunSetup,
        directory: Path,
        config: dict[str, Any],
        notice: PreemptionNotice,
        on_step: OnStep | None = None,
    ):
        """Bind stages, source, checkpoints and probes; `run` trains.

        Args:
          setup: the run.
          directory: of the run.
          config: as JSON values.
          notice: of signals.
          on_step: called with the optimizer steps and the metrics of each rollout step when they
            are written; stops the run where it returns "stop".

        Raises:
          ValueError: stages or probes that do not fit the model.
        """
        self.setup, self.settings, self.directory = setup, setup.settings, directory
        self.notice, self.on_step, self.puzzled = notice, on_step, False
        self.steps = StepFunctions(setup, directory)
        self.checkpointer = RunCheckpointer(self.settings, config, directory)
        self.clock = Clock()

    def run(self) -> int:
        """Train from the newest checkpoint to the end of all stages; return the rollout steps."""
        start = rollout_step = self._resume()
        previous: RolloutStep | None = None
        total, name, quiet = start + self._steps_left(), self.settings.name, not runtime.is_writer()
        bar = StepBar(total=total, initial=start, desc=name, mininterval=0.5, disable=quiet)
        log = RolloutLog(self.setup, self.directory, start)
        with bar, self.checkpointer, log, self._open_writer(start) as writer:
            self.writer, self.rollout_log, self.bar = writer, log, bar
            if self.steps.probe_hook is not None:
                self.steps.probe_hook.write_set()
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
                log.write(current)
                self.clock("log")
                if last or is_due(self.settings.evaluation.every_steps, rollout_step):
                    self._fetch(current)
                    current.counters |= self._evaluate()
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
            log.sync()
            self.lines = writer.sync(runtime.log)
        if left:
            text = self.checkpointer.preemption_message(rollout_step, self.notice.signal_name())
            raise runtime.PreemptedError(text, self.notice.received)
        return rollout_step

    def _advance(self, rollout_step: int) -> RolloutStep:
        """Dispatch one rollout step: make its batches and take an optimizer step on each."""
        runtime.heartbeat(f"rollout step {rollout_step}")
        self.at = self.steps.begin(self.at)
        data = self.steps.source.batches(self.steps.context(self.at, self.clock))
        self.at = self.steps.count(self.at, data)
        batches = [*data.batches] * self.settings.schedule.inner_epochs
        metrics, completed = [], None
        for number, minibatch in enumerate(batches, start=1):
            snapshot = None
            if number == len(batches):
                snapshot = self.steps.snapshot(self.at, minibatch, data.reference)
            self.at, result = self.steps.take(self.at, minibatch, data.reference, snapshot)
            metrics.append(result.metrics)
            if snapshot is not None:
                completed = CompletedStep(snapshot, result.state, result.term_gradients)
        self.clock("update")
        stage = self.steps.stages[self.at.progress.stage]
        taken = self.at.optimizer_steps
        current = RolloutStep(rollout_step, taken, stage.name, data.metrics, metrics)
        current.completed, current.rollouts = completed, data.rollouts
        if stage.kl_budget is not None:
            self._fetch(current)  # whether the stage ends depends on it
        self.at, current.counters = self.steps.end(self.at, current.metrics)
        return current

    def _steps_left(self) -> int:
        return self.steps.steps_left(self.at)

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
        step.metrics |= self.steps.source.summary(values, step.rollout_step)
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
        self._report(step)
        headline = self.settings.method.headline
        self.bar.set_postfix({headline: f"{step.metrics[headline]:.3f}", "stage": step.stage})
        self.bar.update()

    def _analyse(self, current: RolloutStep) -> None:
        """Add the measures of the probe hook, where it analyses the step."""
        if self.steps.probe_hook is None or current.completed is None:
            return
        self._fetch(current)
        current.counters |= self.steps.probe_hook.analyse(current.completed, current.rollout_step)
        current.completed = None
        self.clock("look")

    def _report(self, step: RolloutStep) -> None:
        """Report a step to the calling program, and stop where it says so."""
        if self.on_step is None:
            return
        stop = False
        if runtime.is_writer():
            result = self.on_step(step.optimizer_steps, dict(step.metrics))
            stop = isinstance(result, str) and result == "stop"
            if not stop and isinstance(result, str | bool) and result and not self.puzzled:
                self.puzzled = True
                runtime.log(f'warning: on_step returned {result!r}; only "stop" ends the run')
        if runtime.allgather_object("whether to stop", bool(stop))[0]:
            self.notice.stop()

    def _evaluate(self) -> dict[str, Any]:
        metrics = self.steps.evaluate(self.at)
        if self.steps.eval_sampler is not None:
            self.clock("eval")
        return metrics

    def _write_start(self) -> None:
        """Measure and write the metrics before the first step."""
        metrics = self._evaluate() | self.steps.measures(self.at)
        self.writer.write(0, metrics)
        self.clock.lap()

    def _open_writer(self, start: int) -> report.MetricsWriter | report.NoWriter:
        """Open metrics and loggers, in the process that writes."""
        if not runtime.is_writer():
            return report.NoWriter()
        settings, resumed = self.settings, start if start else -1
        logged = self.at.optimizer_steps if start else -1
        loggers = report.open_loggers(settings.logging, self.directory, settings.name, logged)
        return report.MetricsWriter(self.directory, resumed, loggers)

    def _resume(self) -> int:
        """Set the position from the newest checkpoint; return its rollout step."""
        checkpoint = self.checkpointer.resume(self.steps.template)
        if checkpoint is None:
            self.at = self.steps.start()
        else:
            self.at = self.steps.position(*checkpoint)
            runtime.log(f"resuming {self.directory} after rollout step {self.at.rollout_step}")
        runtime.record_resume_step(self.at.rollout_step)
        return self.at.rollout_step

    def _save(self, rollout_step: int, metrics: dict[str, Any]) -> None:
        self.rollout_log.sync()
        lines = self.writer.sync(runtime.log)
        state, position = self.at.full_state(), self.at.saved()
        self.checkpointer.save(rollout_step, state, position, metrics, lines)
        self.clock("checkpoint")
