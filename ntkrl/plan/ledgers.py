"""A step ledger as a program of shapes, and the copies a run keeps while it takes the step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import attribution, ntk, runtime, trees, update
from ntkrl.probe import ProbeSettings, completions_per_block
from ntkrl.setup.assemble import Setup
from ntkrl.types import TrainState, UpdateBatch


class ReadCall(NamedTuple):
    """A call of `Ledger.read` described.

    read: the jitted function. arguments: for its `lower`. blocks: parts of the probe set it is
    called for. together: completions of each.
    """

    read: Any
    arguments: tuple[Any, ...]
    blocks: int
    together: int


def kept(settings: ProbeSettings, state: TrainState) -> list[Any]:
    """Return what is copied of a state before a step that is looked at: see ProbeHook.keep."""
    if settings.ledger_every_steps is None:
        return [state.params]
    return [state.params, _on_devices(state.opt_state)]


def read_call(
    setup: Setup,
    terms: attribution.Terms,
    stage: update.StageProgram,
    state: TrainState,
    batch: UpdateBatch,
    reference: Any,
) -> ReadCall:
    """Describe the ledger of a stage's step: see ProbeHook.look.

    Args:
      setup: the run.
      terms: of its source.
      stage: bound to the params.
      state: shapes of what the step began with.
      batch, reference: of what it saw, every row at its full length.
    """
    settings = setup.settings.probe
    contexts, targets, blocks = probe_tokens(setup)
    made = attribution.Ledger(
        *(setup.policy, terms, stage.optimizer, stage.trained),
        groups=settings.ledger_groups,
        by=settings.ledger_by,
        memory_gib=settings.memory_gib,
        microbatches=setup.settings.schedule.microbatches,
        mesh=setup.mesh,
    )
    before = state.replace(opt_state=_on_devices(state.opt_state))
    whole = runtime.replicated(setup.mesh)
    step = update.make_step_with_term_gradients(stage, terms, setup.settings.schedule.microbatches)
    grads = jax.eval_shape(step, state, batch, reference)[2]
    chosen, _ = trees.partition(state.params, stage.trained)

    def laid(own: Any, leaf: Any) -> Any:
        return own.update(sharding=leaf.sharding)

    gradients = {
        name: (jax.tree.map(laid, own, chosen), count.update(sharding=whole))
        for name, (own, count) in grads.items()
    }
    actual = jax.ShapeDtypeStruct((2, len(targets)), jnp.float32, sharding=whole)
    described = attribution.OptimizerStep(before, state.params, batch, reference, gradients)
    function, (spec, inputs) = made.bind(described, contexts, targets, actual)

    def placed(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=whole)

    arguments = (spec, jax.tree.map(placed, inputs))
    return ReadCall(function, arguments, blocks, contexts.tokens.shape[0])


def probe_tokens(setup: Setup) -> tuple[ntk.Contexts, Any, int]:
    """Return one block of a run's probe set, every completion at its full length.

    Returns:
      contexts, targets: as a Prober cuts them, of tokens that are all zero.
      blocks: how many there are.
    """
    settings, asked = setup.settings, setup.settings.probe
    width, budget = settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens
    total = asked.completions
    count = completions_per_block(total, budget, setup.policy.vocab_size, asked.memory_gib)
    contexts = ntk.Contexts(
        np.zeros((count, width + budget), np.int32),
        np.tile(width - 1 + np.arange(budget), count),
        np.repeat(np.arange(count), budget),
        np.ones((count, width + budget), bool),
    )
    return contexts, jnp.zeros(count * budget, jnp.int32), -(-total // count)


def _on_devices(opt_state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.update(sharding=leaf.sharding.with_memory_kind("device")), opt_state
    )
