"""Save and restore a run by Orbax: one directory per step, whole or absent, checked when read.

Orbax copies the arrays to the host, writes them to a temporary directory while training goes on,
and renames it: a kill at any moment leaves whole checkpoints only. A byte that changes later is
found by the sum of bits saved beside every array, since the files hold no checksum of their data.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ntkrl import trees
from ntkrl.runtime.mesh import fetch
from ntkrl.types import Array, Params, TrainState

# what goes wrong comes as an exception too, and is told in a sentence
logging.getLogger("absl").addFilter(lambda record: record.levelno > logging.ERROR)

WRITER_SECONDS = 60.0  # for what writes on after a save has failed
LOOKS, LOOK_SECONDS = 5, 0.1  # without anything new, until it is taken to have ended

_told_before = sys.unraisablehook

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _late(told: Any) -> bool:
    """Tell whether a write has ended that nobody waits for, since another one has failed.

    TensorStore's threads then call a loop of Orbax's that is closed, with no Python code between.
    """
    trace = told.exc_traceback
    if told.object is not None or trace is None or str(told.exc_value) != "Event loop is closed":
        return False
    return trace.tb_frame.f_code is asyncio.BaseEventLoop.call_soon_threadsafe.__code__


sys.unraisablehook = lambda told: None if _late(told) else _told_before(told)


class DamagedError(Exception):
    """A checkpoint that cannot be read as it was written."""


class NotSavedError(Exception):
    """A checkpoint that could not be written; those before it are as they were."""


@dataclasses.dataclass(frozen=True)
class Best:
    """Which checkpoints stay beside the newest.

    count: how many. metric: a name of the metrics. mode: "max" or "min", what is better.
    """

    count: int
    metric: str
    mode: str

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric, the worst there is for a checkpoint ranked by another metric."""
        worst = -math.inf if self.mode == "max" else math.inf
        return metrics[self.metric] if self.metric in metrics else worst


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint holds the TrainState, a sum of bits of each of its arrays and a small JSON position
    (rollout step, stage, …).
    """

    def __init__(
        self, directory: str | Path, keep: int, best: Best | None = None, reading: bool = False
    ):
        """Open the directory; what a kill left half written is removed.

        Args:
          directory: of the checkpoints, made if missing.
          keep: how many of the newest stay, ≥ 1.
          best: which others stay, or None.
          reading: make and remove nothing, since a run may be writing there.
        """
        self.directory = Path(directory).absolute()
        self.keep, self.best, self.reading = keep, best, reading
        self.pending: int | None = None
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(self.keep)]
        ranked: dict[str, Any] = {}
        if self.best is not None:
            ranked = {"best_fn": self.best.value, "best_mode": self.best.mode}
            kept.append(
                policies.BestN(
                    get_metric_fn=self.best.value,
                    reverse=self.best.mode == "min",
                    n=self.best.count,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not self.reading,
            create=not self.reading,
            read_only=self.reading,
            **ranked,
        )
        if not self.reading and jax.process_index() == 0:
            _drop_broken_metrics(self.directory)
        multihost_utils.sync_global_devices("checkpoints open")
        return ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Return the steps held whole, increasing; one that is being written is not among them."""
        return sorted(step for step in self.manager.all_steps() if step != self.pending)

    def latest(self) -> int | None:
        """Return the newest of `steps`, or None."""
        return self.steps()[-1] if self.steps() else None

    def best_step(self) -> int | None:
        """Return the best step by the metric of `best`, or None where none was measured."""
        return self.manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        position: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to write a checkpoint; return when the state may be donated.

        Args:
          step: rollout steps finished; one that is held already is left alone.
          state: the TrainState.
          position: JSON values, not to be changed any more.
          metrics: of this step; the one that ranks checkpoints may be missing.

        Raises:
          NotSavedError: this one, or the one that was being written, could not be written.
        """
        self.settle()
        if step == self.latest():
            return
        arrays = _plain(state)
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    position=ocp.args.JsonSave(dict(position)),
                    sums=ocp.args.JsonSave(
                        {"position": _digest(position), "arrays": bit_sums(arrays)}
                    ),
                ),
                metrics=self._rank(metrics),
            )
        except Exception as error:  # Orbax and TensorStore raise whatever they like
            raise self._not_saved(step, error) from error
        self.pending = step

    def _rank(self, metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
        if self.best is None or metrics is None or self.best.metric not in metrics:
            return None
        value = float(metrics[self.best.metric])
        return {self.best.metric: value} if math.isfinite(value) else None

    def settle(self, wait: bool = True) -> None:
        """Finish what is being written.

        Args:
          wait: False looks only whether it is done.

        Raises:
          NotSavedError: it could not be written.
        """
        if self.pending is None or not (wait or not self.manager.is_saving_in_progress()):
            return
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(self.pending, error) from error
        self.pending = None

    def _not_saved(self, step: int, error: Exception) -> NotSavedError:
        """Forget a save that failed and remove what it wrote."""
        self.pending = None
        if jax.process_count() == 1:  # several would have to agree on what happened
            with contextlib.suppress(Exception):
                self.manager.close()
            _let_end(self.directory)
            self.manager = self._open()
        return NotSavedError(f"the checkpoint of step {step} could not be written: {_cause(error)}")

    def position(self, step: int) -> dict[str, Any]:
        """Read the position of a checkpoint without its arrays.

        Raises:
          DamagedError: it cannot be read, or is not what was saved.
        """
        read = ocp.args.JsonRestore()
        held = self._read(step, position=read, sums=read)
        if held.sums["position"] != _digest(held.position):
            raise DamagedError("its position has changed since it was saved")
        return held.position

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read a TrainState with the structure, dtypes and shardings of `like`.

        Args:
          step: as saved.
          like: arrays or ShapeDtypeStructs with shardings.

        Raises:
          DamagedError: it cannot be read, or does not hold the bits that were saved.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        held = self._read_arrays(step, ocp.args.StandardRestore(abstract))
        return TrainState(**{**held, "key": jax.random.wrap_key_data(held["key"])})

    def restore_params(self, step: int, like: Params) -> Params:
        """Read the params of a checkpoint alone.

        Args:
          step: as saved.
          like: arrays or ShapeDtypeStructs with shardings.

        Raises:
          DamagedError: as `restore`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": like})
        restore = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return self._read_arrays(step, restore)["params"]

    def _read_arrays(self, step: int, arrays: Any) -> dict[str, Any]:
        held = self._read(step, state=arrays, sums=ocp.args.JsonRestore())
        sums = held.sums["arrays"]
        found = bit_sums(held.state)
        changed = [name for name in found if name not in sums or sums[name] != found[name]]
        if changed:
            raise DamagedError(f"bits of {', '.join(changed)} have changed since they were saved")
        return held.state

    def _read(self, step: int, **items: Any) -> Any:
        try:
            held = self.manager.restore(step, args=ocp.args.Composite(**items))
            whole = held.sums.keys() == {"position", "arrays"}
        except Exception as error:
            raise DamagedError(_cause(error)) from error
        if not whole:
            raise DamagedError("its sums have changed since they were saved")
        return held

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be saved again; return where it is."""
        place = self.directory / f"{step}.damaged"
        if jax.process_index() == 0:
            shutil.rmtree(place, ignore_errors=True)
            (self.directory / str(step)).rename(place)
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self.manager.reload()
        return place

    def close(self) -> None:
        """Finish what is being written and release Orbax's threads.

        Raises:
          NotSavedError: it could not be written.
        """
        try:
            self.settle()
        finally:
            self.manager.close()


def bit_sums(tree: Any) -> dict[str, int]:
    """Return for every array the sum of its bits read as whole numbers, modulo 2³².

    The same for every sharding; any single bit that changes changes it.

    Args:
      tree: arrays of numbers or bools.
    """
    leaves = jax.tree.leaves(tree)
    return dict(zip(trees.names(tree), map(int, fetch(_bit_sums(leaves))), strict=True))


@jax.jit
def _bit_sums(leaves: list[Array]) -> list[Array]:
    return [jnp.sum(_bits(leaf), dtype=jnp.uint32) for leaf in leaves]


def _bits(leaf: Array) -> Array:
    if leaf.dtype == bool:
        return leaf
    return jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize])


def _digest(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _let_end(directory: Path) -> None:
    """Remove what a failed save left, until nothing comes back.

    After an error of one write Orbax's threads and TensorStore's, which nobody can wait for, finish
    the others, and make the directories anew.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            thread.join(WRITER_SECONDS)
    quiet, end = 0, time.monotonic() + WRITER_SECONDS
    while quiet < LOOKS and time.monotonic() < end:
        left = list(directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))
        quiet = 0 if left else quiet + 1
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(LOOK_SECONDS)


def _drop_broken_metrics(directory: Path) -> None:
    """Rename metrics that are no JSON: Orbax would open no checkpoint at all; it is unranked."""
    for path in directory.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            path.rename(path.with_suffix(".damaged"))


def _cause(error: Exception) -> str:
    """Say in a line what an exception of Orbax means."""
    text = " ".join(str(error).split())
    if "No space left" in text or "ENOSPC" in text:
        return "no space left on the device"
    return f"{type(error).__name__}: {text[:200]}"


def _plain(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**fields, "key": jax.random.key_data(fields["key"])}
