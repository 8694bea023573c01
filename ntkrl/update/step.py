"""One optimizer step as a pure function, and the state it starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ntkrl import numerics, trees
from ntkrl.scoring import score
from ntkrl.types import Array, Params, Policy, Total, TrainState, UpdateBatch
from ntkrl.update.stages import StageProgram
from ntkrl.vocabulary import TokenStatistics

Loss = Callable[[TokenStatistics, UpdateBatch], tuple[Total, dict[str, Total]]]
Objective = Callable[[Params, Any], tuple[Total, dict[str, Array]]]


def init_state(program: StageProgram, params: Params, key: Array, step: int = 0) -> TrainState:
    """Return a TrainState with a fresh optimizer state for the stage's trained leaves."""
    chosen, _ = trees.partition(params, program.trained)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=program.optimizer.init(chosen),
        key=key,
    )


def policy_objective(
    policy: Policy, loss: Loss, temperature: float = 1.0, chunk_tokens: int = 1024
) -> Objective:
    """Return the objective of a loss on token statistics.

    Args:
      policy: the network's functions.
      loss: `(statistics, batch) -> (Total, {name: Total})`.
      temperature: the sampling temperature (log-probs are of the tempered policy).
      chunk_tokens: positions whose logits exist at a time.

    Returns:
      `(params, batch) -> (Total, metrics)`; metrics are the means of the loss's Totals and
      `log_ratio_max`, the largest |log π − old_log_probs| over counted tokens.
    """

    def objective(params: Params, batch: UpdateBatch) -> tuple[Total, dict[str, Array]]:
        length = batch.completion_mask.shape[1]
        statistics = score(
            policy, params, batch.tokens, batch.mask, length, temperature, chunk_tokens
        )
        total, totals = loss(statistics, batch)
        metrics = {name: numerics.mean(value) for name, value in totals.items()}
        gap_BC = jnp.abs(statistics.log_probs - batch.old_log_probs)
        metrics["log_ratio_max"] = jnp.max(jnp.where(batch.completion_mask, gap_BC, 0.0))
        return total, metrics

    return objective


def make_step(
    program: StageProgram, objective: Objective
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Return `step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    Only the stage's trained leaves are differentiated; the frozen ones pass through untouched.

    Args:
      program: the stage bound to the params.
      objective: `(params, batch) -> (Total, {name: scalar})`.

    Returns:
      The step; its metrics are the objective's, `loss` and `grad_norm`, all scalars.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        chosen, rest = trees.partition(state.params, program.trained)

        def value(chosen: Params) -> tuple[Array, dict[str, Array]]:
            total, metrics = objective(trees.merge(chosen, rest), batch)
            return numerics.mean(total), metrics

        (loss, metrics), grads = jax.value_and_grad(value, has_aux=True)(chosen)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, chosen)
        params = trees.merge(optax.apply_updates(chosen, updates), rest)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step
