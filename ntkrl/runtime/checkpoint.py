"""Save and restore a run by Orbax: one directory per step, whole or absent."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ntkrl.types import Params, TrainState

logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.WARNING)


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint holds the TrainState and a small JSON position (rollout step, stage, …). Orbax
    writes to a temporary directory and renames it, so a kill at any moment leaves whole
    checkpoints only.
    """

    def __init__(self, directory: str | Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self.directory = Path(directory).absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Return the newest step that was saved whole, or None."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """Return the steps held, increasing."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Write a checkpoint and wait until it is whole; a step that exists is left alone.

        Args:
          step: rollout steps finished.
          state: the TrainState.
          position: JSON values.
        """
        if step == self.latest():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_plain(state)),
                position=ocp.args.JsonSave(dict(position)),
            ),
        )
        self.manager.wait_until_finished()

    def position(self, step: int) -> dict[str, Any]:
        """Read the position of a checkpoint without its arrays."""
        return self.manager.restore(
            step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
        ).position

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read a TrainState with the structure, dtypes and shardings of `like`.

        Args:
          step: as saved.
          like: arrays or ShapeDtypeStructs with shardings.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        held = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        ).state
        return TrainState(**{**held, "key": jax.random.wrap_key_data(held["key"])})

    def restore_params(self, step: int, like: Params) -> Params:
        """Read the params of a checkpoint alone.

        Args:
          step: as saved.
          like: arrays or ShapeDtypeStructs with shardings.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": like})
        restore = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return self.manager.restore(step, args=ocp.args.Composite(state=restore)).state["params"]

    def close(self) -> None:
        """Release Orbax's threads."""
        self.manager.close()


def _plain(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**fields, "key": jax.random.key_data(fields["key"])}
