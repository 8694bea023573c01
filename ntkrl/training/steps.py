"""The train step as a compiled program: how its state lies on the mesh, and what it donates."""

from __future__ import annotations

from typing import Any

import jax

from ntkrl import runtime, trees, update
from ntkrl.setup.assemble import Setup
from ntkrl.types import TrainState


def jitted_step(
    setup: Setup,
    program: update.StageProgram,
    minimised: Any,
    state: TrainState,
    rows: int,
    reference: Any = None,
    apart: bool = False,
) -> Any:
    """Return a stage's train step `(state, batch, reference)`: sharded, its state donated.

    Args:
      setup: the run.
      program: the stage bound to the params.
      minimised: `(params, batch, reference) -> (Total, Measures)`.
      state: what it starts from, or shapes with places.
      rows: of a batch.
      reference: the Head compared with, arrays or shapes with places, or None.
      apart: whether the loss comes by terms and their gradients are handed out
        (`update.make_step_apart`).
    """
    schedule = setup.settings.schedule
    make = update.make_step_apart if apart else update.make_step
    step = make(program, minimised, schedule.microbatches)
    if schedule.offload_optimizer:
        there = trees.shardings(state, setup.sharding, setup.mesh).opt_state
        step = update.offloaded(step, there)
    placed, beside = jax.tree.map(lambda leaf: leaf.sharding, (state, reference))
    found = (placed, runtime.replicated(setup.mesh))
    if apart:
        own, _ = trees.partition(placed.params, program.trained)
        step, found = _laid(step, own), (*found, None)
    return jax.jit(
        step,
        in_shardings=(placed, runtime.row_sharding(rows, setup.mesh), beside),
        out_shardings=found,
        donate_argnums=0,
    )


def _laid(step: Any, shardings: Any) -> Any:
    """Return a step whose gradients lie as the leaves they are of."""

    def laid(*given: Any) -> Any:
        *found, gradients = step(*given)
        placed = {
            name: (jax.lax.with_sharding_constraint(grads, shardings), count)
            for name, (grads, count) in gradients.items()
        }
        return *found, placed

    return laid
