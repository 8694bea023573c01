"""One optimizer step as a pure function, and the state it starts from.

Logits for the loss's gradient are needed twice, to compute the token statistics and in the
backward pass. Recomputing them costs a third more FLOPs, storing them all costs tokens × V. Here
each chunk of completions runs forward and backward before the next: a loss is a sum over
completions, so the gradient of each chunk is known up to the cotangent of the sum.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from ntkrl import numerics, trees
from ntkrl.scoring import completion_features, head_of
from ntkrl.softmax import OutputHead, SoftmaxOptions, logit_statistics, logits, token_statistics
from ntkrl.types import Array, Params, Policy, Total, TrainState, UpdateBatch
from ntkrl.update import optimizers
from ntkrl.update.loss import Measures, TokenLoss, Totals
from ntkrl.update.stages import BoundStage

TILE_VOCABULARY = 8192
"""Vocabulary rows of a tile of logits."""

LossFn = Callable[[Params, Any, OutputHead | None], tuple[Totals, Measures]]
"""`(params, batch, reference head or None) -> (Total or Totals by term, Measures)`."""
Gradients = dict[str, tuple[Params, Array]]
"""By term of the loss: the gradient of its mean for the trained leaves, and its count."""


class StepResult(NamedTuple):
    """An optimizer step.

    state: the state after it.
    metrics: scalars: means of the loss function's totals, its maxima, `loss` and `grad_norm`.
    term_gradients: by term of the loss, where the step was made to return them; else None.
    """

    state: TrainState
    metrics: dict[str, Array]
    term_gradients: Gradients | None = None


def init_state(bound_stage: BoundStage, params: Params, key: Array, step: int = 0) -> TrainState:
    """Return a TrainState with a fresh optimizer state for the stage's trained leaves."""
    trained, _ = trees.partition(params, bound_stage.trained)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=bound_stage.optimizer.init(trained),
        key=key,
    )


