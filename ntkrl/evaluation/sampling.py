"""Held-out evaluation: mean reward, coverage and diversity of a policy's samples.

Every measure is a number per prompt; metrics are their means over prompts and repeats.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ntkrl import probe, reward, trees
from ntkrl.evaluation.comparison import compare, powers
from ntkrl.generate import RewardedRollout, SampleFn, SampleRequest, collect, joined, make_sampler
from ntkrl.settings import EvalSettings, RunSettings
from ntkrl.setup import RunSetup, Samples, StartingModel
from ntkrl.types import Array, Params


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSamples:
    """The samples that an evaluation's metrics are computed from.

    repeats: samples of each repeat.
    by_prompt: metric to `[P]`, mean over repeats; of metrics that are means over prompts.
    """

    repeats: list[RewardedRollout]
    by_prompt: dict[str, np.ndarray]


def make_evaluation_sampler(settings: RunSettings, model: StartingModel) -> SampleFn:
    """Return the sampler of held-out evaluation."""
    temperature = settings.evaluation.temperature
    if temperature is None:
        temperature = settings.rollout.temperature
    return make_sampler(settings, model, samples_together(settings), temperature)


def samples_together(settings: RunSettings) -> int:
    """Return how many samples of a held-out prompt are drawn together: at most a step's."""
    total, most = (
        settings.evaluation.samples_per_prompt,
        settings.rollout.completions_per_prompt,
    )
    return max(count for count in range(1, most + 1) if total % count == 0)


