"""Where update batches come from: sampled and rewarded (RL), or read from examples (supervised).

A source says which rows a rollout step takes, what its loss is and how its metrics are called;
the loop is the same for both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ntkrl import advantage, data, runtime, update
from ntkrl.assembly.collect import Clock, Collected, collect, make_sample
from ntkrl.assembly.setup import Setup
from ntkrl.numerics import TokenStatistics, bucket_length
from ntkrl.scoring import score
from ntkrl.types import Array, Params, ScoredRollout, Total, UpdateBatch

ADVANTAGES = {
    "leave_one_out": advantage.leave_one_out,
    "group_normalised": advantage.group_normalised,
}


class RolloutSource:
    """Prompts → rollout → rewards → advantages → minibatches."""

    headline = "reward"

    def __init__(self, setup: Setup):
        settings = setup.settings
        self.setup, self.objective = setup, settings.objective
        self.temperature = settings.rollout.temperature
        self.group = settings.rollout.completions_per_prompt
        self.advantages = ADVANTAGES[self.objective.advantage]
        # a group too small for the estimator fails here, before anything is sampled
        self.advantages(jnp.zeros(self.group), self.group)
        self.sample = make_sample(setup, self.group)
        chunk = settings.schedule.chunk_tokens
        self.minimised = update.policy_objective(setup.policy, self.loss, self.temperature, chunk)
        self.ref_log_probs = jax.jit(self._log_probs, static_argnames="length")

    def loss(
        self, statistics: TokenStatistics, batch: UpdateBatch
    ) -> tuple[Total, dict[str, Total]]:
        """The objective (see update.policy_loss)."""
        return update.policy_loss(self.objective, statistics, batch)

    def batches(
        self, params: Params, rollout_step: int, key: Array, clock: Clock
    ) -> tuple[list[UpdateBatch], dict[str, float]]:
        """Return the minibatches of a rollout step as host arrays, and the rollout's metrics."""
        setup = self.setup
        rows = step_rows(setup, rollout_step)
        found = collect(setup, self.sample, params, setup.train, rows, key, clock)
        drawn, scored = found.rollout, self._scored(found)
        penalised_B = update.penalised_rewards(
            self.objective,
            jnp.asarray(scored.rewards),
            jnp.asarray(drawn.sampler_log_probs),
            jnp.asarray(scored.ref_log_probs),
            jnp.asarray(drawn.completion_mask),
        )
        batch = UpdateBatch(
            tokens=drawn.tokens,
            mask=drawn.mask,
            completion_mask=drawn.completion_mask,
            old_log_probs=drawn.sampler_log_probs,
            ref_log_probs=scored.ref_log_probs,
            advantages=np.asarray(self.advantages(penalised_B, self.group)),
        )
        clock("score")
        return split(batch, setup.settings.schedule.minibatches), _metrics(found, self.group)

    def summary(self, logged: list[dict[str, float]]) -> dict[str, float]:
        """Average the optimizer steps of a rollout step, under the glossary's names."""
        metrics = averages(logged)
        del metrics["log_ratio_max"]
        metrics["policy_loss"] = metrics.pop("loss")
        metrics["sampling/sampling_logp_difference/max"] = logged[0]["log_ratio_max"]
        return metrics

    def evaluate(self, params: Params) -> dict[str, float]:
        """What is evaluated beside sampled completions: nothing."""
        return {}

    def check_first(self, values: dict[str, float], rollout_step: int) -> None:
        """Stop a run whose sampler and trainer disagree before the first update of a rollout."""
        tolerance = self.setup.settings.schedule.log_ratio_tolerance
        gap = values["log_ratio_max"]
        if gap > tolerance:
            raise ValueError(
                f"the sampler's log-probs and the trainer's differ by {gap:.3g} "
                f"nats at rollout step {rollout_step}, more than schedule.log_ratio_tolerance = "
                f"{tolerance}: the importance ratio before the first update must be 1. Raise the "
                "tolerance only for a compute_dtype below float32."
            )

    def _scored(self, found: Collected) -> ScoredRollout:
        """Attach the reference policy's log-probs, where the objective asks for them."""
        drawn = found.rollout
        ref_log_probs = np.asarray(drawn.sampler_log_probs)
        if self.objective.needs_reference:
            inputs = runtime.place_rows((drawn.tokens, drawn.mask), self.setup.mesh)
            length = drawn.completion_mask.shape[1]
            scored = self.ref_log_probs(self.setup.params, *inputs, length=length)
            ref_log_probs = runtime.fetch(scored)
        return ScoredRollout(
            rollout=drawn, rewards=found.result.rewards, ref_log_probs=ref_log_probs
        )

    def _log_probs(self, params: Params, tokens: Array, mask: Array, length: int) -> Array:
        chunk = self.setup.settings.schedule.chunk_tokens
        policy = self.setup.policy
        return score(policy, params, tokens, mask, length, self.temperature, chunk).log_probs


