"""Train states on the mesh: initialised sharded, never replicated; and the step jitted on them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ntkrl import runtime, trees, update
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.softmax import OutputHead
from ntkrl.training.batch_sources import Batch
from ntkrl.types import Array, TrainState

Step = Callable[[TrainState, Any, OutputHead | None], update.StepResult]


class JittedStep(jax.stages.Wrapped, Protocol):
    """A step jitted for the shardings of its arguments."""

    def __call__(
        self, state: TrainState, batch: Batch, reference: OutputHead | None
    ) -> update.StepResult:
        """Take the step; the state is donated."""


class TrainStates:
    """The states that a run's stages start from, and the jitted steps that advance them.

    Optimizer moments have the shardings of their parameters. With schedule.offload_optimizer they
    are in the host's memory between steps.
    """

    def __init__(self, settings: RunSettings, model: StartingModel):
        self.settings, self.model = settings, model
        self.offload = settings.schedule.offload_optimizer

    def initial_state(self, bound_stage: update.BoundStage) -> TrainState:
        """Return the state of a new run; its params are a copy of the model's."""
        params, replicated = self.model.params, runtime.replicated(self.model.mesh)
        state = TrainState(
            step=runtime.place(jnp.int32(0), replicated),
            params=params,
            opt_state=None,
            key=self.initial_key(),
            reference=params if self._reference_moves else None,
        )
        opt_state = self._initialise(_fresh(bound_stage), state)
        return dataclasses.replace(jax.tree.map(jnp.copy, state), opt_state=opt_state)

    def initial_key(self) -> Array:
        """Return the PRNG key of a new run, on the mesh."""
        key = jax.random.key(self.settings.seed)
        return runtime.place(key, runtime.replicated(self.model.mesh))

    def next_stage_state(self, bound_stage: update.BoundStage, state: TrainState) -> TrainState:
        """Return the state a stage starts from, given that at the end of the stage before."""
        on_device = runtime.place(state, self.shardings(state))

        def transferred(state: TrainState) -> Any:
            return update.transfer_state(bound_stage, state).opt_state

        return dataclasses.replace(state, opt_state=self._initialise(transferred, on_device))

    def abstract_state(self, bound_stage: update.BoundStage) -> TrainState:
        """Return the shapes, dtypes and shardings of a state in a stage."""
        replicated = runtime.replicated(self.model.mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.model.params,
        )
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        state = TrainState(
            step=step,
            params=params,
            opt_state=None,
            key=key.update(sharding=replicated),
            reference=params if self._reference_moves else None,
        )
        shapes, _, resting = self._layout(_fresh(bound_stage), state)
        opt_state = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, resting)
        return dataclasses.replace(state, opt_state=opt_state)

    def shardings(self, tree: Any) -> Any:
        """Return the shardings of a state, or a part of one, during a step."""
        return trees.shardings(tree, self.model.sharding, self.model.mesh)

    def jitted_step(
        self,
        bound_stage: update.BoundStage,
        step: Step,
        state: TrainState,
        batch: Batch,
        reference: OutputHead | None,
    ) -> JittedStep:
        """Return `step(state, batch, reference)` jitted with shardings; it donates the state.

        Args:
          bound_stage: the stage.
          step: from `update.make_step` or `update.make_step_with_term_gradients`.
          state, batch, reference: arguments, or their shapes with shardings.
        """
        mesh = self.model.mesh
        if self.offload:
            step = update.offloaded(step, self.shardings(state).opt_state)
        state_shardings, reference_shardings = jax.tree.map(
            lambda leaf: leaf.sharding, (state, reference)
        )
        trained_shardings, _ = trees.partition(state_shardings.params, bound_stage.trained)
        rows = jax.tree.leaves(batch)[0].shape[0]
        metrics_sharding: Any = runtime.replicated(mesh)  # of every metric
        return jax.jit(
            _constrained(step, trained_shardings),
            in_shardings=(state_shardings, runtime.row_sharding(rows, mesh), reference_shardings),
            out_shardings=update.StepResult(state_shardings, metrics_sharding),
            donate_argnums=0,
        )

    @property
    def _reference_moves(self) -> bool:
        return self.settings.schedule.reference_sync_steps is not None

    def _initialise(self, make: Callable[[TrainState], Any], state: TrainState) -> Any:
        """Return the optimizer state `make(state)`, computed sharded."""
        _, working, resting = self._layout(make, state)
        opt_state = jax.jit(make, out_shardings=working)(state)
        return jax.device_put(opt_state, resting) if self.offload else opt_state

    def _layout(self, make: Callable[[TrainState], Any], state: TrainState) -> tuple[Any, Any, Any]:
        """Return shapes of an optimizer state, and shardings during and between steps."""
        shapes = jax.eval_shape(make, state)
        working = self.shardings(shapes)
        return (
            shapes,
            working,
            runtime.offload_to_host(working, shapes) if self.offload else working,
        )


def _fresh(bound_stage: update.BoundStage) -> Callable[[TrainState], Any]:
    return lambda state: update.init_state(bound_stage, state.params, state.key).opt_state


def _constrained(step: Step, shardings: Any) -> Step:
    """Return a step whose term gradients are constrained to the parameters' shardings."""

    def constrained(
        state: TrainState, batch: Batch, reference: OutputHead | None
    ) -> update.StepResult:
        result = step(state, batch, reference)
        if result.term_gradients is None:
            return result
        gradients = {
            name: (jax.lax.with_sharding_constraint(grads, shardings), count)
            for name, (grads, count) in result.term_gradients.items()
        }
        return result._replace(term_gradients=gradients)

    return constrained