def prompts_together(settings: RunSettings, mesh: Mesh) -> int:
    """Return how many held-out prompts are sampled together.

    They have about as many completions as a training step, and a number that the rollout mesh
    divides.
    """
    group, parts = samples_together(settings), trees.row_parts(mesh)
    most = settings.data.prompts_per_step * settings.rollout.completions_per_prompt // group
    step = parts // math.gcd(group, parts)
    total = settings.evaluation.prompts * (settings.evaluation.samples_per_prompt // group)
    return min(max(most // step, 1) * step, total)


def _collect_held_out(
    setup: RunSetup,
    sampler: SampleFn,
    params: Params,
    key: Array,
    advance: Callable[[int], Any],
) -> RewardedRollout:
    """Sample and reward the held-out prompts, some prompts and some of their samples at a time.

    A sample depends on the key, its prompt's row and its own number alone, so that the parts do
    not change it. The last part is padded with its own prompts, whose samples are dropped.
    `advance` is called with the completions of each part.
    """
    settings, prompts = setup.settings, setup.held_out_prompts
    group = samples_together(settings)
    rounds = settings.evaluation.samples_per_prompt // group
    count = min(settings.evaluation.prompts, prompts.size)
    rows, copies = np.repeat(np.arange(count), rounds), np.tile(np.arange(rounds), count)
    size = min(prompts_together(settings, setup.model.rollout_mesh), len(rows))
    parts = []
    for start in range(0, len(rows), size):
        part = np.arange(start, min(start + size, len(rows)))
        filled = np.resize(part, size)
        request = SampleRequest(prompts, rows[filled], copies[filled])
        rewarded = collect(setup, sampler, params, request, key)
        parts.append(rewarded.take(np.arange(len(part) * group)))
        advance(len(part) * group)
    pad_id = setup.model.tokenizer.pad_token_id
    return functools.reduce(lambda first, second: joined(first, second, pad_id), parts)


def evaluate_policy(
    setup: RunSetup, sampler: SampleFn, params: Params, key: Array, progress: bool = False
) -> tuple[dict[str, float], EvaluationSamples]:
    """Score a policy on the held-out prompts.

    Args:
      setup: the run, with held-out prompts.
      sampler: from `make_evaluation_sampler`.
      params: params of the policy.
      key: consumed.
      progress: show a bar.

    Returns:
      `(metrics, samples)`: the `eval/…` and `diversity/…` metrics, `eval/reward_sd` if it can be
      measured (see `sampling_noise`), with those of `compare` where the config has a base, and
      the samples they are computed from.
    """
    settings = setup.settings.evaluation
    count = min(settings.prompts, setup.held_out_prompts.size)
    total = count * settings.samples_per_prompt * settings.repeats
    with tqdm(total=total, desc="samples", disable=not progress) as bar:
        repeats = [
            _collect_held_out(setup, sampler, params, repeat_key, bar.update)
            for repeat_key in jax.random.split(key, settings.repeats)
        ]
    measures = [prompt_measures(r.texts, r.result.rewards, settings) for r in repeats]
    by_prompt = {name: np.mean([m[name] for m in measures], axis=0) for name in measures[0]}
    metrics = {name: float(np.mean(values)) for name, values in by_prompt.items()}
    noise = sampling_noise([r.result.rewards.reshape(count, -1) for r in repeats])
    if noise is not None:
        metrics["eval/reward_sd"] = noise
    if setup.base is not None:
        samples = _pooled(repeats, settings.samples_per_prompt)
        metrics |= compare(setup.base, samples, settings.success_threshold)
    return metrics, EvaluationSamples(repeats, by_prompt)


def sampling_noise(rewards: Sequence[np.ndarray]) -> float | None:
    """Return the standard deviation of a sampling's mean reward, the prompts fixed.

    Of several samplings, that of their means; of one, √(Σ_p s_p² / k) / P with the variance s_p²
    of the k rewards of prompt p. None for a single sample of each prompt, which has no spread.

    Args:
      rewards: `[P, k]` of each sampling.
    """
    if len(rewards) > 1:
        # mean over prompts of means over samples, as `eval/reward`
        means = [np.mean(np.mean(np.asarray(r, np.float64), axis=1)) for r in rewards]
        return float(np.std(means, ddof=1))
    rewards_PN = np.asarray(rewards[0], np.float64)
    prompts, samples = rewards_PN.shape
    if samples < 2:
        return None
    variances_P = np.var(rewards_PN, axis=1, ddof=1)
    return float(np.sqrt(np.sum(variances_P) / samples) / prompts)


def _pooled(repeats: Sequence[RewardedRollout], group: int) -> Samples:
    """Concatenate the repeats' samples of each prompt."""
    texts = [np.array(repeat.texts, object).reshape(-1, group) for repeat in repeats]
    rewards = [repeat.result.rewards.reshape(-1, group) for repeat in repeats]
    return Samples(np.concatenate(texts, axis=1).tolist(), np.concatenate(rewards, axis=1))


def prompt_measures(
    texts: Sequence[str], rewards: np.ndarray, settings: EvalSettings
) -> dict[str, np.ndarray]:
    """Measure the samples of each prompt.

    Args:
      texts: B completions, groups of `samples_per_prompt` consecutive.
      rewards: `[B]`.
      settings: settings of the evaluation.

    Returns:
      Metric to `[P]`. The answer in a text is `reward.final_answer`, that is the whole text where
      it marks none; self-BLEU is left out for one sample per prompt.
    """
    group = settings.samples_per_prompt
    rewards_PN = np.asarray(rewards, np.float64).reshape(-1, group)
    solved_PN = rewards_PN >= settings.success_threshold
    distinct_P, solutions_P = probe.distinct_counts(texts, solved_PN.ravel(), group)
    answers_P, entropy_P = probe.distinct_answers(texts, reward.final_answer, group)
    measures = {
        "eval/reward": rewards_PN.mean(axis=1),
        "eval/pass@1": solved_PN.mean(axis=1),
        "eval/pass@k": solved_PN.any(axis=1).astype(float),
        "eval/distinct_solutions": solutions_P,
        "eval/distinct_completions": distinct_P / group,
        "diversity/distinct_answers": answers_P,
        "diversity/answer_entropy": entropy_P,
    }
    ks, groups = powers(group), np.reshape(np.asarray(texts, object), (-1, group))
    pass_PK = probe.pass_curves(solved_PN.sum(axis=1), group, ks)
    best_PK = np.array([probe.best_of_n(row, ks) for row in rewards_PN])
    for i, k in enumerate(ks):
        measures[f"diversity/pass@{k}"] = pass_PK[:, i]
        measures[f"diversity/best_of_{k}"] = best_PK[:, i]
    for n in (1, 2):
        measures[f"diversity/distinct_{n}"] = np.array([probe.distinct_n(g, n) for g in groups])
    if group > 1:
        measures["diversity/self_bleu"] = np.array([probe.self_bleu(g) for g in groups])
    return measures
