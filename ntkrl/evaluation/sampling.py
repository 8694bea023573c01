"""Held-out evaluation: what a policy is worth, what its samples reach and how they differ.

Every measure is a number per prompt; metrics are their means over prompts and repeats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ntkrl import probe, reward, trees
from ntkrl.evaluation.comparison import compare, powers
from ntkrl.generate import Collected, Sample, collect, joined, make_sample
from ntkrl.settings import EvalSettings
from ntkrl.setup.assemble import Prompts, Setup
from ntkrl.setup.base_samples import Samples
from ntkrl.types import Array, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """What an evaluation's metrics were made of.

    collected: the samples of each repeat. by_prompt: metric to `[P]`, mean over repeats; those
    that are means over prompts.
    """

    collected: list[Collected]
    by_prompt: dict[str, np.ndarray]


def make_evaluation_sample(setup: Setup) -> Sample:
    """Return the `sample` of held-out evaluation."""
    settings = setup.settings.evaluation
    given = settings.temperature
    temperature = setup.settings.rollout.temperature if given is None else given
    return make_sample(setup, samples_together(setup), temperature)


def samples_together(setup: Setup) -> int:
    """Return how many samples of a held-out prompt are drawn together: at most a step's."""
    wanted, most = (
        setup.settings.evaluation.samples_per_prompt,
        setup.settings.rollout.completions_per_prompt,
    )
    return max(count for count in range(1, most + 1) if wanted % count == 0)


def prompts_together(setup: Setup) -> int:
    """Return how many held-out prompts are sampled together.

    They have about as many completions as a step in training, and so many that the mesh divides
    them.
    """
    settings, parts = setup.settings, trees.row_parts(setup.mesh)
    group = samples_together(setup)
    most = settings.data.prompts_per_step * settings.rollout.completions_per_prompt // group
    step = parts // math.gcd(group, parts)
    asked = settings.evaluation.prompts * (settings.evaluation.samples_per_prompt // group)
    return min(max(most // step, 1) * step, asked)


def collect_in_parts(
    setup: Setup,
    sample: Sample,
    params: Params,
    prompts: Prompts,
    rows: np.ndarray,
    key: Array,
    advance: Callable[[int], Any],
) -> Collected:
    """Do `collect` for any number of prompts, some at a time, and for some of their samples.

    What a prompt gets depends on the key, its own row and the number of the sample alone, so that
    parts change nothing. The last part is filled up with its own prompts, drawn again and left out.
    `advance` is told how many completions each part had.
    """
    group = samples_together(setup)
    rounds = setup.settings.evaluation.samples_per_prompt // group
    rows, copies = np.repeat(rows, rounds), np.tile(np.arange(rounds), len(rows))
    size = min(prompts_together(setup), len(rows))
    parts = []
    for start in range(0, len(rows), size):
        own = np.arange(start, min(start + size, len(rows)))
        filled = np.resize(own, size)
        given = (setup, sample, params, prompts, rows[filled], key)
        found = collect(*given, copies=copies[filled])
        parts.append(found.take(np.arange(len(own) * group)))
        advance(len(own) * group)
    pad = setup.tokenizer.pad_token_id
    return functools.reduce(lambda first, second: joined(first, second, pad), parts)


def evaluate_policy(
    setup: Setup, sample: Sample, params: Params, key: Array, progress: bool = False
) -> tuple[dict[str, float], Evaluated]:
    """Score a policy on the held-out prompts.

    Args:
      setup: the run, with held-out prompts.
      sample: from `make_evaluation_sample`.
      params: of the policy.
      key: consumed.
      progress: show a bar.

    Returns:
      `(metrics, evaluated)`: the `eval/…` and `diversity/…` metrics (`eval/reward_sd` is the
      standard deviation of the mean reward over repeats, 0 for one repeat), with those of
      `compare` where the config has a base, and what they are of.
    """
    settings = setup.settings.evaluation
    rows = np.arange(min(settings.prompts, setup.held_out.size))
    total = len(rows) * settings.samples_per_prompt * settings.repeats
    given, collected = (setup, sample, params, setup.held_out, rows), []
    with tqdm(total=total, desc="samples", disable=not progress) as bar:
        for repeat_key in jax.random.split(key, settings.repeats):
            collected.append(collect_in_parts(*given, repeat_key, bar.update))
    each = [prompt_measures(found.texts, found.result.rewards, settings) for found in collected]
    by_prompt = {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}
    metrics = {name: float(np.mean(values)) for name, values in by_prompt.items()}
    means = [np.mean(one["eval/reward"]) for one in each]
    metrics["eval/reward_sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    if setup.base is not None:
        own = _pooled(collected, settings.samples_per_prompt)
        metrics |= compare(setup.base, own, settings.success_threshold)
    return metrics, Evaluated(collected, by_prompt)


def _pooled(collected: Sequence[Collected], group: int) -> Samples:
    """Put the repeats' samples of each prompt together."""
    texts = [np.array(found.texts, object).reshape(-1, group) for found in collected]
    rewards = [found.result.rewards.reshape(-1, group) for found in collected]
    return Samples(np.concatenate(texts, axis=1).tolist(), np.concatenate(rewards, axis=1))


def prompt_measures(
    texts: Sequence[str], rewards: np.ndarray, settings: EvalSettings
) -> dict[str, np.ndarray]:
    """Measure the samples of each prompt.

    Args:
      texts: B completions, groups of `samples_per_prompt` consecutive.
      rewards: `[B]`.
      settings: of the evaluation.

    Returns:
      Metric to `[P]`. The answer in a text is `reward.final_answer`, that is the whole text where
      it marks none; self-BLEU is left out for one sample per prompt.
    """
    group = settings.samples_per_prompt
    rewards_PN = np.asarray(rewards, np.float64).reshape(-1, group)
    solved_PN = rewards_PN >= settings.success_threshold
    distinct_P, solutions_P = probe.distinct_counts(texts, solved_PN.ravel(), group)
    answers_P, entropy_P = probe.distinct_answers(texts, reward.final_answer, group)
    found = {
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
        found[f"diversity/pass@{k}"] = pass_PK[:, i]
        found[f"diversity/best_of_{k}"] = best_PK[:, i]
    for n in (1, 2):
        found[f"diversity/distinct_{n}"] = np.array([probe.distinct_n(g, n) for g in groups])
    if group > 1:
        found["diversity/self_bleu"] = np.array([probe.self_bleu(g) for g in groups])
    return found
