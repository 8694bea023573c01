"""Checkpoint save and restore of a run, and how failures are reported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ntkrl import data, report, runtime
from ntkrl.settings import RunSettings
from ntkrl.types import TrainState

FORMAT = 2
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunCheckpointer:
    """Saves and restores the checkpoints of a run directory.

    Checkpoints are saved between rollout steps, where inner epoch and minibatch are 0 by
    construction. Beside the TrainState (params, optimizer, reference, PRNG key, step) they hold the
    position: the stage with its running statistics, the place in the order of the prompts, the
    tokens counted, the config with its hash, hashes of the files that rewards and prompts come
    from, versions, and the record of the lines and files that the run has written.
    """

    def __init__(self, settings: RunSettings, config: Mapping[str, Any], directory: Path):
        """Open the checkpoints of a run.

        Args:
          settings: the config, read.
          config: as JSON values.
          directory: the run directory.
        """
        self.settings, self.config, self.directory = settings.checkpoint, config, directory
        self.begun = (directory / "config.json").exists()
        self.failures = 0
        ranking = self.settings.ranking(settings.method.headline)
        self.checkpoints = runtime.Checkpoints(
            directory / "checkpoints", self.settings.keep, ranking
        )
        self.provenance: dict[str, Any] = {
            "format": FORMAT,
            "config": config,
            "config_hash": _hash(runtime.config_identity(config)),
            "files": {name: _file_hash(name) for name in _files(settings)},
            "versions": {name: version(name) for name in PACKAGES},
        }

    def __enter__(self) -> RunCheckpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish the pending save; if the run fails anyway, a failed save is only logged."""
        try:
            self.wait_for_save()
        except OSError as error:
            if kind is None:
                raise
            runtime.log(str(error))
        finally:
            self.checkpoints.close()

    def resume(
        self, template: Callable[[Mapping[str, Any]], TrainState]
    ) -> tuple[int, dict[str, Any], TrainState] | None:
        """Restore the newest intact checkpoint; corrupt ones after it are reported and quarantined.

        Lines of `metrics.jsonl` that were lost since are restored too, and reported.

        Args:
          template: returns a state with the structure and shardings to restore, given the position.

        Returns:
          Its rollout step, position and state; None if nothing was ever saved.

        Raises:
          ValueError: it has another config or format, or none is intact.
        """
        damaged: dict[int, runtime.CorruptCheckpointError] = {}
        for step in reversed(self.checkpoints.steps()):
            try:
                position = self.checkpoints.position(step)
                self._check(step, position)
                state = self.checkpoints.restore(step, template(position))
            except runtime.CorruptCheckpointError as error:
                damaged[step] = error
                continue
            for number, reason in damaged.items():
                place = self.checkpoints.quarantine(number)
                runtime.log(
                    f"the checkpoint of step {number} is damaged ({reason}) and now called "
                    f"{place}; going back to step {step}"
                )
            self._log_changes(step, position)
            self._restore_files(step, position)
            return step, position, state
        if damaged:
            listed = "; ".join(f"step {number}: {reason}" for number, reason in damaged.items())
            raise ValueError(
                f"no checkpoint in {self.checkpoints.directory} can be read ({listed}). Put intact "
                "ones there, or remove the run directory to start over."
            )
        if self.begun:
            lines = report.count_objects(self.directory / "metrics.jsonl")
            replaced = f"; {lines} lines of metrics.jsonl are replaced" if lines else ""
            runtime.log(f"{self.directory} has no checkpoint yet: starting over{replaced}")
        return None

    def _check(self, step: int, position: Mapping[str, Any]) -> None:
        place = f"the checkpoint of step {step} in {self.checkpoints.directory}"
        if position["format"] != FORMAT:
            raise ValueError(
                f"{place} has format {position['format']}, this version of ntkrl reads {FORMAT}; "
                "resume with the version that wrote it."
            )
        if position["config_hash"] != self.provenance["config_hash"]:
            runtime.config_changes(position["config"], self.config, place)
        stage = position["progress"].get("stage", 0)
        _, refused = runtime.stage_lengths(position["config"], self.config, stage)
        if refused:
            raise ValueError(f"{place} is of another config: {'; '.join(refused)}.")

    def _log_changes(self, step: int, position: Mapping[str, Any]) -> None:
        """Log changed files and packages; the numbers of the run may differ from here on."""
        for kind in ("files", "versions"):
            before, now = position[kind], self.provenance[kind]
            for name in sorted(before.keys() & now.keys()):
                if before[name] != now[name]:
                    change = f": {before[name]} -> {now[name]}" if kind == "versions" else ""
                    runtime.log(f"{name} has changed since step {step} was saved{change}")

    def _restore_files(self, step: int, position: Mapping[str, Any]) -> None:
        """Restore lost lines of metrics; report what else the run directory has lost."""
        if not runtime.is_writer():
            return
        record = report.LineRecord(**position["lines"])
        for message in report.restore_lines(self.directory, record):
            runtime.log(message)
        for name in report.changed_files(self.directory, position["readings"]):
            runtime.log(
                f"{self.directory / name} is missing or has changed since step {step} was saved; "
                "the report and statistics over past readings lack it"
            )

    def save(
        self,
        step: int,
        state: TrainState,
        position: Mapping[str, Any],
        metrics: Mapping[str, Any] | None,
        lines: report.LineRecord | None,
    ) -> None:
        """Start to save a checkpoint while training goes on; a save that fails is logged.

        Args:
          step: rollout steps finished.
          state: may be donated after the call.
          position: JSON values besides those that the RunCheckpointer adds.
          metrics: metrics of the step.
          lines: record of the lines written so far, synced; None in processes that write none.

        Raises:
          OSError: as `wait_for_save`.
        """
        self.wait_for_save()
        values = {**self.provenance, **position}
        if lines is not None:  # in process 0, which writes the position
            values["lines"] = dataclasses.asdict(lines)
            values["readings"] = report.file_sizes(self.directory)
        try:
            self.checkpoints.save(step, state, values, metrics)
        except runtime.CheckpointWriteError as error:
            self._failed(error)

    def wait_for_save(self, block: bool = True) -> None:
        """Wait for the pending save, or poll whether it is done.

        Raises:
          OSError: too many checkpoints in a row could not be written, or one of several processes
            could not write.
        """
        pending = self.checkpoints.pending
        try:
            self.checkpoints.finish_saving(block)
        except runtime.CheckpointWriteError as error:
            self._failed(error)
        else:
            if pending != self.checkpoints.pending:
                self.failures = 0

    def _failed(self, error: runtime.CheckpointWriteError) -> None:
        self.failures += 1
        message = f"{error}; the last good checkpoint is {self.last_good()}"
        if jax.process_count() > 1 or self.failures >= self.settings.failures:
            raise OSError(
                f"{message}. {self.failures} in a row failed (checkpoint.failures); make room, and "
                "run the same command again."
            ) from error
        runtime.log(f"{message}; going on")

    def newest(self) -> int:
        """Return the rollout step that the run would resume after; 0 for a fresh start."""
        step = self.checkpoints.latest()
        return 0 if step is None else step

    def last_good(self) -> str:
        """Return the newest checkpoint, in words."""
        step = self.checkpoints.latest()
        return "none yet" if step is None else f"step {step} in {self.checkpoints.directory}"

    def preemption_message(self, step: int, signal: str) -> str:
        """Return what was saved of a run that a signal, by its name, ended after a rollout step."""
        if step == 0:
            return f"stopped by {signal} before the first rollout step; run the same command again."
        saved = f"saved step {step}"
        if self.checkpoints.latest() != step:
            saved = f"step {step} could not be saved, the last good checkpoint is "
            saved += self.last_good()
        return f"stopped by {signal}; {saved}; run the same command again."


