"""Atomic, asynchronous checkpoints by Orbax with checksums: one directory per step.

Orbax copies the arrays to the host, writes them to a temporary directory while training continues
and renames it, so that a kill leaves complete checkpoints only. Its files are synced before that
name appears, and the name before an older checkpoint is removed, so that a power cut does the same.
They have no checksum of their data: one per array, saved beside them, detects later corruption.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ntkrl import durable_files, json_files
from ntkrl.runtime.checksums import checksums
from ntkrl.types import Params, TrainState

# errors are also raised as exceptions, which callers report in one sentence
logging.getLogger("absl").addFilter(lambda record: record.levelno > logging.ERROR)
# of several writes that fail together, asyncio logs all but the first, which is raised
logging.getLogger("asyncio").addFilter(lambda record: not _is_of_orbax(record))

WRITER_SECONDS = 60.0  # limit for threads that still write after a failed save
POLLS, POLL_SECONDS = 5, 0.1  # consecutive polls without new files that count as finished

CONTENT = {"state", "position", "sums", "metrics", "_CHECKPOINT_METADATA", "commit_success.txt"}
"""Names in the directory of a checkpoint."""

_default_hook = sys.unraisablehook


def _is_of_orbax(record: logging.LogRecord) -> bool:
    """Return whether a logged exception was raised by a coroutine of Orbax, or by TensorStore."""
    _, error, trace = record.exc_info or (None, None, None)
    if trace is None:  # raised outside Python
        return "os_error_code" in str(error)
    frames = (frame for frame, _ in traceback.walk_tb(trace))
    return any(str(frame.f_globals.get("__name__")).startswith("orbax.") for frame in frames)


def _is_late_write(event: Any) -> bool:
    """Return whether an unraisable error is of a write that finished after its save had failed.

    TensorStore's threads then call Orbax's closed event loop, with no Python frame between.
    """
    trace = event.exc_traceback
    if event.object is not None or trace is None or str(event.exc_value) != "Event loop is closed":
        return False
    return trace.tb_frame.f_code is asyncio.BaseEventLoop.call_soon_threadsafe.__code__


sys.unraisablehook = lambda event: None if _is_late_write(event) else _default_hook(event)


class SyncedDirectory(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that is on the disk before it has its name, and its name before Orbax goes on.

    Orbax removes older checkpoints afterwards. Of its files, only those of arrays are synced
    without this.
    """

    async def finalize(self) -> None:
        """Rename the directory."""
        await asyncio.to_thread(durable_files.sync_tree, Path(self.get()))
        await super().finalize()  # writes two files more, which restoring does not need
        await asyncio.to_thread(durable_files.sync_tree, Path(self.get_final()))
        await asyncio.to_thread(durable_files.sync_directory, Path(self.get_final()).parent)


class CorruptCheckpointError(Exception):
    """A checkpoint that cannot be read, or whose content has changed since it was saved."""


class CheckpointWriteError(Exception):
    """A checkpoint that could not be written; earlier ones are intact."""


