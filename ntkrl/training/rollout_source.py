"""Where RL's update batches come from: prompts → rollout → rewards → advantages → minibatches."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import runtime, update
from ntkrl.generate import Collected, collect, joined, make_sample
from ntkrl.scoring import completion_features, head_of
from ntkrl.settings import HEADLINES
from ntkrl.setup.assemble import Setup
from ntkrl.softmax import OutputHead, SoftmaxOptions, TokenStatistics, token_statistics
from ntkrl.training.rollout_metrics import rollout_metrics
from ntkrl.training.sources import StepContext, averages, split, step_rows
from ntkrl.training.weighing import advantages, weigh
from ntkrl.types import Array, Params, Total, UpdateBatch


class RolloutSource:
    """Prompts → rollout → rewards → advantages → minibatches.

    position: batches of prompts drawn so far; with it a run resumes.
    """

    headline = HEADLINES["rl"]

    def __init__(self, setup: Setup):
        settings = setup.settings
        self.setup, self.objective, self.position = setup, settings.objective, 0
        self.temperature = settings.rollout.temperature
        self.group = settings.rollout.completions_per_prompt
        budgets = [stage.kl_budget for stage in settings.stages if stage.kl_budget is not None]
        self.compares = self.objective.needs_reference or bool(budgets)
        # a group too small for the estimator fails here, before anything is sampled
        column = jnp.zeros((self.group, 1))
        advantages(self.objective, self.group, column[:, 0], column, column == 0)
        self.samplers = {
            keep: make_sample(setup, self.group, settings.rollout.temperature, keep)
            for keep in (False, True)
        }
        given = self.temperature, settings.schedule.chunk_tokens, setup.spread
        terms = update.policy_terms(self.objective, settings.rollout.max_completion_tokens)
        self.minimised, self.terms = (
            update.policy_loss_fn(setup.policy, loss, *given) for loss in (self.loss, terms)
        )
        self.read = jax.jit(self._read, static_argnames=("length", "whole"))
        self.weigh = jax.jit(functools.partial(weigh, self.objective, self.group))

    def loss(self, statistics: TokenStatistics, batch: UpdateBatch) -> tuple[Total, Any]:
        """The objective (see update.policy_loss)."""
        budget = self.setup.settings.rollout.max_completion_tokens
        return update.policy_loss(self.objective, budget, statistics, batch)

    def reference_head(self, turn: StepContext) -> OutputHead | None:
        """Return the head that the step compares whole distributions with, or None."""
        wanted = self.objective.kl_place == "loss" and self.objective.needs_distribution
        return head_of(self.setup.policy, turn.reference) if wanted else None

    def batches(self, turn: StepContext) -> tuple[list[UpdateBatch], dict[str, float]]:
        """Return the minibatches of a rollout step as host arrays, and the rollout's metrics.

        Minibatches without a token to learn from are left out and counted.
        """
        schedule = self.setup.settings.schedule
        found, metrics = self._collect(turn)
        metrics |= rollout_metrics(found, self.group)
        batch, weights = self._batch(turn, found)
        metrics |= weights
        turn.clock("score")
        parts = split(batch, schedule.minibatches)
        kept = [part for part in parts if self._teaches(part)]
        metrics["skipped_updates"] = float(len(parts) - len(kept))
        if not kept and schedule.on_no_signal == "stop":
            raise ValueError(
                f"no completion of rollout step {turn.step + 1} has anything to learn from "
                f"({metrics['frac_reward_zero_std']:.0%} of the groups got equal rewards, "
                f"{metrics['completions/clipped_ratio']:.0%} of the completions were cut); "
                'schedule.on_no_signal="skip" goes on with the next prompts.'
            )
        return kept, metrics

    def summary(self, logged: list[dict[str, float]]) -> dict[str, float]:
        """Average the optimizer steps of a rollout step, under the glossary's names."""
        if not logged:
            return {}
        metrics = averages(logged)
        metrics["policy_loss"] = metrics.pop("loss")
        for name in ("mean", "max"):
            key = "log_ratio" if name == "mean" else "log_ratio_max"
            del metrics[key]
            metrics[f"sampling/sampling_logp_difference/{name}"] = logged[0][key]
        for side, name, extreme in (("low", "min", min), ("high", "max", max)):
            if f"clip_ratio/{side}_mean" in metrics:
                values = [one[f"clip_ratio/{side}_mean"] for one in logged]
                metrics[f"clip_ratio/{side}_{name}"] = extreme(values)
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
                "tolerance only for a compute_dtype below float32, or set objective.correction."
            )

    def _collect(self, turn: StepContext) -> tuple[Collected, dict[str, float]]:
        """Sample and reward the step's prompts; again others where the objective filters groups."""
        setup, metrics = self.setup, {}
        wanted = setup.settings.data.prompts_per_step
        again = self.objective.group_filter == "resample"
        rounds = setup.settings.schedule.resample_rounds if again else 0
        sample = self.samplers[turn.program.head_alone]
        held: Collected | None = None
        for number in range(rounds + 1):
            rows = step_rows(setup, self.position)
            self.position += 1
            key = jax.random.fold_in(turn.key, number) if number else turn.key
            found = collect(setup, sample, turn.params, setup.train, rows, key, turn.clock)
            if not again:
                return found, metrics
            held = found if held is None else joined(held, found, setup.tokenizer.pad_token_id)
            equal_P = np.asarray(update.equal_groups(held.result.rewards, self.group))
            if np.sum(~equal_P) >= wanted:
                break
        # groups with signal first, in the order they were drawn
        chosen_P = np.argsort(equal_P, kind="stable")[:wanted]
        rows_B = (chosen_P[:, None] * self.group + np.arange(self.group)).reshape(-1)
        metrics["resampling_rounds"] = float(number)
        return held.take(rows_B), metrics

    def _batch(self, turn: StepContext, found: Collected) -> tuple[UpdateBatch, dict[str, float]]:
        """Attach log-probs of both policies and the weight of each token."""
        drawn, objective = found.rollout, self.objective
        fixed = turn.features_fixed and drawn.features is not None
        features = drawn.features if fixed else None
        old_log_probs = drawn.sampler_log_probs
        reading: dict[str, Any] = {}
        if objective.correction != "off":
            old_log_probs = self._given(turn.params, drawn, None)["log_probs"]
        if self.compares:
            beside = turn.params if objective.needs_distribution else None
            reading = self._given(turn.reference, drawn, features, beside)
        ref_log_probs = reading["log_probs"] if reading else old_log_probs
        # on the default device, whole: a few numbers per token
        weights = self.weigh(
            jnp.asarray(found.result.rewards),
            *map(jnp.asarray, (old_log_probs, ref_log_probs)),
            jnp.asarray(drawn.sampler_log_probs - drawn.kept_log_mass),
            jnp.asarray(drawn.completion_mask),
            jnp.asarray(drawn.finished),
            reading["kl"] if "kl" in reading else None,
            jax.random.fold_in(turn.key, 1 << 20),
        )
        weights = runtime.fetch(weights)
        batch = UpdateBatch(
            tokens=drawn.tokens,
            mask=drawn.mask,
            completion_mask=weights["mask"],
            old_log_probs=np.asarray(old_log_probs),
            ref_log_probs=np.asarray(ref_log_probs),
            advantages=weights["advantages"],
            penalties=weights["penalties"],
            kl_advantages=weights["kl_advantages"],
            features=drawn.features,
            ref_features=reading["features"] if self.reference_head(turn) else None,
        )
        metrics = {name: float(value) for name, value in weights["metrics"].items()}
        if self.compares and not objective.needs_reference:  # for a budget alone
            given = map(jnp.asarray, (old_log_probs, ref_log_probs, drawn.completion_mask))
            kl_BC = update.kl_estimate("k3", *given)
            metrics["kl"] = float(jnp.sum(kl_BC)) / int(np.sum(drawn.completion_mask))
        return batch, metrics

    def _given(
        self, params: Params, drawn: Any, features: Array | None, beside: Params | None = None
    ) -> dict[str, Any]:
        """Read the log-probs of the drawn tokens, and the whole KL of `beside` to params."""
        inputs = (drawn.tokens, drawn.mask, features)
        placed = runtime.place_rows(inputs, self.setup.mesh)
        length = drawn.completion_mask.shape[1]
        whole = beside is not None
        log_probs, kl, phi = self.read(params, beside, *placed, length=length, whole=whole)
        found = {"log_probs": runtime.fetch(log_probs)}
        return found | {"kl": runtime.fetch(kl), "features": phi} if whole else found

    def _read(
        self,
        params: Params,
        beside: Params | None,
        tokens: Array,
        mask: Array,
        features: Array | None,
        length: int,
        whole: bool,
    ) -> tuple[Array, Array | None, Array | None]:
        policy = self.setup.policy
        chunk = self.setup.settings.schedule.chunk_tokens * self.setup.spread
        options = SoftmaxOptions(self.temperature, chunk)
        if features is None:
            features = completion_features(policy, params, tokens, mask, length)
        head, targets = head_of(policy, params), tokens[:, -length:]
        found = token_statistics(head, features, targets, options)
        if not whole:
            return found.log_probs, None, None
        own = completion_features(policy, beside, tokens, mask, length)
        other = (head, features)
        compared = token_statistics(head_of(policy, beside), own, targets, options, other)
        return found.log_probs, compared.kl, features

    def _teaches(self, batch: UpdateBatch) -> bool:
        """Tell whether a step on the batch would have a gradient."""
        objective, mask = self.objective, batch.completion_mask
        pulled = objective.kl_place == "loss" and objective.needs_reference
        per_token = pulled or objective.entropy_coefficient > 0
        weighted = per_token or batch.penalties is not None
        return bool(np.any(mask & (weighted | (batch.advantages != 0))))
