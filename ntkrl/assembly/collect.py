"""The road both loops share: prompts → rollout → texts → rewards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ntkrl import data, models, probe, reward, rollout, runtime, trees
from ntkrl.assembly.settings import DTYPES
from ntkrl.assembly.setup import Prompts, Setup
from ntkrl.numerics import bucket_length
from ntkrl.types import Array, Params, PromptBatch, Rollout

Sample = Callable[[Params, PromptBatch, Array], Rollout]
Clock = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Collected:
    """A rollout fetched to the host, with its texts and rewards.

    rollout: numpy arrays, but features stay where they are. texts: B completions. result:
    RewardResult.
    """

    rollout: Rollout
    texts: list[str]
    result: reward.RewardResult

    def take(self, rows: np.ndarray) -> Collected:
        """Return some of the completions."""
        functions = self.result.per_function
        result = dataclasses.replace(
            self.result,
            rewards=self.result.rewards[rows],
            per_function={name: values[rows] for name, values in functions.items()},
        )
        drawn = jax.tree.map(lambda leaf: leaf[rows], self.rollout)
        return Collected(drawn, [self.texts[row] for row in rows], result)


def joined(first: Collected, second: Collected, pad_id: int) -> Collected:
    """Put two rollouts in one, each padded to the longer prompts and completions."""
    halves = [one.rollout for one in (first, second)]
    prompts = max(one.tokens.shape[1] - one.completion_mask.shape[1] for one in halves)
    length = max(one.completion_mask.shape[1] for one in halves)

    def padded(drawn: Rollout) -> Rollout:
        width, own = drawn.tokens.shape[1], drawn.completion_mask.shape[1]
        after = length - own
        before = prompts - (width - own)

        def wide(leaf: np.ndarray, left: int, fill: int) -> np.ndarray:
            sides = [(0, 0), (left, after)] + [(0, 0)] * (leaf.ndim - 2)
            return np.pad(np.asarray(leaf), sides, constant_values=fill)

        whole = {"tokens": wide(drawn.tokens, before, pad_id), "mask": wide(drawn.mask, before, 0)}
        names = ("completion_mask", "sampler_log_probs", "kept_log_mass", "features")
        held = {name: getattr(drawn, name) for name in names}
        held = runtime.fetch(held)
        parts = {n: None if leaf is None else wide(leaf, 0, 0) for n, leaf in held.items()}
        return drawn.replace(**whole, **parts)

    def both(a: Any, b: Any) -> Any:
        return np.concatenate([a, b])

    results = [one.result for one in (first, second)]
    functions = results[0].per_function
    return Collected(
        jax.tree.map(both, *map(padded, halves)),
        first.texts + second.texts,
        dataclasses.replace(
            results[1],
            rewards=both(*(one.rewards for one in results)),
            per_function={n: both(*(one.per_function[n] for one in results)) for n in functions},
            failures=results[0].failures | results[1].failures,
        ),
    )


def make_sample(
    setup: Setup, completions_per_prompt: int, temperature: float, keep_features: bool = False
) -> Sample:
    """Return the `sample(params, prompts, key) -> Rollout` of this run."""
    settings, tokenizer = setup.settings.rollout, setup.tokenizer
    greedy, compute = temperature == 0, setup.settings.model.compute_dtype
    sampler_settings = rollout.SamplerSettings(
        completions_per_prompt=completions_per_prompt,
        max_completion_tokens=settings.max_completion_tokens,
        temperature=temperature,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        top_k=None if greedy else settings.top_k,
        top_p=None if greedy else settings.top_p,
        min_p=None if greedy else settings.min_p,
        cache_dtype=None if settings.cache_dtype is None else DTYPES[settings.cache_dtype],
        gather_params=settings.gather_params,
        params_dtype=None if compute is None else DTYPES[compute],
        keep_features=keep_features,
    )
    if settings.engine is not None:
        if jax.process_count() > 1:
            raise ValueError("rollout.engine samples in one process; leave it out for several.")
        generate = rollout.load_engine(settings.engine, setup.policy.source, sampler_settings)
        stored = functools.partial(models.stored, setup.policy)
        return rollout.ExternalSampler(generate, sampler_settings, stored)
    find_stop = data.stop_finder(tokenizer, settings.stop) if settings.stop else None
    return rollout.Sampler(setup.policy, sampler_settings, find_stop, setup.mesh)


def make_evaluation_sample(setup: Setup) -> Sample:
    """Return the `sample` of held-out evaluation."""
    settings = setup.settings.evaluation
    given = settings.temperature
    temperature = setup.settings.rollout.temperature if given is None else given
    return make_sample(setup, samples_together(setup), temperature)


def prompt_batch(
    setup: Setup,
    prompts: Prompts,
    rows: Sequence[int] | np.ndarray,
    copies: np.ndarray | None = None,
) -> PromptBatch:
    """Tokenise and place some prompts; padded to one of few lengths."""
    longest = max(len(prompts.encoded[row]) for row in rows)
    length = bucket_length(longest, setup.settings.data.max_prompt_tokens)
    batch = data.prompt_batch(prompts.encoded, rows, setup.tokenizer.pad_token_id, length, copies)
    return runtime.place_rows(batch, setup.mesh)


def collect(
    setup: Setup,
    sample: Sample,
    params: Params,
    prompts: Prompts,
    rows: Sequence[int] | np.ndarray,
    key: Array,
    clock: Clock = lambda name: None,
    copies: np.ndarray | None = None,
) -> Collected:
    """Sample completions of some prompts and reward them.

    Args:
      setup: the run.
      sample: from `make_sample`.
      params: of the policy that samples.
      prompts: the prompt set.
      rows: `[P]` which prompts.
      key: consumed.
      clock: called with "sample" and "reward" when each is done.
      copies: `[P]` how often each was asked before; None counts within `rows`.

    Raises:
      ValueError: what the reward functions did wrong.
    """
    drawn = sample(params, prompt_batch(setup, prompts, rows, copies), key)
    features = drawn.features
    drawn = runtime.fetch(drawn.replace(features=None)).replace(features=features)
    clock("sample")
    texts, ids = data.decode_completions(
        setup.tokenizer, drawn.tokens, drawn.completion_mask, setup.tokenizer.eos_token_id
    )
    repeated = np.repeat(np.asarray(rows), len(texts) // len(rows))
    result = setup.rewards(
        [prompts.prompt_set.prompts[row] for row in repeated],
        texts,
        ids,
        {name: [values[row] for row in repeated] for name, values in prompts.columns.items()},
        prompts.prompt_set.conversational,
        group=len(texts) // len(rows),
    )
    clock("reward")
    return Collected(rollout=drawn, texts=texts, result=result)


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
    setup: Setup, sample: Sample, params: Params, prompts: Prompts, rows: np.ndarray, key: Array
) -> Collected:
    """Do `collect` for any number of prompts, some at a time, and for some of their samples.

    What a prompt gets depends on the key, its own row and the number of the sample alone, so that
    parts change nothing. The last part is filled up with its own prompts, drawn again and left out.
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
    pad = setup.tokenizer.pad_token_id
    return functools.reduce(lambda first, second: joined(first, second, pad), parts)