def transfer_state(bound_stage: BoundStage, state: TrainState) -> TrainState:
    """Return the state that a stage starts from, given the last state of the stage before."""
    trained, _ = trees.partition(state.params, bound_stage.trained)
    opt_state = bound_stage.optimizer.init(trained)
    if bound_stage.stage.optimizer_state == "keep":
        opt_state = optimizers.transfer_moments(state.opt_state, opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


def policy_loss_fn(
    policy: Policy,
    loss: TokenLoss[Totals],
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    row_shards: int = 1,
) -> LossFn[Totals]:
    """Return the loss function of a loss on token statistics.

    The body is evaluated unless the batch carries features. Logits are computed once, for whole
    completions of about `chunk_tokens` tokens at a time; if one completion is longer, or the loss
    compares with the full distribution of a reference, they are computed tile by tile and twice.

    Args:
      policy: the network's functions.
      loss: `(statistics, batch) -> (Total, Measures)`, summed over completions; or with a Total
        for each of its terms by name, as `policy_terms`.
      temperature: the sampling temperature (log-probs are of the tempered policy).
      chunk_tokens: positions whose logits exist at a time on a device.
      row_shards: shards that the rows are divided into, ≥ 1.

    Returns:
      `(params, batch, reference) -> (Total, Measures)`, or Totals by name; `reference` is the
      output head for the batch's `ref_features`, or None.
    """

    def loss_fn(
        params: Params, batch: UpdateBatch, reference: OutputHead | None = None
    ) -> tuple[Totals, Measures]:
        rows, length = batch.completion_mask.shape
        features = batch.features
        if features is None:
            features = completion_features(policy, params, batch.tokens, batch.mask, length)
        head = head_of(policy, params)
        if reference is None and length <= chunk_tokens:
            chunks = -(-rows // (row_shards * max(1, chunk_tokens // length)))
            arrays = dataclasses.replace(batch, features=None, ref_features=None)
            return chunked_loss((loss, temperature, chunks), head, features, arrays)
        options = SoftmaxOptions(temperature, chunk_tokens * row_shards, TILE_VOCABULARY)
        pair: Any = None if reference is None else (reference, batch.ref_features)
        statistics = token_statistics(head, features, batch.tokens[:, -length:], options, pair)
        return loss(statistics, batch)

    return loss_fn


def make_step(
    bound_stage: BoundStage, loss_fn: LossFn[Total], microbatches: int = 1
) -> Callable[..., StepResult]:
    """Return `step(state, batch, reference=None) -> StepResult`, to be jitted by the caller.

    Only the stage's trained leaves are differentiated; the frozen ones pass through untouched.

    Args:
      bound_stage: the stage bound to the params.
      loss_fn: `(params, batch, reference) -> (Total, Measures)`.
      microbatches: equal parts of the rows that are read one after another, their gradients
        accumulated; the result is that of a single pass, to rounding.
    """

    def step(state: TrainState, batch: Any, reference: OutputHead | None = None) -> StepResult:
        trained, frozen = trees.partition(state.params, bound_stage.trained)

        def loss_sum(trained: Params, part: Any) -> tuple[Array, tuple[Total, Measures]]:
            total, measures = loss_fn(trees.merge(trained, frozen), part, reference)
            return total.total, (total, measures)

        def gradient(part: Any) -> tuple[tuple[Total, Measures], Params]:
            with numerics.reverse_mode():
                (_, values), grads = jax.value_and_grad(loss_sum, has_aux=True)(trained, part)
            return values, grads

        (total, measures), grads = _accumulate(gradient, batch, microbatches)
        grads = _divide(grads, total)
        return _apply_gradients(bound_stage, state, grads, numerics.mean(total), measures)

    return step


def make_step_with_term_gradients(
    bound_stage: BoundStage, loss_fn: LossFn[dict[str, Total]], microbatches: int = 1
) -> Callable[..., StepResult]:
    """Return the step of `make_step` that also returns the gradient of each term of the loss.

    It takes a backward pass per term, where `make_step` takes one in all.

    Args:
      bound_stage, microbatches: as in `make_step`.
      loss_fn: `(params, batch, reference) -> ({name: Total}, Measures)`.

    Returns:
      `step(state, batch, reference=None) -> StepResult` with `term_gradients`, which add up to
      the gradient that the optimizer was given.
    """

    def step(state: TrainState, batch: Any, reference: OutputHead | None = None) -> StepResult:
        trained, frozen = trees.partition(state.params, bound_stage.trained)

        def loss_sums(trained: Params, part: Any) -> tuple[dict[str, Array], Any]:
            totals, measures = loss_fn(trees.merge(trained, frozen), part, reference)
            return {name: total.total for name, total in totals.items()}, (totals, measures)

        def gradients(part: Any) -> tuple[tuple[dict[str, Total], Measures], dict[str, Params]]:
            with numerics.reverse_mode():
                grads, values = jax.jacrev(loss_sums, has_aux=True)(trained, part)
            return values, grads

        (totals, measures), grads = _accumulate(gradients, batch, microbatches)
        per_term = {name: (_divide(grads[name], t), t.count) for name, t in totals.items()}
        summed = jax.tree.map(lambda *leaves: sum(leaves), *(leaf for leaf, _ in per_term.values()))
        loss: Any = sum(map(numerics.mean, totals.values()))
        result = _apply_gradients(bound_stage, state, summed, loss, measures)
        return result._replace(term_gradients=per_term)

    return step


def offloaded(step: Callable[..., StepResult], shardings: Any) -> Callable[..., StepResult]:
    """Return a step whose optimizer state arrives in host memory.

    Args:
      step: from `make_step`.
      shardings: shardings of the optimizer state on the devices. The caller's jit sets its host
        placement, in `in_shardings` and `out_shardings`.
    """

    def offloaded_step(
        state: TrainState, batch: Any, reference: OutputHead | None = None
    ) -> StepResult:
        opt_state = jax.device_put(state.opt_state, shardings)
        return step(dataclasses.replace(state, opt_state=opt_state), batch, reference)

    return offloaded_step


def _accumulate(gradient: Callable[[Any], Any], batch: Any, microbatches: int) -> Any:
    """Return `((totals, measures), gradients of the totals' sums)` over microbatches."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % microbatches:
        raise ValueError(
            f"{rows} rows cannot be cut in {microbatches} equal micro-batches; choose a divisor "
            "of the rows as schedule.microbatches."
        )
    if microbatches == 1:
        return gradient(batch)
    parts = numerics.split_rows(batch, microbatches)
    return numerics.scan_microbatches(lambda part: (gradient(part), None), parts, _add_gradients)[0]


def _divide(grads: Params, total: Total) -> Params:
    count = jnp.maximum(total.count, 1)
    return jax.tree.map(lambda leaf: (leaf / count).astype(leaf.dtype), grads)


def _apply_gradients(
    bound_stage: BoundStage, state: TrainState, grads: Params, loss: Array, measures: Measures
) -> StepResult:
    trained, frozen = trees.partition(state.params, bound_stage.trained)
    updates, opt_state = bound_stage.optimizer.update(grads, state.opt_state, trained)
    params = trees.merge(optax.apply_updates(trained, updates), frozen)
    metrics = {name: numerics.mean(total) for name, total in measures.totals.items()}
    metrics |= measures.maxima
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return StepResult(state, metrics)


def _add(left: tuple[Totals, Measures], right: tuple[Totals, Measures]) -> tuple[Totals, Measures]:
    """Add the losses and measures of two parts of a batch."""
    total, totals = jax.tree.map(jnp.add, (left[0], left[1].totals), (right[0], right[1].totals))
    maxima = jax.tree.map(jnp.maximum, left[1].maxima, right[1].maxima)
    return total, Measures(totals, maxima)


def _add_gradients(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    """Add `((Totals, Measures), gradients)` of two parts of a batch."""
    return _add(left[0], right[0]), jax.tree.map(jnp.add, left[1], right[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss(
    static: tuple[TokenLoss[Totals], float, int],
    head: OutputHead,
    features: Array,
    batch: UpdateBatch,
) -> tuple[Totals, Measures]:
    """Compute a loss and measures in chunks of rows, with logits computed once.

    Differentiable in head and features, through the sums of the Totals only.

    Args:
      static: the loss, the temperature (> 0) and the number of chunks.
      head: the head's arrays.
      features: `[B, C, D]` that predict each completion token.
      batch: without features.
    """
    loss, temperature, chunks = static
    if chunks == 1:
        return _chunk_loss(loss, temperature, head, features, batch)
    parts = numerics.split_rows((features, batch), chunks)
    return numerics.scan_microbatches(
        lambda part: (_chunk_loss(loss, temperature, head, *part), None), parts, _add
    )[0]


def _chunk_loss(
    loss: TokenLoss[Totals],
    temperature: float,
    head: OutputHead,
    features: Array,
    batch: UpdateBatch,
) -> tuple[Totals, Measures]:
    targets = batch.tokens[:, -batch.completion_mask.shape[1] :]
    return loss(logit_statistics(logits(head, features) / temperature, targets), batch)


def _forward(
    static: tuple[TokenLoss[Totals], float, int], head: Any, features: Any, batch: Any
) -> tuple[tuple[Totals, Measures], Any]:
    """Return the result, and the gradients of each Total's sum as residuals."""
    loss, temperature, chunks = static
    (head, head_moves), (features, features_move) = map(numerics.primal, (head, features))
    batch, _ = numerics.primal(batch)

    def gradients(part: tuple[Array, UpdateBatch]) -> Any:
        operands = {"head": head, "features": part[0]}
        moving = [
            name for name, moves in (("head", head_moves), ("features", features_move)) if moves
        ]

        def sums(*values: Any) -> tuple[list[Array], tuple[Totals, Measures]]:
            inputs = operands | dict(zip(moving, values, strict=True))
            result = _chunk_loss(loss, temperature, inputs["head"], inputs["features"], part[1])
            return _sums(result[0]), result

        values, vjp, result = jax.vjp(sums, *(operands[name] for name in moving), has_aux=True)
        cotangents = [dict(zip(moving, vjp(unit), strict=True)) for unit in _units(values)]
        of_head, of_features = ([c.get(name) for c in cotangents] for name in operands)
        return (result, of_head), of_features

    parts = numerics.split_rows((features, batch), chunks)
    (result, d_head), d_features = numerics.scan_microbatches(gradients, parts, _add_gradients)
    rows = features.shape[0]
    return result, (d_head, jax.tree.map(lambda leaf: numerics.join_rows(leaf, rows), d_features))


def _backward(static: Any, residuals: Any, cotangents: Any) -> tuple[Any, Any, None]:
    factors = _sums(cotangents[0])

    def combined(*gradients: Array) -> Array:
        terms = (
            factor * gradient
            for factor, gradient in zip(factors, gradients, strict=True)
            if not isinstance(factor, SymbolicZero)
        )
        total: Any = sum(terms)
        return total.astype(gradients[0].dtype)

    d_head, d_features = (jax.tree.map(combined, *of_totals) for of_totals in residuals)
    return d_head, d_features, None


chunked_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _sums(totals: Totals) -> list[Array]:
    """Return the sum of a Total, or of each in the order of their names."""
    if isinstance(totals, Total):
        return [totals.total]
    return [totals[name].total for name in sorted(totals)]


def _units(values: list[Array]) -> list[list[Array]]:
    """Return the unit cotangent of each of some scalars."""
    return [
        [
            jnp.ones_like(value) if n == m else jnp.zeros_like(value)
            for m, value in enumerate(values)
        ]
        for n in range(len(values))
    ]
