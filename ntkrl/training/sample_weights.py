"""Weights of a minibatch's samples under an entropy budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ntkrl import attribution, runtime, update
from ntkrl.numerics import masked_total
from ntkrl.scoring import completion_features, head_of
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.softmax import OutputHead, SoftmaxOptions, token_statistics
from ntkrl.types import Params, Total, TrainState, UpdateBatch


class SampleWeights:
    """The weights that keep each step's predicted change of entropy above `-entropy_budget`.

    The entropy is that of the minibatch's tokens at the sampling temperature. A weight multiplies
    the advantages of its sample.
    """

    def __init__(
        self,
        settings: RunSettings,
        model: StartingModel,
        terms: update.LossFn[dict[str, Total]],
        bound_stages: Sequence[update.BoundStage],
    ):
        """Bind the weights to the stages of a run with `objective.entropy_budget`."""
        self.mesh, self.budget, self.warned = model.mesh, settings.objective.entropy_budget, False
        tokens = settings.schedule.chunk_tokens * settings.row_shards(model.mesh)
        options = SoftmaxOptions(settings.rollout.temperature, tokens)

        def entropy(params: Params, rows: UpdateBatch) -> Total:
            length, features = rows.completion_mask.shape[1], rows.features
            if features is None:
                features = completion_features(model.policy, params, rows.tokens, rows.mask, length)
            head, targets = head_of(model.policy, params), rows.tokens[:, -length:]
            values = token_statistics(head, features, targets, options).entropy
            return masked_total(values, rows.completion_mask)

        self.by_stage = [
            self._function(
                attribution.EntropyShares(
                    terms, entropy, stage.optimizer, stage.trained, settings.microbatches
                )
            )
            for stage in bound_stages
        ]

    def _function(self, shares: attribution.EntropyShares) -> Callable[..., Any]:
        def weigh(
            state: TrainState, batch: UpdateBatch, reference: OutputHead | None
        ) -> attribution.BudgetWeights:
            return attribution.budget_weights(*shares.read(state, batch, reference), self.budget)

        return jax.jit(weigh)

    def weigh(
        self, state: TrainState, batch: UpdateBatch, reference: OutputHead | None, stage: int
    ) -> tuple[UpdateBatch, dict[str, Any]]:
        """Return the minibatch with weighted advantages, and the metrics of the weights."""
        plain = dataclasses.replace(batch, kl_advantages=None)
        placed = runtime.place_rows(plain, self.mesh)
        opt_state = jax.tree.map(runtime.on_device, state.opt_state)
        on_device = dataclasses.replace(state, opt_state=opt_state)
        result = runtime.fetch(self.by_stage[stage](on_device, placed, reference))
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
