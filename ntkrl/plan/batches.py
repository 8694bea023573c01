"""Shapes of the batches that a run makes, every prompt and completion at its full length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ntkrl import data, trees
from ntkrl.scoring import head_of
from ntkrl.types import UpdateBatch

if TYPE_CHECKING:
    from ntkrl.plan.programs import Run


class Drawn(NamedTuple):
    """Shapes of a rollout as the loop has it: see types.Rollout."""

    tokens: Any
    mask: Any
    completion_mask: Any
    features: Any


def drawn(run: Run) -> Drawn:
    """Describe a whole rollout, every prompt and completion at its full length."""
    settings = run.settings
    rows = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
    budget = settings.rollout.max_completion_tokens
    width = settings.data.max_prompt_tokens + budget
    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, width), jnp.bool_)
    dtype = jax.eval_shape(run.policy.features, run.params, tokens, mask).dtype
    features = jax.ShapeDtypeStruct((rows, budget, run.policy.feature_size), dtype)
    return Drawn(*run.rows((tokens, mask, mask.update(shape=(rows, budget)), features)))


def minibatch(run: Run, number: int, accounted: bool = False) -> tuple[UpdateBatch, Any]:
    """Describe the batch and the reference's head that a stage's step is given.

    accounted: whether a ledger is made of the step; by sample it takes the KL's part of the
    advantages for a factor (`assembly.watching.kl_shares`).
    """
    settings, parts = run.settings, run.settings.schedule.minibatches
    if settings.method == "sft":
        return run.rows(_supervised(run)), None
    whole, objective = drawn(run), settings.objective
    rows, budget = whole.completion_mask.shape
    each = rows // parts
    log_probs = jax.ShapeDtypeStruct((rows, budget), jnp.float32)
    rewards, finished = (jax.ShapeDtypeStruct((rows,), d) for d in (jnp.float32, jnp.bool_))
    kl = log_probs if objective.needs_distribution and run.source.compares else None
    log = (log_probs,) * 3
    weights = jax.eval_shape(
        run.source.weigh, rewards, *log, whole.completion_mask, finished, kl, run.key
    )
    told = accounted and settings.probe.ledger_by == "group"
    beside = objective.kl_place == "loss" and objective.needs_distribution
    batch = UpdateBatch(
        tokens=whole.tokens,
        mask=whole.mask,
        completion_mask=weights["mask"],
        old_log_probs=log_probs,
        ref_log_probs=log_probs,
        advantages=weights["advantages"],
        kl_advantages=weights["kl_advantages"] if told else None,
        penalties=weights["penalties"],
        features=whole.features if run.stages[number].head_alone else None,
        ref_features=whole.features if beside else None,
    )
    batch = jax.tree.map(lambda leaf: leaf.update(shape=(each, *leaf.shape[1:])), batch)
    return run.rows(batch), head_of(run.policy, run.params) if beside else None


def _supervised(run: Run) -> Any:
    """Describe a supervised minibatch; packed, as if every example filled a row."""
    settings = run.settings
    count = settings.data.prompts_per_step // settings.schedule.minibatches
    prompt, budget = settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens
    prompts, completions, rows = [[0] * prompt], [[0] * budget], [0] * count

    def batch() -> UpdateBatch:
        if not settings.data.packing:
            return data.supervised_batch(prompts, completions, rows, 0, prompt, budget)
        multiple = trees.row_parts(run.mesh) * settings.schedule.microbatches
        return data.packed_batches(prompts, completions, [rows], 0, prompt + budget, multiple)[0]

    return jax.eval_shape(batch)