def evaluate(
    setup: Setup, sample: Sample, params: Params, key: Array
) -> tuple[dict[str, float], list[Collected]]:
    """Score a policy on the held-out prompts.

    Args:
      setup: the run, with held-out prompts.
      sample: drawing `evaluation.samples_per_prompt` completions per prompt.
      params: of the policy.
      key: consumed.

    Returns:
      `(metrics, collected)`: the `eval/…` metrics (means over repeats; `eval/reward_sd` is the
      standard deviation of the mean reward over repeats, 0 for one repeat), and each repeat.
    """
    settings = setup.settings.evaluation
    rows = np.arange(min(settings.prompts, setup.held_out.size))
    group = settings.samples_per_prompt
    rounds, collected = [], []
    for repeat_key in jax.random.split(key, settings.repeats):
        found = collect_in_parts(setup, sample, params, setup.held_out, rows, repeat_key)
        solved_B = found.result.rewards >= settings.success_threshold
        distinct_P, solutions_P = probe.distinct_counts(found.texts, solved_B, group)
        rounds.append(
            {
                "eval/reward": float(np.mean(found.result.rewards)),
                "eval/pass@1": float(np.mean(solved_B)),
                "eval/pass@k": float(np.mean(solved_B.reshape(-1, group).any(axis=1))),
                "eval/distinct_solutions": float(np.mean(solutions_P)),
                "eval/distinct_completions": float(np.mean(distinct_P / group)),
            }
        )
        collected.append(found)
    metrics = {name: float(np.mean([one[name] for one in rounds])) for name in rounds[0]}
    means = [one["eval/reward"] for one in rounds]
    metrics["eval/reward_sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return metrics, collected
