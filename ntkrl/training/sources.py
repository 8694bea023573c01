"""Where update batches come from: sampled and rewarded (RL), or read from examples (supervised).

A source says which rows a rollout step takes, what its loss is and how its metrics are called;
the loop is the same for both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ntkrl import data, trees, update
from ntkrl.generate import Clock
from ntkrl.numerics import bucket_length
from ntkrl.settings import HEADLINES
from ntkrl.setup.assemble import Setup
from ntkrl.types import Array, Params, UpdateBatch
from ntkrl.update import StageProgram


class StepContext(NamedTuple):
    """What a source is told about the rollout step it makes batches for.

    params: of the policy. reference: params of the reference policy. program: of the stage.
    features_fixed: whether no stage so far has moved the body, so that the reference policy's
    features are the policy's own. step: rollout steps before. key: consumed. clock: laps.
    """

    params: Params
    reference: Params
    program: StageProgram
    features_fixed: bool
    step: int
    key: Array
    clock: Clock


class SupervisedSource:
    """Prompts with given completions → minibatches."""

    headline = HEADLINES["sft"]

    def __init__(self, setup: Setup):
        self.setup, self.position = setup, 0
        given = {"chunk_tokens": setup.settings.schedule.chunk_tokens, "spread": setup.spread}
        self.minimised, self.terms = (
            update.policy_loss_fn(setup.policy, loss, **given)
            for loss in (update.supervised_loss, update.supervised_terms)
        )

    def evaluate(self, params: Params) -> dict[str, float]:
        """What is evaluated beside sampled completions: nothing."""
        return {}

    def batches(self, turn: StepContext) -> tuple[list[UpdateBatch], dict[str, float]]:
        """Return the minibatches of a step as host arrays; neither params nor key are used."""
        setup = self.setup
        settings = setup.settings
        rows, parts = step_rows(setup, self.position), settings.schedule.minibatches
        self.position += 1
        if settings.data.packing:
            # each minibatch by itself, so that it holds the examples it would hold unpacked
            batches = jax.device_get(self._packed(np.split(rows, parts)))
            filled = np.mean([np.mean(batch.mask > 0) for batch in batches])
            metrics = {"packing/fill": float(filled)}
        else:
            batches, metrics = split(jax.device_get(self._padded(rows)), parts), {}
        turn.clock("data")
        return batches, metrics

    def _padded(self, rows: np.ndarray) -> UpdateBatch:
        train, settings = self.setup.train, self.setup.settings
        prompt, completion = (
            max(len(ids[row]) for row in rows) for ids in (train.encoded, train.completions)
        )
        return data.supervised_batch(
            train.encoded,
            train.completions,
            rows,
            self.setup.tokenizer.pad_token_id,
            bucket_length(prompt, settings.data.max_prompt_tokens),
            bucket_length(completion, settings.rollout.max_completion_tokens),
        )

    def _packed(self, parts: list[np.ndarray]) -> list[UpdateBatch]:
        train, settings = self.setup.train, self.setup.settings
        return data.packed_batches(
            train.encoded,
            train.completions,
            parts,
            self.setup.tokenizer.pad_token_id,
            settings.data.max_prompt_tokens + settings.rollout.max_completion_tokens,
            trees.row_parts(self.setup.mesh) * settings.schedule.microbatches,
        )

    def reference_head(self, turn: StepContext) -> None:
        """No reference policy is compared with."""

    def summary(self, logged: list[dict[str, float]]) -> dict[str, float]:
        """Average the optimizer steps, under the glossary's names."""
        return averages(logged)

    def check_first(self, values: dict[str, float], rollout_step: int) -> None:
        """Nothing was sampled, so nothing can disagree."""


def step_rows(setup: Setup, position: int) -> np.ndarray:
    """Return which prompts the batch at a position takes."""
    settings, train = setup.settings, setup.train
    count, weights = settings.data.prompts_per_step, settings.data.weights
    if weights is None:
        return data.rows_at(position, train.size, count, settings.seed)
    return data.weighted_rows_at(position, train.sizes, count, settings.seed, weights)


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch in equal parts along its rows."""
    rows = len(jax.tree.leaves(batch)[0]) // parts
    return [jax.tree.map(lambda leaf: leaf[i * rows : (i + 1) * rows], batch) for i in range(parts)]


def averages(logged: list[dict[str, float]]) -> dict[str, Any]:
    """Return the mean of every metric."""
    return {name: float(np.mean([one[name] for one in logged])) for name in logged[0]}
