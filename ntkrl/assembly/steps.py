"""The train step as a compiled program: how its state lies on the mesh, and what it donates."""

from __future__ import annotations

from typing import Any

import jax

from ntkrl import runtime, trees, update
from ntkrl.assembly.setup import Setup
from ntkrl.types import TrainState


def jitted_step(
    setup: Setup,
    program: update.StageProgram,
    minimised: Any,
    state: TrainState,
    rows: int,
    reference: Any = None,
) -> Any:
    """Return a stage's train step `(state, batch, reference)`: sharded, its state donated.

    Args:
      setup: the run.
      program: the stage bound to the params.
      minimised: `(params, batch, reference) -> (Total, Measures)`.
      state: what it starts from, or shapes with places.
      rows: of a batch.
      reference: the Head compared with, arrays or shapes with places, or None.
    """
    schedule = setup.settings.schedule
    step = update.make_step(program, minimised, schedule.microbatches)
    if schedule.offload_optimizer:
        there = trees.shardings(state, setup.sharding, setup.mesh).opt_state
        step = update.offloaded(step, there)
    placed, beside = jax.tree.map(lambda leaf: leaf.sharding, (state, reference))
    return jax.jit(
        step,
        in_shardings=(placed, runtime.row_sharding(rows, setup.mesh), beside),
        out_shardings=(placed, runtime.replicated(setup.mesh)),
        donate_argnums=0,
    )
