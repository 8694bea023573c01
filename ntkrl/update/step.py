"""One optimizer step as a pure function, and the state it starts from."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ntkrl import numerics, trees
from ntkrl.scoring import score
from ntkrl.types import Array, Params, Policy, Total, TrainState, UpdateBatch
from ntkrl.update.stages import StageProgram

Loss = Callable[[numerics.TokenStatistics, UpdateBatch], tuple[Total, dict[str, Total]]]


def init_state(program: StageProgram, params: Params, key: Array, step: int = 0) -> TrainState:
    """Return a TrainState with a fresh optimizer state for the stage's trained leaves."""
    chosen, _ = trees.partition(params, program.trained)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=program.optimizer.init(chosen),
        key=key,
    )


def make_train_step(
    policy: Policy,
    program: StageProgram,
    loss: Loss,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Callable[[TrainState, UpdateBatch], tuple[TrainState, dict[str, Array]]]:
    """Return `step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    Only the stage's trained leaves are differentiated; the frozen ones pass through untouched.

    Args:
      policy: the network's functions.
      program: the stage bound to the params.
      loss: `(statistics, batch) -> (Total, {name: Total})`.
      temperature: the sampling temperature (log-probs are of the tempered policy).
      chunk_tokens: positions whose logits exist at a time.

    Returns:
      The step; its metrics are scalars: `loss`, `grad_norm`, `log_ratio_max` (the largest
      |log π − old_log_probs| over counted tokens) and the means of the loss's Totals.
    """

    def step(state: TrainState, batch: UpdateBatch) -> tuple[TrainState, dict[str, Array]]:
        chosen, rest = trees.partition(state.params, program.trained)

        def objective(chosen: Params) -> tuple[Array, dict[str, Array]]:
            params = trees.merge(chosen, rest)
            length = batch.completion_mask.shape[1]
            statistics = score(
                policy, params, batch.tokens, batch.mask, length, temperature, chunk_tokens
            )
            total, totals = loss(statistics, batch)
            metrics = {name: numerics.mean(value) for name, value in totals.items()}
            gap_BC = jnp.abs(statistics.log_probs - batch.old_log_probs)
            metrics["log_ratio_max"] = jnp.max(jnp.where(batch.completion_mask, gap_BC, 0.0))
            return numerics.mean(total), metrics

        (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(chosen)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, chosen)
        params = trees.merge(optax.apply_updates(chosen, updates), rest)
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step