class SupervisedSource:
    """Prompts with given completions → minibatches."""

    headline = "loss"

    def __init__(self, setup: Setup):
        self.setup = setup
        chunk = setup.settings.schedule.chunk_tokens
        self.minimised = update.policy_objective(
            setup.policy, update.supervised_loss, chunk_tokens=chunk
        )

    def evaluate(self, params: Params) -> dict[str, float]:
        """What is evaluated beside sampled completions: nothing."""
        return {}

    def batches(
        self, params: Params, rollout_step: int, key: Array, clock: Clock
    ) -> tuple[list[UpdateBatch], dict[str, float]]:
        """Return the minibatches of a step as host arrays; neither params nor key are used."""
        setup = self.setup
        settings = setup.settings
        rows, parts = step_rows(setup, rollout_step), settings.schedule.minibatches
        if settings.data.packing:
            # each minibatch by itself, so that it holds the examples it would hold unpacked
            batches = jax.device_get(self._packed(np.split(rows, parts)))
            filled = np.mean([np.mean(batch.mask > 0) for batch in batches])
            metrics = {"packing/fill": float(filled)}
        else:
            batches, metrics = split(jax.device_get(self._padded(rows)), parts), {}
        clock("data")
        return batches, metrics

    def _padded(self, rows: np.ndarray) -> UpdateBatch:
        train, settings = self.setup.train, self.setup.settings
        longest = max(len(train.encoded[row]) for row in rows)
        return data.supervised_batch(
            train.encoded,
            train.completions,
            rows,
            self.setup.tokenizer.pad_token_id,
            bucket_length(longest, settings.data.max_prompt_tokens),
            settings.rollout.max_completion_tokens,
        )

    def _packed(self, parts: list[np.ndarray]) -> list[UpdateBatch]:
        train, settings = self.setup.train, self.setup.settings
        return data.packed_batches(
            train.encoded,
            train.completions,
            parts,
            self.setup.tokenizer.pad_token_id,
            settings.data.max_prompt_tokens + settings.rollout.max_completion_tokens,
            runtime.row_parts(self.setup.mesh),
        )

    def summary(self, logged: list[dict[str, float]]) -> dict[str, float]:
        """Average the optimizer steps, under the glossary's names."""
        metrics = averages(logged)
        del metrics["log_ratio_max"]
        return metrics

    def check_first(self, values: dict[str, float], rollout_step: int) -> None:
        """Nothing was sampled, so nothing can disagree."""


def step_rows(setup: Setup, rollout_step: int) -> np.ndarray:
    """Return which prompts a rollout step takes."""
    settings, train = setup.settings, setup.train
    count, weights = settings.data.prompts_per_step, settings.data.weights
    if weights is None:
        return data.rows_at(rollout_step, train.size, count, settings.seed)
    return data.weighted_rows_at(rollout_step, train.sizes, count, settings.seed, weights)


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch in equal parts along its rows."""
    leaves, treedef = jax.tree.flatten(batch)
    cut = [np.split(np.asarray(leaf), parts) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [leaf[i] for leaf in cut]) for i in range(parts)]


def averages(logged: list[dict[str, float]]) -> dict[str, Any]:
    """Return the mean of every metric."""
    return {name: float(np.mean([one[name] for one in logged])) for name in logged[0]}


def _metrics(found: Collected, group: int) -> dict[str, float]:
    rewards_PN = found.result.rewards.reshape(-1, group)
    spread_P = rewards_PN.std(axis=1, ddof=1)
    metrics = {
        "reward": float(rewards_PN.mean()),
        "reward_std": float(spread_P.mean()),
        "frac_reward_zero_std": float(np.mean(spread_P == 0)),
        "completions/mean_length": float(found.rollout.completion_mask.sum(axis=1).mean()),
        "completions/clipped_ratio": float(1 - np.mean(found.rollout.finished)),
    }
    for name, why in found.result.failures.items():
        tqdm.write(f"counted as reward.on_failure: {why}")
        metrics[f"rewards/{name}/failures"] = 1.0
    for name, values in found.result.per_function.items():
        applicable = values[~np.isnan(values)]
        if applicable.size:
            metrics[f"rewards/{name}/mean"] = float(applicable.mean())
            metrics[f"rewards/{name}/std"] = float(applicable.std())
    return metrics | {f"logged/{name}": value for name, value in found.result.logged.items()}
