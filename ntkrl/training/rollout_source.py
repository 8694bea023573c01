"""The batch source of RL: prompts → rollout → rewards → token weights → minibatches."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import advantage, probe, rollout, runtime, update
from ntkrl.generate import RewardedRollout, SampleFn, SampleRequest, collect, joined, make_sampler
from ntkrl.scoring import completion_features, head_of
from ntkrl.settings import RunSettings
from ntkrl.setup import RunSetup, StartingModel
from ntkrl.softmax import OutputHead, SoftmaxOptions, TokenStatistics, token_statistics
from ntkrl.training.batch_sources import (
    BatchSource,
    PreferenceSource,
    StepBatches,
    StepContext,
    SupervisedSource,
    averages,
    split,
    step_rows,
)
from ntkrl.types import Array, Params, Rollout, Total, UpdateBatch

WEIGHTS_STREAM = 1 << 20
"""Folded into the key of a rollout step for the key of its token weights."""


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
        column = jnp.zeros((self.group, 1))
        update.advantages(objective, self.group, column[:, 0], column, column == 0)
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


class RolloutSource(BatchSource):
    """Prompts → rollout → rewards → token weights → minibatches."""

    def __init__(self, setup: RunSetup):
        self.setup, self.position = setup, 0
        self.functions = RolloutFunctions(setup.settings, setup.model)
        self.loss, self.term_losses = self.functions.loss, self.functions.term_losses

    def batches(self, context: StepContext) -> StepBatches:
        """Sample, reward and weigh; minibatches without a gradient are dropped and counted.

        Raises:
          ValueError: nothing to learn from and schedule.on_no_signal "stop", or what the reward
            functions did wrong.
        """
        schedule = self.setup.settings.schedule
        rewarded, metrics = self._collect(context)
        metrics |= rollout_metrics(rewarded, self.functions.group)
        batch, weight_metrics = self._batch(context, rewarded)
        metrics |= weight_metrics
        context.clock("score")
        parts = split(batch, schedule.minibatches)
        batches = [part for part in parts if self._has_gradient(part)]
        metrics["skipped_updates"] = float(len(parts) - len(batches))
        if not batches and schedule.on_no_signal == "stop":
            raise ValueError(
                f"no completion of rollout step {context.rollout_step} has anything to learn from "
                f"({metrics['frac_reward_zero_std']:.0%} of the groups got equal rewards, "
                f"{metrics['completions/clipped_ratio']:.0%} of the completions were cut); "
                'schedule.on_no_signal="skip" goes on with the next prompts.'
            )
        return StepBatches(batches, metrics, self._reference_head(context))

    def summary(
        self, step_metrics: Sequence[dict[str, float]], rollout_step: int
    ) -> dict[str, float]:
        """Average over optimizer steps, under the names of the metric glossary.

        Raises:
          ValueError: sampler and trainer disagree before the first update of the rollout.
        """
        if not step_metrics:
            return {}
        first = step_metrics[0]
        self._check_log_ratio(first["log_ratio_max"], rollout_step)
        metrics = averages(step_metrics)
        metrics["policy_loss"] = metrics.pop("loss")
        for name, key in (("mean", "log_ratio"), ("max", "log_ratio_max")):
            del metrics[key]
            metrics[f"sampling/sampling_logp_difference/{name}"] = first[key]
        for side, name, extreme in (("low", "min", min), ("high", "max", max)):
            if f"clip_ratio/{side}_mean" in metrics:
                values = [metrics[f"clip_ratio/{side}_mean"] for metrics in step_metrics]
                metrics[f"clip_ratio/{side}_{name}"] = extreme(values)
        return metrics

    def _check_log_ratio(self, gap: float, rollout_step: int) -> None:
        settings = self.setup.settings
        tolerance, (compute, cache) = settings.log_ratio_tolerance, settings.network_dtypes
        if gap > tolerance and settings.rollout.exact:
            raise ValueError(
                f"the sampler's log-probs and the trainer's differ by {gap:.3g} nats at rollout "
                f"step {rollout_step}: the compiler made different code of the two here, so that "
                "rollout.exact cannot hold; leave it out, in another run_dir."
            )
        if gap > tolerance:
            raise ValueError(
                f"the sampler's log-probs and the trainer's differ by {gap:.3g} nats at rollout "
                f"step {rollout_step}, more than schedule.log_ratio_tolerance = {tolerance:g} (the "
                f"network computes in {compute}, its cache is {cache}): the importance ratio "
                "before the first update must be 1. If rounding explains the difference, run the "
                "same command with schedule.log_ratio_tolerance above it; or compute and cache in "
                "float32, or set objective.correction, in another run_dir."
            )

    def _reference_head(self, context: StepContext) -> OutputHead | None:
        if not self.functions.reference_in_loss:
            return None
        return head_of(self.setup.model.policy, context.reference)

    def _collect(self, context: StepContext) -> tuple[RewardedRollout, dict[str, float]]:
        """Sample and reward the step's prompts, and replace groups without signal on request."""
        setup, group = self.setup, self.functions.group
        sampler = self.functions.sampler(context.bound_stage)

        def draw(key: Array) -> RewardedRollout:
            rows = step_rows(setup.settings, setup.train, self.position)
            self.position += 1
            request = SampleRequest(setup.train, rows)
            return collect(setup, sampler, context.params, request, key, context.clock)

        rewarded = draw(context.key)
        if self.functions.objective.group_filter != "resample":
            return rewarded, {}
        needed, rounds = setup.settings.data.prompts_per_step, 0
        equal_P = _equal_groups(rewarded, group)
        while np.sum(~equal_P) < needed and rounds < setup.settings.schedule.resample_rounds:
            rounds += 1
            more = draw(jax.random.fold_in(context.key, rounds))
            rewarded = joined(rewarded, more, setup.model.tokenizer.pad_token_id)
            equal_P = _equal_groups(rewarded, group)
        # groups with signal first, in the order they were drawn
        chosen_P = np.argsort(equal_P, kind="stable")[:needed]
        rows_B = (chosen_P[:, None] * group + np.arange(group)).reshape(-1)
        return rewarded.take(rows_B), {"resampling_rounds": float(rounds)}

    def _batch(
        self, context: StepContext, rewarded: RewardedRollout
    ) -> tuple[UpdateBatch, dict[str, float]]:
        """Attach log-probs of both policies and the weight of each token."""
        drawn, functions = rewarded.rollout, self.functions
        features = drawn.features if context.features_fixed else None
        tokens, mask, features = runtime.place_rows(
            (drawn.tokens, drawn.mask, features), self.setup.model.mesh
        )
        length = drawn.completion_mask.shape[1]
        old_log_probs, reading = drawn.sampler_log_probs, None
        if functions.needs_reference and functions.objective.needs_distribution:
            # the loss compares distributions itself, in the update's forward pass
            params = None if functions.reference_in_loss else context.params
            reading = functions.statistics(
                context.reference, params, tokens, mask, features, length=length
            )
        if functions.objective.correction != "off" and not functions.exact:
            values = None if reading is None else reading.policy_log_probs
            if values is None:
                values = functions.log_probs(context.params, tokens, mask, None, length=length)
            old_log_probs = runtime.fetch(values)
        ref_log_probs, kl, ref_features = old_log_probs, None, None
        if reading is not None:
            ref_log_probs, kl = runtime.fetch((reading.log_probs, reading.kl))
            ref_features = reading.features if functions.reference_in_loss else None
        elif functions.needs_reference:
            values = functions.log_probs(context.reference, tokens, mask, features, length=length)
            ref_log_probs = runtime.fetch(values)
        arrays = update.RolloutArrays(
            rewards=jnp.asarray(rewarded.result.rewards),
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            behaviour_log_probs=drawn.sampler_log_probs - drawn.kept_log_mass,
            mask=drawn.completion_mask,
            finished=drawn.finished,
            kl=kl,
        )
        # replicated on the default device: a few numbers per token
        on_device = jax.tree.map(jnp.asarray, arrays)
        key = jax.random.fold_in(context.key, WEIGHTS_STREAM)
        weights = runtime.fetch(functions.token_weights(on_device, key))
        batch = update_batch(drawn, arrays, weights, ref_features)
        metrics = {name: float(value) for name, value in weights.metrics.items()}
        if functions.needs_reference and not functions.objective.needs_reference:
            metrics["kl"] = _mean_kl(on_device)  # for a stage's budget alone
        return batch, metrics

    def _has_gradient(self, batch: UpdateBatch) -> bool:
        """Return whether a step on the batch has a nonzero gradient."""
        objective, mask = self.functions.objective, batch.completion_mask
        kl_in_loss = objective.kl_place == "loss" and objective.needs_reference
        per_token = kl_in_loss or objective.entropy_coefficient > 0
        weighted = per_token or batch.penalties is not None
        return bool(np.any(mask & (weighted | (batch.advantages != 0))))