def is_finished(directory: Path, has_config: bool, longer: bool = False) -> bool:
    """Return whether the run is finished and intact; report damage that running it again mends.

    Args:
      directory: the run directory.
      has_config: whether it has a config.json, which the caller has compared.
      longer: whether its stages are longer than when it was finished.

    Raises:
      ValueError: it is damaged, and has no checkpoint to mend it from.
    """
    problems = None
    if runtime.is_writer():
        problems = report.finished_problems(directory)
    problems = runtime.allgather_object("whether it is finished", problems)[0]
    if problems is not None and not has_config:
        problems.append("config.json is missing")
    if problems is not None and longer:
        problems.append("its stages have become longer")
    if not problems:
        return problems is not None
    listed = f"{directory} is marked as finished, but {'; '.join(problems)}"
    if not any(path.name.isdigit() for path in (directory / "checkpoints").glob("*")):
        raise ValueError(
            f"{listed}, and it has no checkpoint to mend it from: put the files back, set another "
            "--config.run_dir, or remove the directory to start over."
        )
    runtime.log(f"{listed}: resuming from the last checkpoint")
    return False


def _files(settings: RunSettings) -> list[str]:
    """Return the files named in the config whose content affects the numbers of a run."""
    paths: list[str | None] = [spec.rpartition(":")[0] for spec, _ in settings.reward.functions]
    paths += [settings.reward.normalisation, settings.model.template, settings.evaluation.base]
    if settings.rollout.engine is not None:
        paths.append(settings.rollout.engine.rpartition(":")[0])
    for listed in (settings.data.path, settings.data.eval_path):
        paths += [] if listed is None else data.split_names(listed)
    return [name for name in paths if name is not None and Path(name).is_file()]


def _file_hash(name: str) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
