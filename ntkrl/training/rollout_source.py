"""The batch source of RL: prompts → rollout → rewards → token weights → minibatches."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import advantage, probe, runtime, update
from ntkrl.generate import (
    RewardedRollout,
    SampledTexts,
    SampleRequest,
    add_rewards,
    joined,
    sample,
)
from ntkrl.scoring import head_of
from ntkrl.setup import RunSetup
from ntkrl.softmax import OutputHead
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
from ntkrl.training.rollout_functions import RolloutFunctions
from ntkrl.training.rollout_log import weighted_rollout
from ntkrl.types import Array, Rollout, UpdateBatch

WEIGHTS_STREAM = 1 << 20
"""Folded into the key of a rollout step for the key of its token weights."""


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
        rewarded, metrics = self._collect(context)
        step = self.weigh(context, rewarded)
        return step._replace(metrics=metrics | step.metrics)

    def sample(self, context: StepContext, round_key: Array | None = None) -> SampledTexts:
        """Sample the next prompts and advance `position`.

        Args:
          context: of the step.
          round_key: consumed instead of the context's, where a step samples again.
        """
        rows = step_rows(self.setup.settings, self.setup.train, self.position)
        self.position += 1
        sampler = self.functions.sampler(context.bound_stage)
        key = context.key if round_key is None else round_key
        request = SampleRequest(self.setup.train, rows)
        sampled = sample(self.setup, sampler, context.params, request, key)
        context.clock("sample")
        return sampled

    def reward(self, context: StepContext, sampled: SampledTexts) -> RewardedRollout:
        """Reward the completions of a step.

        Raises:
          ValueError: what the reward functions did wrong.
        """
        batches = self.position - 1  # without that of the completions
        setup = self.setup.during(context.optimizer_steps, batches, context.tokens)
        rewarded = add_rewards(setup, sampled)
        context.clock("reward")
        return rewarded

    def weigh(self, context: StepContext, rewarded: RewardedRollout) -> StepBatches:
        """Return the minibatches of rewarded completions, with the weight of each token.

        Raises:
          ValueError: nothing to learn from and schedule.on_no_signal "stop".
        """
        schedule = self.setup.settings.schedule
        metrics = rollout_metrics(rewarded, self.functions.group)
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
        rollouts = weighted_rollout(rewarded, batch)
        return StepBatches(batches, metrics, self._reference_head(context), rollouts)

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
        rewarded = self.reward(context, self.sample(context))
        if self.functions.objective.group_filter != "resample":
            return rewarded, {}
        needed, rounds = setup.settings.data.prompts_per_step, 0
        equal_P = _equal_groups(rewarded, group)
        while np.sum(~equal_P) < needed and rounds < setup.settings.schedule.resample_rounds:
            rounds += 1
            key = jax.random.fold_in(context.key, rounds)
            more = self.reward(context, self.sample(context, key))
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