BATCH_SOURCES: dict[str, Callable[[RunSetup], BatchSource]] = {
    "rl": RolloutSource,
    "sft": SupervisedSource,
    "reward": PreferenceSource,
}
"""The batch source of each method."""


def update_batch(
    drawn: Rollout,
    arrays: update.RolloutArrays,
    weights: update.TokenWeights,
    ref_features: Array | None,
) -> UpdateBatch:
    """Return the batch of a rollout; arrays of the host, of devices, or shapes."""
    return UpdateBatch(
        tokens=drawn.tokens,
        mask=drawn.mask,
        completion_mask=weights.mask,
        old_log_probs=arrays.old_log_probs,
        ref_log_probs=arrays.ref_log_probs,
        advantages=weights.advantages,
        penalties=weights.penalties,
        kl_advantages=weights.kl_advantages,
        features=drawn.features,
        ref_features=ref_features,
    )


def rollout_metrics(rewarded: RewardedRollout, group: int) -> dict[str, float]:
    """Return the metrics of a rollout; failed calls of reward functions are logged too.

    Args:
      rewarded: B completions, the `group` of a prompt in consecutive rows.
      group: completions per prompt, ≥ 2.

    Returns:
      Numbers by the names of the metric glossary. A name is left out where it is undefined: no
      completion ended, a reward function applied to none, a standard deviation of one number.

    Source: TRL 1.16's RLOOTrainer, but for `reward_group_std`, TRL's `reward_std` until 0.26.
    """
    result, rollout = rewarded.result, rewarded.rollout
    rewards_PN = result.rewards.astype(np.float64).reshape(-1, group)
    variances_P, signal = probe.reward_signal(rewards_PN)
    lengths_B = np.asarray(rollout.completion_mask).sum(axis=1)
    ended_B = np.asarray(rollout.finished)
    metrics = {
        "reward": float(rewards_PN.mean()),
        "reward_std": float(rewards_PN.std(ddof=1)),
        "reward_group_std": float(np.sqrt(variances_P).mean()),
        "frac_reward_zero_std": signal["frac_reward_zero_std"],
        "signal/reward_variance": signal["reward_variance"],
        "completions/clipped_ratio": float(1 - np.mean(ended_B)),
    }
    for suffix, lengths in (("length", lengths_B), ("terminated_length", lengths_B[ended_B])):
        if lengths.size:
            for name, statistic in (("mean", np.mean), ("min", np.min), ("max", np.max)):
                metrics[f"completions/{name}_{suffix}"] = float(statistic(lengths))
    for name, reason in result.failures.items():
        runtime.log(f"counted as reward.on_failure: {reason}")
        metrics[f"rewards/{name}/failures"] = 1.0
    for name, values in result.per_function.items():
        applicable = values[~np.isnan(values)].astype(np.float64)
        if applicable.size:
            metrics[f"rewards/{name}/mean"] = float(applicable.mean())
        if applicable.size > 1:
            metrics[f"rewards/{name}/std"] = float(applicable.std(ddof=1))
    return metrics | {f"logged/{name}": value for name, value in result.logged.items()}


def _equal_groups(rewarded: RewardedRollout, group: int) -> np.ndarray:
    return np.asarray(advantage.equal_groups(jnp.asarray(rewarded.result.rewards), group))


def _mean_kl(arrays: update.RolloutArrays) -> float:
    kl_BC = update.kl_estimate("k3", arrays.old_log_probs, arrays.ref_log_probs, arrays.mask)
    return float(jnp.sum(kl_BC)) / int(np.sum(arrays.mask))
