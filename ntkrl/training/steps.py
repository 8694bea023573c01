"""The train step as a compiled program: how its state lies on the mesh, and what it donates."""

from __future__ import annotations

from collections.abc import Callable
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
        (`update.make_step_with_term_gradients`).
    """
    schedule = setup.settings.schedule
    make = update.make_step_with_term_gradients if apart else update.make_step
    step = make(program, minimised, schedule.microbatches)
    if schedule.offload_optimizer:
        there = trees.shardings(state, setup.sharding, setup.mesh).opt_state
        step = update.offloaded(step, there)
    placed, beside = jax.tree.map(lambda leaf: leaf.sharding, (state, reference))
    if apart:
        trained, _ = trees.partition(placed.params, program.trained)
        step = _constrained(step, trained)
    return jax.jit(
        step,
        in_shardings=(placed, runtime.row_sharding(rows, setup.mesh), beside),
        out_shardings=update.StepResult(placed, runtime.replicated(setup.mesh)),
        donate_argnums=0,
    )


def _constrained(
    step: Callable[..., update.StepResult], shardings: Any
) -> Callable[..., update.StepResult]:
    """Return a step whose term gradients are constrained to the parameters' shardings."""

    def constrained(state: TrainState, batch: Any, reference: Any = None) -> update.StepResult:
        result = step(state, batch, reference)
        gradients = {
            name: (jax.lax.with_sharding_constraint(grads, shardings), count)
            for name, (grads, count) in result.term_gradients.items()
        }
        return result._replace(term_gradients=gradients)

    return constrained
