"""The batches of each rollout step: the BatchSource protocol, and its sources of given data.

Completions (sft) and preferences (a reward model) are sources of given data; `rollout_source` has
that of RL, which samples.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from ntkrl import data, runtime, trees, update
from ntkrl.generate import Clock
from ntkrl.numerics import bucket_length
from ntkrl.reward import RewardTexts
from ntkrl.settings import RunSettings
from ntkrl.setup import Prompts, RunSetup, StartingModel
from ntkrl.softmax import OutputHead
from ntkrl.training.rollout_step import WeightedRollout
from ntkrl.types import Array, Params, PreferenceBatch, Total, UpdateBatch

Batch = UpdateBatch | PreferenceBatch
BatchType = TypeVar("BatchType", UpdateBatch, PreferenceBatch)
EVALUATION_ROWS = 32
"""Held-out pairs read at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepContext:
    """State of the run at the beginning of a rollout step.

    params: params of the policy.
    reference: params of the reference policy.
    bound_stage: the current stage.
    features_fixed: whether no stage so far moves the body, so that the reference policy's features
        equal the policy's.
    rollout_step: number of this step, from 1.
    key: consumed.
    clock: called with the name of an activity when it is done.
    optimizer_steps, tokens: steps taken before, and tokens trained on.
    """

    params: Params
    reference: Params
    bound_stage: update.BoundStage
    features_fixed: bool
    rollout_step: int
    key: Array
    clock: Clock
    optimizer_steps: int = 0
    tokens: int = 0


class StepBatches(NamedTuple):
    """The data of one rollout step.

    batches: minibatches in host memory, one optimizer step each and epoch.
    metrics: metrics of the data, logged with the step.
    reference: head of the reference policy, where the loss compares whole distributions.
    rollouts: the completions that it was made of, where it samples.
    """

    batches: Sequence[Batch]
    metrics: dict[str, float]
    reference: OutputHead | None = None
    rollouts: WeightedRollout | None = None


class BatchSource(Protocol):
    """The batches of a run, their loss, and the metrics of both.

    loss: `(params, batch, reference) -> (Total, Measures)`.
    term_losses: the same with a Total for each term of the loss; None where ledgers and probes are
        not offered.
    position: batches of prompts drawn so far; saved in checkpoints, set on resume.
    """

    loss: update.LossFn[Total]
    term_losses: update.LossFn[dict[str, Total]] | None
    position: int

    def batches(self, context: StepContext) -> StepBatches:
        """Return the minibatches of a rollout step and advance `position`.

        Raises:
          ValueError: the data cannot be trained on.
        """

    def summary(
        self, step_metrics: Sequence[dict[str, float]], rollout_step: int
    ) -> dict[str, float]:
        """Return the metrics of a rollout step from those of its optimizer steps.

        Args:
          step_metrics: metrics of each optimizer step in order; empty if no batch was trained on.
          rollout_step: for messages.

        Raises:
          ValueError: they show that the run is at fault, such as a sampler that disagrees with the
            trainer.
        """

    def evaluate(self, params: Params) -> dict[str, float]:
        """Return metrics on held-out data other than those of sampled completions."""
        return {}


def step_rows(settings: RunSettings, prompts: Prompts, position: int) -> np.ndarray:
    """Return the rows of the prompts in the batch at a position."""
    count, weights = settings.data.prompts_per_step, settings.data.weights
    if weights is None:
        return data.rows_at(position, prompts.size, count, settings.seed)
    return data.weighted_rows_at(position, prompts.sizes, count, settings.seed, weights)


def split(batch: BatchType, parts: int) -> list[BatchType]:
    """Split a batch into equal parts along its rows."""
    rows = len(jax.tree.leaves(batch)[0]) // parts
    return [jax.tree.map(lambda leaf: leaf[i * rows : (i + 1) * rows], batch) for i in range(parts)]


