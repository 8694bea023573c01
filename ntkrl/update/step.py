"""One optimizer step as a pure function, and the state it starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ntkrl import numerics, trees
from ntkrl.scoring import completion_features, head_of
from ntkrl.softmax import Head, token_statistics
from ntkrl.types import Array, Params, Policy, Total, TrainState, UpdateBatch
from ntkrl.update import optimizers
from ntkrl.update.loss import Measures
from ntkrl.update.microbatch import (
    Loss,
    Totals,
    add_pulled,
    loss_by_rows,
    scan_microbatches,
    split_rows,
)
from ntkrl.update.stages import StageProgram

TILE_VOCABULARY = 8192
"""Vocabulary rows of a tile of logits."""

LossFn = Callable[[Params, Any, Head | None], tuple[Totals, Measures]]
"""`(params, batch, reference head or None) -> (Total or Totals by term, Measures)`."""
Gradients = dict[str, tuple[Params, Array]]
"""By term of the loss the gradient of its mean, of the trained leaves, and what it counted."""


def init_state(program: StageProgram, params: Params, key: Array, step: int = 0) -> TrainState:
    """Return a TrainState with a fresh optimizer state for the stage's trained leaves."""
    chosen, _ = trees.partition(params, program.trained)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=program.optimizer.init(chosen),
        key=key,
    )


def transfer_state(program: StageProgram, state: TrainState) -> TrainState:
    """Return the state a stage starts from, given the one its predecessor ended with."""
    chosen, _ = trees.partition(state.params, program.trained)
    opt_state = program.optimizer.init(chosen)
    if program.stage.optimizer_state == "keep":
        opt_state = optimizers.transfer_moments(state.opt_state, opt_state)
    return state.replace(opt_state=opt_state)


def policy_loss_fn(
    policy: Policy,
    loss: Loss,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    spread: int = 1,
) -> LossFn:
    """Return the loss function of a loss on token statistics.

    The body is read, unless the batch brings the features along. Logits exist for whole
    completions of about `chunk_tokens` tokens together, and are made once; where one completion is
    longer than that, or a reference's whole distribution is compared with, tile by tile and twice.

    Args:
      policy: the network's functions.
      loss: `(statistics, batch) -> (Total, Measures)`, which add up over completions; or with a
        Total for each of its terms by name, as those of `policy_terms`.
      temperature: the sampling temperature (log-probs are of the tempered policy).
      chunk_tokens: positions whose logits exist at a time on a device.
      spread: blocks of rows that lie on devices of their own, ≥ 1.

    Returns:
      `(params, batch, reference) -> (Total, Measures)`, or Totals by name; `reference` is the Head
      that goes with the batch's `ref_features`, or None.
    """

    def loss_fn(
        params: Params, batch: UpdateBatch, reference: Head | None = None
    ) -> tuple[Totals, Measures]:
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

    return loss_fn


def make_step(
    program: StageProgram, loss_fn: LossFn, microbatches: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return `step(state, batch, reference=None) -> (state, metrics)`, to be jitted by the caller.

    Only the stage's trained leaves are differentiated; the frozen ones pass through untouched.

    Args:
      program: the stage bound to the params.
      loss_fn: `(params, batch, reference) -> (Total, Measures)`.
      microbatches: equal parts of the rows that are read one after another, their gradients
        added; what the batch gives is what it gives in one piece, to rounding.

    Returns:
      The step; its metrics are the means of the loss function's totals, its maxima, `loss` and
      `grad_norm`, all scalars.
    """

    def step(
        state: TrainState, batch: Any, reference: Head | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        chosen, rest = trees.partition(state.params, program.trained)

        def value(chosen: Params, part: Any) -> tuple[Array, tuple[Total, Measures]]:
            found = loss_fn(trees.merge(chosen, rest), part, reference)
            return found[0].total, found

        def pull(part: Any) -> tuple[tuple[Total, Measures], Params]:
            (_, found), grads = jax.value_and_grad(value, has_aux=True)(chosen, part)
            return found, grads

        (total, measures), grads = _pulled(pull, batch, microbatches)
        return _taken(program, state, _over(grads, total), numerics.mean(total), measures)

    return step


def make_step_apart(
    program: StageProgram, loss_fn: LossFn, microbatches: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Array], Gradients]]:
    """Return the step of `make_step` that hands out the gradients it was made of.

    It takes a pass backward for each term, where `make_step` takes one for all.

    Args:
      program, microbatches: as in `make_step`.
      loss_fn: `(params, batch, reference) -> ({name: Total}, Measures)`.

    Returns:
      `step(state, batch, reference=None) -> (state, metrics, Gradients)`; the gradients add up to
      the one that the optimizer was given.
    """

    def step(
        state: TrainState, batch: Any, reference: Head | None = None
    ) -> tuple[TrainState, dict[str, Array], Gradients]:
        chosen, rest = trees.partition(state.params, program.trained)

        def values(chosen: Params, part: Any) -> tuple[dict[str, Array], tuple[Totals, Measures]]:
            found = loss_fn(trees.merge(chosen, rest), part, reference)
            return {name: total.total for name, total in found[0].items()}, found

        def pull(part: Any) -> tuple[tuple[Totals, Measures], dict[str, Params]]:
            grads, found = jax.jacrev(values, has_aux=True)(chosen, part)
            return found, grads

        (totals, measures), grads = _pulled(pull, batch, microbatches)
        apart = {name: (_over(grads[name], one), one.count) for name, one in totals.items()}
        whole = jax.tree.map(lambda *leaves: sum(leaves), *(own for own, _ in apart.values()))
        loss = sum(map(numerics.mean, totals.values()))
        return *_taken(program, state, whole, loss, measures), apart

    return step


def _pulled(pull: Callable[[Any], Any], batch: Any, microbatches: int) -> Any:
    """Read a batch in parts: totals and measures, and gradients of the totals' sums."""
    _check_divisible(batch, microbatches)
    if microbatches == 1:
        return pull(batch)
    cut = split_rows(batch, microbatches)
    return scan_microbatches(lambda part: (pull(part), None), cut, add_pulled)[0]


def _over(grads: Params, total: Total) -> Params:
    count = jnp.maximum(total.count, 1)
    return jax.tree.map(lambda leaf: (leaf / count).astype(leaf.dtype), grads)


def _taken(
    program: StageProgram, state: TrainState, grads: Params, loss: Array, measures: Measures
) -> tuple[TrainState, dict[str, Array]]:
    """Let the optimizer take its step; return the state it ends with and what is logged."""
    chosen, rest = trees.partition(state.params, program.trained)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, chosen)
    params = trees.merge(optax.apply_updates(chosen, updates), rest)
    metrics = {name: numerics.mean(found) for name, found in measures.totals.items()}
    metrics |= measures.maxima
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


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
