"""TrainStates of a run: every leaf is made where it lies on the mesh, so none is ever whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl import runtime, trees, update
from ntkrl.setup.assemble import Setup
from ntkrl.types import TrainState


class States:
    """Makes the state that a stage of a run starts with, and says how one is laid out."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.offloads = setup.settings.schedule.offload_optimizer

    def first(self, program: update.StageProgram) -> TrainState:
        """Return the state of a run that begins, apart from the setup's params."""
        state = self._bare()
        opt_state = self._made(functools.partial(_fresh, program), state)
        return jax.tree.map(jnp.copy, state).replace(opt_state=opt_state)

    def described(self, program: update.StageProgram) -> TrainState:
        """Return the structure, shapes and places of a state in a stage; params are the setup's."""
        state = self._bare()
        return state.replace(opt_state=self.moments(program, state))

    def moments(self, program: update.StageProgram, state: TrainState) -> Any:
        """Return shapes and places of a fresh opt_state; the state may be of shapes itself."""
        shapes, _, home = self._places(functools.partial(_fresh, program), state)
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, home)

    def next(self, program: update.StageProgram, state: TrainState) -> TrainState:
        """Return the state a stage starts from, given the one its predecessor ended with."""
        here = runtime.place(state, self.shardings(state))
        return state.replace(opt_state=self._made(functools.partial(_handed, program), here))

    def shardings(self, tree: Any) -> Any:
        """Return where a state lies in a step; optimizer moments lie where their parameters do."""
        return trees.shardings(tree, self.setup.sharding, self.setup.mesh)

    def _bare(self) -> TrainState:
        """Return the state of a run that begins, without moments."""
        params, settings = self.setup.params, self.setup.settings
        whole = runtime.replicated(self.setup.mesh)
        moves = settings.schedule.reference_sync_steps is not None
        return TrainState(
            step=runtime.place(jnp.int32(0), whole),
            params=params,
            opt_state=None,
            key=runtime.place(jax.random.key(settings.seed), whole),
            reference=params if moves else None,
        )

    def _made(self, make: Callable[[TrainState], Any], state: TrainState) -> Any:
        _, where, home = self._places(make, state)
        moments = jax.jit(make, out_shardings=where)(state)
        return jax.device_put(moments, home) if self.offloads else moments

    def _places(self, make: Callable[[TrainState], Any], state: TrainState) -> tuple[Any, Any, Any]:
        """Return the shapes of an opt_state, where it lies in a step, and where between steps."""
        shapes = jax.eval_shape(make, state)
        where = self.shardings(shapes)
        return shapes, where, runtime.offload_to_host(where, shapes) if self.offloads else where


def _fresh(program: update.StageProgram, state: TrainState) -> Any:
    return update.init_state(program, state.params, state.key).opt_state


def _handed(program: update.StageProgram, state: TrainState) -> Any:
    return update.transfer_state(program, state).opt_state
