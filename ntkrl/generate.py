"""The road both loops share: prompts → rollout → texts → rewards."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ntkrl import data, models, reward, rollout, runtime
from ntkrl.numerics import bucket_length
from ntkrl.settings import DTYPES
from ntkrl.setup.assemble import Prompts, Setup
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
        stored = functools.partial(models.stored_tensors, setup.policy)
        return rollout.ExternalSampler(generate, sampler_settings, stored)
    find_stop = data.stop_finder(tokenizer, settings.stop) if settings.stop else None
    return rollout.Sampler(setup.policy, sampler_settings, find_stop, setup.mesh)


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
