"""One optimizer step as a pure function, and the state it starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ntkrl import numerics, trees
from ntkrl.scoring import completion_features, head_of
from ntkrl.types import Array, Params, Policy, Total, TrainState, UpdateBatch
from ntkrl.update import optimizers
from ntkrl.update.loss import Measures
from ntkrl.update.rows import Loss, add_pulled, loss_by_rows, over_parts, split_rows
from ntkrl.update.stages import StageProgram
from ntkrl.vocabulary import Head, token_statistics

TILE_VOCABULARY = 8192
"""Vocabulary rows of a tile of logits."""

Objective = Callable[[Params, Any, Head | None], tuple[Total, Measures]]


def init_state(program: StageProgram, params: Params, key: Array, step: int = 0) -> TrainState:
    """Return a TrainState with a fresh optimizer state for the stage's trained leaves."""
    chosen, _ = trees.partition(params, program.trained)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=program.optimizer.init(chosen),
        key=key,
    )


def next_state(program: StageProgram, state: TrainState) -> TrainState:
    """Return the state a stage starts from, given the one its predecessor ended with."""
    chosen, _ = trees.partition(state.params, program.trained)
    opt_state = program.optimizer.init(chosen)
    if program.stage.optimizer_state == "keep":
        opt_state = optimizers.hand_over(state.opt_state, opt_state)
    return state.replace(opt_state=opt_state)


def policy_objective(
    policy: Policy,
    loss: Loss,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    spread: int = 1,
) -> Objective:
    """Return the objective of a loss on token statistics.

    The body is read, unless the batch brings the features along. Logits exist for whole
    completions of about `chunk_tokens` tokens together, and are made once; where one completion is
    longer than that, or a reference's whole distribution is compared with, tile by tile and twice.

    Args:
      policy: the network's functions.
      loss: `(statistics, batch) -> (Total, Measures)`, which add up over completions.
      temperature: the sampling temperature (log-probs are of the tempered policy).
      chunk_tokens: positions whose logits exist at a time on a device.
      spread: blocks of rows that lie on devices of their own, ≥ 1.

    Returns:
      `(params, batch, reference) -> (Total, Measures)`; `reference` is the Head that goes with the
      batch's `ref_features`, or None.
    """

    def objective(
        params: Params, batch: UpdateBatch, reference: Head | None = None
    ) -> tuple[Total, Measures]:
        rows, length = batch.completion_mask.shape
        features = batch.features
        if features is None:
            features = completion_features(policy, params, batch.tokens, batch.mask, length)
        head = head_of(policy, params)
        if reference is None and length <= chunk_tokens:
            parts = -(-rows // (spread * max(1, chunk_tokens // length)))
            return loss_by_rows(loss, temperature, parts, head, features, batch)
        beside = None if reference is None else (reference, batch.ref_features)
        tiles = (temperature, chunk_tokens * spread, TILE_VOCABULARY, beside)
        return loss(token_statistics(head, features, batch.tokens[:, -length:], *tiles), batch)

    return objective


def make_step(
    program: StageProgram, objective: Objective, microbatches: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return `step(state, batch, reference=None) -> (state, metrics)`, to be jitted by the caller.

    Only the stage's trained leaves are differentiated; the frozen ones pass through untouched.

    Args:
      program: the stage bound to the params.
      objective: `(params, batch, reference) -> (Total, Measures)`.
      microbatches: equal parts of the rows that are read one after another, their gradients
        added; what the batch gives is what it gives in one piece, to rounding.

    Returns:
      The step; its metrics are the means of the objective's totals, its maxima, `loss` and
      `grad_norm`, all scalars.
    """

    def step(
        state: TrainState, batch: Any, reference: Head | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        _check_divisible(batch, microbatches)
        chosen, rest = trees.partition(state.params, program.trained)

        def value(chosen: Params, part: Any) -> tuple[Array, tuple[Total, Measures]]:
            found = objective(trees.merge(chosen, rest), part, reference)
            return found[0].total, found

        def pull(part: Any) -> tuple[tuple[Total, Measures], Params]:
            (_, found), grads = jax.value_and_grad(value, has_aux=True)(chosen, part)
            return found, grads

        if microbatches == 1:
            (total, measures), grads = pull(batch)
        else:
            cut = split_rows(batch, microbatches)
            found, _ = over_parts(lambda part: (pull(part), None), cut, add_pulled)
            (total, measures), grads = found
        count = jnp.maximum(total.count, 1)
        grads = jax.tree.map(lambda leaf: (leaf / count).astype(leaf.dtype), grads)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, chosen)
        params = trees.merge(optax.apply_updates(chosen, updates), rest)
        metrics = {name: numerics.mean(found) for name, found in measures.totals.items()}
        metrics |= measures.maxima
        metrics |= {"loss": numerics.mean(total), "grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def offloaded(step: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """Return a step whose optimizer state comes from the host's memory.

    Args:
      step: from `make_step`.
      shardings: of the optimizer state on the devices. Its place on the host is what the caller's
        jit says of the step's arguments and results.
    """

    def brought(state: TrainState, *given: Any) -> Any:
        return step(state.replace(opt_state=jax.device_put(state.opt_state, shardings)), *given)

    return brought


def _check_divisible(batch: Any, microbatches: int) -> None:
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % microbatches:
        raise ValueError(
            f"{rows} rows cannot be cut in {microbatches} equal micro-batches; choose a divisor "
            "of the rows as schedule.microbatches."
        )