@dataclasses.dataclass(frozen=True)
class Best:
    """Retention of the best checkpoints in addition to the newest.

    count: number of them. metric: name of the ranking metric. mode: "max" or "min".
    """

    count: int
    metric: str
    mode: str

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric; the worst value for a checkpoint that was ranked by another."""
        worst = -math.inf if self.mode == "max" else math.inf
        return metrics[self.metric] if self.metric in metrics else worst


class Checkpoints:
    """The checkpoints of one run directory.

    Each contains the TrainState, a JSON position (rollout step, stage, …) and their checksums.
    """

    def __init__(
        self, directory: str | Path, keep: int, best: Best | None = None, reading: bool = False
    ):
        """Open the directory and remove incomplete checkpoints.

        Args:
          directory: of the checkpoints, created if missing.
          keep: number of newest checkpoints to retain, ≥ 1.
          best: retention of others, or None.
          reading: create and remove nothing, since a run may be writing there.

        Raises:
          ValueError: numbered directories there that are not checkpoints.
        """
        self.directory = Path(directory).absolute()
        self.keep, self.best, self.reading = keep, best, reading
        self.pending: int | None = None
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        retained: list[Any] = [policies.LatestN(self.keep)]
        ranked: dict[str, Any] = {}
        if self.best is not None:
            ranked = {"best_fn": self.best.value, "best_mode": self.best.mode}
            retained.append(
                policies.BestN(
                    get_metric_fn=self.best.value,
                    reverse=self.best.mode == "min",
                    n=self.best.count,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(retained),
            cleanup_tmp_directories=not self.reading,
            create=not self.reading,
            read_only=self.reading,
            temporary_path_class=SyncedDirectory,
            **ranked,
        )
        if not self.reading and jax.process_index() == 0:
            _check_foreign(self.directory)
            durable_files.make_directory(self.directory)
            _quarantine_metrics(self.directory)
        multihost_utils.sync_global_devices("checkpoints open")
        return ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Return the complete steps, increasing, without one that is still being written."""
        return sorted(step for step in self.manager.all_steps() if step != self.pending)

    def latest(self) -> int | None:
        """Return the newest of `steps`, or None."""
        return self.steps()[-1] if self.steps() else None

    def best_step(self) -> int | None:
        """Return the best step by the metric of `best`, or None if no step has it."""
        return self.manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        position: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint; return as soon as the state may be donated.

        Args:
          step: rollout steps finished; a step that exists already is skipped.
          state: the TrainState.
          position: JSON values that the caller no longer modifies.
          metrics: of this step; the ranking metric may be missing.

        Raises:
          CheckpointWriteError: this checkpoint, or the pending one, could not be written.
        """
        self.finish_saving()
        if step == self.latest():
            return
        arrays = _as_dict(state)
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    position=ocp.args.JsonSave(dict(position)),
                    sums=ocp.args.JsonSave(
                        {"position": _digest(position), "arrays": checksums(arrays)}
                    ),
                ),
                metrics=self._rank(metrics),
            )
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._write_error(step, error) from error
        self.pending = step

    def _rank(self, metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
        if self.best is None or metrics is None or self.best.metric not in metrics:
            return None
        value = float(metrics[self.best.metric])
        return {self.best.metric: value} if math.isfinite(value) else None

    def finish_saving(self, wait: bool = True) -> None:
        """Wait for the pending checkpoint; with `wait=False` only check it, without blocking.

        Raises:
          CheckpointWriteError: it could not be written.
        """
        if self.pending is None or not (wait or not self.manager.is_saving_in_progress()):
            return
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(self.pending, error) from error
        self.pending = None

    def _write_error(self, step: int, error: Exception) -> CheckpointWriteError:
        """Discard a failed save and its files."""
        self.pending = None
        if jax.process_count() == 1:  # several would have to reopen in step
            with contextlib.suppress(Exception):
                self.manager.close()
            _remove_partial(self.directory)
            self.manager = self._open()
        return CheckpointWriteError(
            f"the checkpoint of step {step} could not be written: {_cause(error)}"
        )

    def position(self, step: int) -> dict[str, Any]:
        """Read the position of a checkpoint without its arrays.

        Raises:
          CorruptCheckpointError: it cannot be read, or has changed since it was saved.
        """
        json_item = ocp.args.JsonRestore()
        items = self._read(step, position=json_item, sums=json_item)
        if items.sums["position"] != _digest(items.position):
            raise CorruptCheckpointError("its position has changed since it was saved")
        return items.position

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Restore a TrainState with the structure, dtypes and shardings of `target`.

        Args:
          step: of the checkpoint.
          target: arrays or ShapeDtypeStructs with shardings.

        Raises:
          CorruptCheckpointError: it cannot be read, or its arrays have changed since.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(target))
        fields = self._read_arrays(step, ocp.args.StandardRestore(abstract))
        return TrainState(**{**fields, "key": jax.random.wrap_key_data(fields["key"])})

    def restore_params(self, step: int, target: Params) -> Params:
        """Restore only the params of a checkpoint; arguments and errors as `restore`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": target})
        restore = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return self._read_arrays(step, restore)["params"]

    def _read_arrays(self, step: int, arrays: Any) -> dict[str, Any]:
        items = self._read(step, state=arrays, sums=ocp.args.JsonRestore())
        saved, current = items.sums["arrays"], checksums(items.state)
        changed = [name for name in current if name not in saved or saved[name] != current[name]]
        if changed:
            names = ", ".join(changed)
            raise CorruptCheckpointError(f"bits of {names} have changed since they were saved")
        return items.state

    def _read(self, step: int, **arguments: Any) -> Any:
        try:
            items = self.manager.restore(step, args=ocp.args.Composite(**arguments))
            complete = items.sums.keys() == {"position", "arrays"}
        except Exception as error:
            raise CorruptCheckpointError(_cause(error)) from error
        if not complete:
            raise CorruptCheckpointError("its sums have changed since they were saved")
        return items

    def quarantine(self, step: int) -> Path:
        """Rename a corrupt checkpoint to STEP.damaged, so that its step can be saved again.

        Beside an earlier one it is STEP.damaged.2, and so on.
        """
        names = itertools.chain(["damaged"], (f"damaged.{n}" for n in itertools.count(2)))
        paths = (self.directory / f"{step}.{name}" for name in names)
        path = next(path for path in paths if not path.exists())
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(path)
            durable_files.sync_directory(self.directory)
        multihost_utils.sync_global_devices(f"checkpoint {step} quarantined")
        self.manager.reload()
        return path

    def close(self) -> None:
        """Wait for the pending checkpoint and release Orbax's threads.

        Raises:
          CheckpointWriteError: it could not be written.
        """
        try:
            self.finish_saving()
        finally:
            self.manager.close()


def _digest(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _remove_partial(directory: Path) -> None:
    """Remove the files of a failed save, until no new ones appear.

    After one write fails, threads of Orbax and of TensorStore, which cannot be joined, finish the
    others and create the directories again.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            thread.join(WRITER_SECONDS)
    quiet, deadline = 0, time.monotonic() + WRITER_SECONDS
    while quiet < POLLS and time.monotonic() < deadline:
        partial = list(directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))
        quiet = 0 if partial else quiet + 1
        for path in partial:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(POLL_SECONDS)


def _check_foreign(directory: Path) -> None:
    """Refuse numbered directories of other content: they would be removed as old checkpoints."""
    steps = [path for path in directory.glob("*") if path.name.isdigit() and path.is_dir()]
    foreign = [str(path) for step in steps for path in step.iterdir() if path.name not in CONTENT]
    if foreign:
        raise ValueError(
            f"{', '.join(sorted(foreign)[:5])}: not of a checkpoint, but in a numbered directory, "
            f"as checkpoints are; move {'them' if len(foreign) > 1 else 'it'} out of {directory}."
        )


def _quarantine_metrics(directory: Path) -> None:
    """Rename metrics that are not JSON: Orbax would otherwise open no checkpoint at all."""
    for path in directory.glob("*/metrics/metrics"):
        try:
            json_files.read_json(path, finite=False)
        except ValueError:
            path.rename(path.with_suffix(".damaged"))


def _cause(error: Exception) -> str:
    """Return a one-line cause of an exception of Orbax."""
    text = " ".join(str(error).split())
    if "No space left" in text or "ENOSPC" in text:
        return "no space left on the device"
    return f"{type(error).__name__}: {text[:200]}"


def _as_dict(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**fields, "key": jax.random.key_data(fields["key"])}
