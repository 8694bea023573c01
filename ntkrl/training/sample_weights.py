"""Weights of a minibatch's samples under an entropy budget."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import attribution, runtime, scoring, update
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.softmax import OutputHead, SoftmaxOptions
from ntkrl.types import Array, Params, Total, TrainState, UpdateBatch


class SampleWeights:
    """The weights that keep each step's predicted change of entropy above `-entropy_budget`.

    The entropy is that of the minibatch's tokens at the sampling temperature. A weight multiplies
    the advantages of its sample. The shares of all rows are computed together, in no microbatches.
    """

    def __init__(
        self,
        settings: RunSettings,
        model: StartingModel,
        terms: update.LossFn[dict[str, Total]],
        bound_stages: Sequence[update.BoundStage],
    ):
        budget, temperature = settings.objective.entropy_budget, settings.rollout.temperature
        self.mesh, self.budget, self.warned = model.mesh, budget, False
        tokens = settings.schedule.chunk_tokens * settings.row_shards(model.mesh)
        options = SoftmaxOptions(temperature, tokens)

        def entropy(params: Params, batch: UpdateBatch) -> Array:
            mask = batch.completion_mask
            values = scoring.score(
                model.policy, params, batch.tokens, batch.mask, mask.shape[1], options
            )
            total = jnp.sum(jnp.where(mask, values.entropy, 0))
            return total / jnp.maximum(jnp.sum(mask), 1)

        def weigh(
            shares: attribution.EntropyShares,
            state: TrainState,
            batch: UpdateBatch,
            reference: OutputHead | None,
        ) -> attribution.BudgetWeights:
            return attribution.budget_weights(*shares.read(state, batch, reference), budget)

        self.by_stage = [
            jax.jit(
                functools.partial(
                    weigh,
                    attribution.EntropyShares(terms, entropy, stage.optimizer, stage.trained),
                )
            )
            for stage in bound_stages
        ]

    def weigh(
        self, state: TrainState, batch: UpdateBatch, reference: OutputHead | None, stage: int
    ) -> tuple[UpdateBatch, dict[str, Any]]:
        """Return the minibatch with weighted advantages, and the metrics of the weights."""
        plain = dataclasses.replace(batch, kl_advantages=None)
        placed = runtime.place_rows(plain, self.mesh)
        result = runtime.fetch(self.by_stage[stage](state, placed, reference))
        weights_B1 = np.asarray(result.weights)[:, None]
        parts = {"advantages": batch.advantages * weights_B1}
        if batch.kl_advantages is not None:
            parts["kl_advantages"] = batch.kl_advantages * weights_B1
        if not self.warned and self.budget < result.least:
            self.warned = True
            runtime.log(
                f"no weights in [0, 2] meet objective.entropy_budget={self.budget:g} at this step; "
                f"the least that they meet is {float(result.least):.3g} nats. Samples that lower "
                "the entropy got weight 0, the others 2."
            )
        metrics = {
            "entropy_budget/change": result.change,
            "entropy_budget/mean_weight": np.mean(weights_B1),
            "entropy_budget/weight_spread": np.std(weights_B1),
        }
        return dataclasses.replace(batch, **parts), metrics
