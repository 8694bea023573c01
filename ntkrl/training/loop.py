"""The training loop, for RL and supervised runs alike.

A rollout step asks its source for update batches, takes an optimizer step on each under the
current stage, and every so often looks at the probe set, the held-out prompts and the disk.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from ntkrl import report, runtime, update
from ntkrl.evaluation import evaluate_policy, make_evaluation_sample
from ntkrl.settings import read_settings
from ntkrl.setup import Setup, assemble
from ntkrl.training.batch_sources import BATCH_SOURCES
from ntkrl.training.checkpointing import RunCheckpointer
from ntkrl.training.probe_hook import ProbeHook, bare
from ntkrl.training.sources import StepContext
from ntkrl.training.states import States
from ntkrl.training.steps import jitted_step
from ntkrl.types import Array, TrainState
from ntkrl.update import due

# streams of keys drawn from a seed, besides the training stream that TrainState carries
EVAL_STREAM, PROBE_STREAM = 1, 2
SHARED_SECONDS = 60.0  # until a new file is seen by every host


def train(config: ConfigDict) -> Path:
    """Run or resume a training run; return its directory.

    Args:
      config: see configs/base.py.

    Raises:
      ValueError: a mistake in the config or the files it names, a changed config on resume, a
        reward function's fault, or a loss that is not finite.
      OSError: the disk takes no more.
      PreemptedError: asked to leave by SIGTERM, and saved after the rollout step that was
        under way.
    """
    with runtime.PreemptionNotice() as notice:
        return _train(config, notice)


def _train(config: ConfigDict, notice: runtime.PreemptionNotice) -> Path:
    directory = Path(config.run_dir)
    settings = read_settings(config)
    given = runtime.to_json(config)
    runtime.check_consistent("config", given)
    changed = runtime.check_run_dir(directory, given)
    if runtime.allgather_object("whether it is finished", (directory / "finished").exists())[0]:
        runtime.log(f"{directory} is finished; remove it to run again.")
        return directory
    for change in changed or ():
        runtime.log(f"the config has changed: {change}")
    report.check_loggers(settings.logging)
    setup = assemble(settings, directory)
    loop = Loop(setup, directory, given, notice)
    if runtime.is_writer():
        runtime.claim_run_dir(directory, given)
    _check_shared(directory)
    if settings.method == "rl":
        runtime.log(f"objective: {update.describe(settings.objective)}")
    loop.run()
    setup.export(directory / "export", loop.state.params)
    if loop.reference is not None:
        setup.export(directory / "export_reference", loop.reference)
    if runtime.is_writer():
        report.mark_finished(directory)
    return directory


class Loop:
    """The moving parts of one run: state, stage, counters."""

    def __init__(
        self,
        setup: Setup,
        directory: Path,
        config: dict[str, Any],
        notice: runtime.PreemptionNotice,
    ):
        self.setup, self.settings, self.directory = setup, setup.settings, directory
        self.notice = notice
        self.stages = setup.stages
        self.source = BATCH_SOURCES[self.settings.method](setup)
        self.programs = update.stage_programs(
            self.stages, setup.network, setup.params, self.settings.schedule.updates
        )
        self.mix = jax.jit(optax.incremental_update, donate_argnums=1)
        self.compiled: dict[tuple[int, int, bool], Any] = {}
        self.states = States(setup)
        self.keeper = RunCheckpointer(self.settings, config, directory, self.source.headline)
        self.watcher, self.eval_sample = None, None
        if setup.held_out is not None and setup.policy is not None:
            self.eval_sample = make_evaluation_sample(setup)
            if self.settings.probe.enabled:
                # the same seed for every run of a model, so that runs share one probe set
                key = _stream(0, PROBE_STREAM, 0)
                self.watcher = ProbeHook(setup, self.source, self.programs, directory, key)
        self.clock = _Clock()

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, to the end of the last stage."""
        start = self._resume()
        left = update.steps_left(self.stages, self.progress)
        kept = int(self.state.step) if start else -1
        rollout_step, total, metrics = start, start + left, {}
        shown = {"desc": self.settings.name, "mininterval": 0.5, "disable": not runtime.is_writer()}
        with (
            self.keeper,
            self._writer(start if start else -1, kept) as writer,
            tqdm(total=total, initial=start, **shown) as bar,
        ):
            if self.watcher is not None:
                self.watcher.begin()
            if start == 0:
                measures = {} if self.watcher is None else self.watcher.read(self.state.params, 0)
                writer.write(0, self._evaluate(0) | measures)
                self.clock.lap()
            while left > 0 and not self.notice.reached(rollout_step):
                rollout_step += 1
                metrics = self._advance(rollout_step)
                left = update.steps_left(self.stages, self.progress)
                last = left == 0
                if last or due(self.settings.evaluation.every_steps, rollout_step):
                    metrics |= self._evaluate(rollout_step)
                writer.write(int(self.state.step), metrics)
                if last or due(self.settings.checkpoint.every_steps, rollout_step):
                    self._save(rollout_step, metrics)
                self.keeper.settle(wait=False)
                runtime.record_resume_step(self.keeper.newest())
                writer.write_timings(int(self.state.step), self.clock.lap(), rollout_step)
                headline = self.source.headline
                bar.set_postfix({headline: f"{metrics[headline]:.3f}", "stage": metrics["stage"]})
                bar.total = rollout_step + left
                bar.update()
            if left > 0 and rollout_step > 0:
                self._save(rollout_step, metrics)
        if left > 0:
            raise runtime.PreemptedError(self.keeper.farewell(rollout_step))

    def _writer(self, start: int, kept: int) -> report.MetricsWriter | report.NoWriter:
        """Open metrics and loggers, in the process that writes."""
        if not runtime.is_writer():
            return report.NoWriter()
        given = self.settings.logging
        loggers = report.open_loggers(given, self.directory, self.settings.name, kept)
        return report.MetricsWriter(self.directory, start, loggers)

    def _advance(self, rollout_step: int) -> dict[str, Any]:
        """Take one rollout step: make the batches, update on each, probe the last update."""
        runtime.heartbeat(f"rollout step {rollout_step}")
        self._enter_stage()
        next_key, key = jax.random.split(self.state.key)
        self.state = self.state.replace(key=next_key)
        turn = self._turn(rollout_step, key)
        batches, metrics = self.source.batches(turn)
        self.tokens_seen += int(sum(np.count_nonzero(batch.mask) for batch in batches))
        looking = bool(batches) and self.watcher is not None and self.watcher.due(rollout_step)
        stage = self.progress.stage
        reference = self.source.reference_head(turn)
        logged: list[dict[str, float]] = []
        todo = batches * self.settings.schedule.inner_epochs
        apart, result = False, None
        for number, own in enumerate(todo, start=1):
            batch = bare(own)
            if looking and number == len(todo):  # the step donates its state
                seen = self.watcher.keep(self.state, own, reference, stage, rollout_step)
                batch, apart = seen.batch, seen.before.opt_state is not None
            placed = runtime.place_rows(batch, self.setup.mesh)
            step = self._step(placed, reference, apart)
            result = step(self.state, placed, reference)
            self.state = result.state
            logged.append({name: float(value) for name, value in result.metrics.items()})
            self._check_finite(logged[-1], rollout_step)
            if number == 1:
                self.source.check_first(logged[-1], rollout_step)
        self.clock("update")
        metrics |= self.source.summary(logged)
        metrics |= self._count(metrics, rollout_step)
        if looking:
            seen = seen._replace(after=self.state, gradients=result.term_gradients)
            metrics |= self.watcher.look(seen, stage, rollout_step)
            self.clock("look")
        return metrics

    def _turn(self, rollout_step: int, key: Array) -> StepContext:
        so_far = self.programs[: self.progress.stage + 1]
        return StepContext(
            params=self.state.params,
            reference=self.setup.params if self.reference is None else self.reference,
            program=so_far[-1],
            features_fixed=all(program.head_alone for program in so_far),
            step=rollout_step - 1,
            key=key,
            clock=self.clock,
        )

    def _enter_stage(self) -> None:
        """Where a stage has ended, enter the next: start its optimizer, or hand the state over."""
        if self.progress.ended is not None:
            self.progress = update.enter_stage(self.progress)
            self.state = self.states.next(self.programs[self.progress.stage], self.state)
        if self.progress.steps == 0:
            warning = self.programs[self.progress.stage].warning(self.state.params)
            if warning is not None:
                runtime.log(warning)

    def _count(self, metrics: dict[str, Any], rollout_step: int) -> dict[str, Any]:
        """Count a rollout step in its stage, move the reference; return what is logged of it."""
        program = self.programs[self.progress.stage]
        self.progress = update.advance(program.stage, self.progress, metrics)
        if self.progress.ended is not None:
            runtime.log(f"stage {program.stage.name!r} ends: {self.progress.ended}")
        if due(self.settings.schedule.reference_sync_steps, rollout_step):
            alpha = self.settings.schedule.reference_mixup_alpha
            self.reference = self.mix(self.state.params, self.reference, alpha)
        taken = update.steps_taken(self.state.opt_state)
        return {
            "stage": program.stage.name,
            "rollout_step": rollout_step,
            "num_tokens": self.tokens_seen,
            "learning_rate": program.learning_rate(max(taken - 1, 0)),
        }

    def _step(self, batch: Any, reference: Any, apart: bool) -> Any:
        """Return the stage's compiled train step, or that which hands its gradients out."""
        stage, rows = self.progress.stage, jax.tree.leaves(batch)[0].shape[0]
        if (stage, rows, apart) not in self.compiled:
            minimised = self.source.terms if apart else self.source.minimised
            given = self.setup, self.programs[stage], minimised, self.state, rows, reference
            self.compiled[stage, rows, apart] = jitted_step(*given, apart)
        return self.compiled[stage, rows, apart]

    def _check_finite(self, values: dict[str, float], rollout_step: int) -> None:
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if not bad:
            return
        self.keeper.settle()
        raise ValueError(
            f"{' and '.join(bad)} not finite at step {int(self.state.step)} (rollout step "
            f"{rollout_step}, stage {self.stages[self.progress.stage].name!r}); the last good "
            f"checkpoint is {self.keeper.last_good()}. Lower the stage's learning rate or set "
            "its max_grad_norm."
        )

    def _evaluate(self, rollout_step: int) -> dict[str, Any]:
        beside = self.source.evaluate(self.state.params)
        if self.eval_sample is None:
            return beside
        key = _stream(self.settings.seed, EVAL_STREAM, rollout_step)
        metrics, _ = evaluate_policy(self.setup, self.eval_sample, self.state.params, key)
        self.clock("eval")
        return metrics | beside

    def _resume(self) -> int:
        """Set state, stage and counters from the newest checkpoint; return its rollout step."""
        start, position = 0, {"progress": {}, "num_tokens": 0, "prompt_batches": 0}
        held = self.keeper.resume(self._described)
        if held is None:
            state = self.states.first(self.programs[0])
        else:
            start, position, state = held
            runtime.log(f"resuming {self.directory} after rollout step {start}")
        self.progress = update.Progress(**position["progress"])
        self.tokens_seen = position["num_tokens"]
        self.source.position = position["prompt_batches"]
        # apart from what the step donates, since the step may read its head
        self.reference, self.state = state.reference, state.replace(reference=None)
        runtime.record_resume_step(start)
        return start

    def _described(self, position: Mapping[str, Any]) -> TrainState:
        stage = update.Progress(**position["progress"]).stage
        return self.states.described(self.programs[stage])

    def _save(self, rollout_step: int, metrics: dict[str, Any]) -> None:
        position = {
            "progress": dataclasses.asdict(self.progress),
            "num_tokens": self.tokens_seen,
            "prompt_batches": self.source.position,
        }
        state = self.state.replace(reference=self.reference)
        self.keeper.save(rollout_step, state, position, metrics)
        self.clock("checkpoint")


class _Clock:
    """Seconds per activity since the last lap."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, activity: str) -> None:
        runtime.heartbeat(f"the end of {activity}")
        now = time.perf_counter()
        name = f"{activity}_seconds"
        self.seconds[name] = self.seconds.setdefault(name, 0.0) + now - self.last
        self.last = now

    def lap(self) -> dict[str, float]:
        """Return and forget the seconds so far."""
        seconds, self.seconds = self.seconds, {}
        self.last = time.perf_counter()
        return seconds


def _check_shared(directory: Path) -> None:
    """Check that every process sees the run directory of the first."""
    seen = runtime.allgather_object("the run directory", str(directory.absolute()))
    deadline = time.monotonic() + SHARED_SECONDS if len(seen) > 1 else 0.0
    while not (directory / "config.json").exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{directory} is not the directory that process 0 writes to ({seen[0]} there); "
                "give a run_dir on a file system that all hosts share."
            )
        time.sleep(0.5)


def _stream(seed: int, stream: int, number: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)