def averages(step_metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over optimizer steps."""
    names = step_metrics[0]
    return {name: float(np.mean([metrics[name] for metrics in step_metrics])) for name in names}


def supervised_losses(
    settings: RunSettings, model: StartingModel
) -> tuple[update.LossFn[Total], update.LossFn[dict[str, Total]]]:
    """Return the supervised loss, and the same by term."""
    chunk_tokens, shards = settings.schedule.chunk_tokens, settings.row_shards(model.mesh)
    loss = update.policy_loss_fn(
        model.policy, update.supervised_loss, chunk_tokens=chunk_tokens, row_shards=shards
    )
    term_losses = update.policy_loss_fn(
        model.policy, update.supervised_terms, chunk_tokens=chunk_tokens, row_shards=shards
    )
    return loss, term_losses


class SupervisedSource(BatchSource):
    """Prompts with given completions → minibatches."""

    def __init__(self, setup: RunSetup):
        self.setup, self.position = setup, 0
        self.loss, self.term_losses = supervised_losses(setup.settings, setup.model)

    def batches(self, context: StepContext) -> StepBatches:
        """Return the minibatches of a step, packed where the config asks for it."""
        settings, metrics = self.setup.settings, {}
        rows = step_rows(settings, self.setup.train, self.position)
        parts = settings.schedule.minibatches
        self.position += 1
        if settings.data.packing:
            # each minibatch by itself, so that it holds the examples it would hold unpacked
            batches = jax.device_get(self._packed(np.split(rows, parts)))
            filled = np.mean([np.mean(batch.mask > 0) for batch in batches])
            metrics = {"packing/fill": float(filled)}
        else:
            batches = split(jax.device_get(self._padded(rows)), parts)
        context.clock("data")
        return StepBatches(batches, metrics)

    def summary(
        self, step_metrics: Sequence[dict[str, float]], rollout_step: int
    ) -> dict[str, float]:
        """Average over optimizer steps."""
        return averages(step_metrics)

    def _padded(self, rows: np.ndarray) -> UpdateBatch:
        train, settings = self.setup.train, self.setup.settings
        prompt, completion = (
            max(len(ids[row]) for row in rows) for ids in (train.encoded, train.completions)
        )
        return data.supervised_batch(
            train.encoded,
            train.completions,
            rows,
            self.setup.model.tokenizer.pad_token_id,
            bucket_length(prompt, settings.data.max_prompt_tokens),
            bucket_length(completion, settings.rollout.max_completion_tokens),
        )

    def _packed(self, parts: list[np.ndarray]) -> list[UpdateBatch]:
        train, settings = self.setup.train, self.setup.settings
        return data.packed_batches(
            train.encoded,
            train.completions,
            parts,
            self.setup.model.tokenizer.pad_token_id,
            settings.data.max_prompt_tokens + settings.rollout.max_completion_tokens,
            trees.row_parts(self.setup.model.mesh) * settings.microbatches,
        )


class PreferenceSource(BatchSource):
    """Preferences → minibatches of pairs of texts, the chosen one first."""

    term_losses = None

    def __init__(self, setup: RunSetup):
        """Tokenise every text once, so that one that is too long is reported before training.

        Raises:
          ValueError: texts that do not fit the model.
        """
        self.setup, self.position = setup, 0
        scorer = setup.model.scorer
        self.texts = RewardTexts(scorer, setup.model.tokenizer)
        self.train = self._encoded(setup.train)
        self.held_out = None if setup.held_out is None else self._encoded(setup.held_out)
        self.loss = update.preference_loss_fn(
            scorer, setup.settings.preference.centering_coefficient
        )
        self.measure = jax.jit(self.loss)

    def _encoded(self, prompts: Prompts) -> list[tuple[list[list[int]], list[int]]]:
        """Return token ids and gates of the chosen and of the rejected texts."""
        texts = prompts.prompt_set
        return [
            self.texts.encode(texts.prompts, texts.columns[name], texts.columns)
            for name in ("chosen", "rejected")
        ]

    def _batch(
        self, encoded: list[tuple[list[list[int]], list[int]]], rows: Sequence[int] | np.ndarray
    ) -> PreferenceBatch:
        ids = [side[0][row] for row in rows for side in encoded]
        gates = [side[1][row] for row in rows for side in encoded]
        arrays = (*self.texts.pad(ids, len(ids)), np.asarray(gates, np.int32))
        tokens, mask, gates_B2 = jax.tree.map(
            lambda leaf: leaf.reshape(len(rows), 2, *leaf.shape[1:]), arrays
        )
        return PreferenceBatch(tokens=tokens, mask=mask, gates=gates_B2)

    def batches(self, context: StepContext) -> StepBatches:
        """Return the minibatches of pairs of a step."""
        settings = self.setup.settings
        rows = step_rows(settings, self.setup.train, self.position)
        batch = self._batch(self.train, rows)
        self.position += 1
        context.clock("data")
        return StepBatches(split(batch, settings.schedule.minibatches), {})

    def summary(
        self, step_metrics: Sequence[dict[str, float]], rollout_step: int
    ) -> dict[str, float]:
        """Average over optimizer steps, under the names of the metric glossary."""
        metrics = averages(step_metrics)
        metrics["preference_loss"] = metrics.pop("loss")
        return metrics

    def evaluate(self, params: Params) -> dict[str, float]:
        """Return `eval/accuracy` and `eval/margin` on held-out pairs."""
        if self.held_out is None:
            return {}
        count = min(self.setup.settings.evaluation.prompts, self.setup.held_out_prompts.size)
        sums = {"accuracy": 0.0, "margin": 0.0}
        for first in range(0, count, EVALUATION_ROWS):
            rows = range(first, min(first + EVALUATION_ROWS, count))
            batch = runtime.place_rows(self._batch(self.held_out, rows), self.setup.model.mesh)
            _, measures = runtime.fetch(self.measure(params, batch))
            for name in sums:
                sums[name] += float(measures.totals[name].total)
        return {f"eval/{name}": total / count for name, total in sums.items()}
