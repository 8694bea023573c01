"""Compiled functions of an RL step: samplers, losses, readings of completions, token weights."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl import rollout, update
from ntkrl.generate import SampleFn, make_sampler
from ntkrl.scoring import completion_features, head_of
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.softmax import SoftmaxOptions, TokenStatistics, token_statistics
from ntkrl.types import Array, Params, Total, UpdateBatch


class ReferenceReading(NamedTuple):
    """Completions under the reference policy, where its full distribution is needed.

    log_probs: `[B, C]`. features: `[B, C, D]`.
    kl: KL(policy ‖ reference) `[B, C]` (nats), or None where the loss computes it.
    policy_log_probs: `[B, C]` of the policy, read for `kl`, or None.
    """

    log_probs: Array
    features: Array
    kl: Array | None = None
    policy_log_probs: Array | None = None


class RolloutFunctions:
    """The compiled functions of an RL step, which depend on no data.

    samplers: by whether features are recorded, `(params, prompts, key) -> Rollout`.
    loss, term_losses: see BatchSource.
    log_probs, statistics: readings of completions, see `_log_probs` and `_statistics`.
    token_weights: `(RolloutArrays, key) -> TokenWeights`.
    needs_reference: whether log-probs of the reference policy are read.
    reference_in_loss: whether the loss compares whole distributions with the reference policy.
    """

    def __init__(self, settings: RunSettings, model: StartingModel):
        """Bind the functions to a model.

        Raises:
          ValueError: a group too small for the advantage estimator, or what `make_sampler` raises.
        """
        objective, schedule = settings.objective, settings.schedule
        self.objective, self.policy = objective, model.policy
        self.group = settings.rollout.completions_per_prompt
        self.temperature = settings.rollout.temperature
        shards = settings.row_shards(model.mesh)
        self.options = SoftmaxOptions(self.temperature, schedule.chunk_tokens * shards)
        # a group too small for the estimator fails here, before anything is sampled
        # (by shapes alone, since it may also be larger than the memory)
        row = jax.ShapeDtypeStruct((self.group,), jnp.float32)
        column, mask = (jax.ShapeDtypeStruct((self.group, 1), kind) for kind in (row.dtype, bool))
        estimate = functools.partial(update.advantages, objective, self.group)
        jax.eval_shape(estimate, row, column, mask)
        self.samplers = {
            keep: make_sampler(settings, model, self.group, self.temperature, keep)
            for keep in (False, True)
        }
        budget = settings.rollout.max_completion_tokens

        def loss(statistics: TokenStatistics, batch: UpdateBatch) -> tuple[Total, update.Measures]:
            return update.policy_loss(objective, budget, statistics, batch)

        self.loss = update.policy_loss_fn(
            model.policy, loss, self.temperature, schedule.chunk_tokens, shards
        )
        term_losses = update.policy_terms(objective, budget)
        self.term_losses = update.policy_loss_fn(
            model.policy, term_losses, self.temperature, schedule.chunk_tokens, shards
        )
        self.log_probs = jax.jit(self._log_probs, static_argnames="length")
        self.statistics = jax.jit(self._statistics, static_argnames="length")
        self.token_weights = jax.jit(functools.partial(update.token_weights, objective, self.group))
        budgets = [stage.kl_budget for stage in settings.stages if stage.kl_budget is not None]
        self.needs_reference = objective.needs_reference or bool(budgets)
        self.reference_in_loss = objective.kl_place == "loss" and objective.needs_distribution
        self.exact, self.schedule, self.mesh = settings.rollout.exact, schedule, model.mesh
        self.exact_samplers: dict[tuple[bool, ...], rollout.ExactSampler] = {}

    def sampler(self, bound_stage: update.BoundStage) -> SampleFn:
        """Return the sampler of a stage."""
        if not self.exact:
            return self.samplers[bound_stage.head_alone]
        trained, plain, schedule = bound_stage.trained, self.samplers[False], self.schedule
        if trained not in self.exact_samplers:
            assert isinstance(plain, rollout.Sampler)  # no engine goes with exact sampling
            assert schedule.microbatches is not None  # as checked with the settings
            counts = (schedule.minibatches, schedule.microbatches, schedule.chunk_tokens)
            reading = rollout.UpdateReading(trained, *counts)
            self.exact_samplers[trained] = rollout.ExactSampler(plain, self.mesh, reading)
        return self.exact_samplers[trained]

    def _log_probs(
        self, params: Params, tokens: Array, mask: Array, features: Array | None, length: int
    ) -> Array:
        """Return `[B, C]` log-probs of the last `length` tokens; features if already known."""
        if features is None:
            features = completion_features(self.policy, params, tokens, mask, length)
        head, targets = head_of(self.policy, params), tokens[:, -length:]
        return token_statistics(head, features, targets, self.options).log_probs

    def _statistics(
        self,
        reference: Params,
        params: Params | None,
        tokens: Array,
        mask: Array,
        features: Array | None,
        length: int,
    ) -> ReferenceReading:
        """Read the last `length` tokens under the reference policy, and the policy unless None.

        Features that are already known are those of both: their body has not changed.
        """
        known, policy = features, self.policy
        if features is None:
            features = completion_features(policy, reference, tokens, mask, length)
        head, targets = head_of(policy, reference), tokens[:, -length:]
        log_probs_BC = token_statistics(head, features, targets, self.options).log_probs
        if params is None:
            return ReferenceReading(log_probs_BC, features)
        if known is None:
            known = completion_features(policy, params, tokens, mask, length)
        pair = (head, features)
        compared = token_statistics(head_of(policy, params), known, targets, self.options, pair)
        return ReferenceReading(log_probs_BC, features, compared.kl, compared.log_probs)
