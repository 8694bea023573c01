"""Sampling with rewards, for training and evaluation alike: prompts → rollout → texts → rewards."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ntkrl import data, models, reward, rollout, runtime
from ntkrl.numerics import DTYPES, bucket_length
from ntkrl.settings import RunSettings
from ntkrl.setup import Prompts, RunSetup, StartingModel
from ntkrl.types import Array, Params, PromptBatch, Rollout

SampleFn = Callable[[Params, PromptBatch, Array], Rollout]


class Clock:
    """Seconds per activity since the last lap."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, activity: str) -> None:
        runtime.heartbeat(f"the end of {activity}")
        now = time.perf_counter()
        name = f"{activity}_seconds"
        self.seconds[name] = self.seconds.setdefault(name, 0.0) + now - self.last
        self.last = now

    def lap(self) -> dict[str, float]:
        """Return and forget the seconds so far."""
        seconds, self.seconds = self.seconds, {}
        self.last = time.perf_counter()
        return seconds


@dataclasses.dataclass(frozen=True, eq=False)
class SampleRequest:
    """Prompts to sample completions of.

    prompts: the prompt set. rows: `[P]` of it.
    copies: `[P]` how often each was sampled before with the same key; None counts within `rows`.
    """

    prompts: Prompts
    rows: Sequence[int] | np.ndarray
    copies: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SampledTexts:
    """Completions of some prompts, on the host.

    request: the prompts. rollout: numpy arrays, but features stay on the devices.
    texts, ids: B completions and their token ids.
    """

    request: SampleRequest
    rollout: Rollout
    texts: list[str]
    ids: list[list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class RewardedRollout:
    """A rollout on the host, with its texts and rewards.

    rollout: numpy arrays, but features stay on the devices. texts: B completions.
    result: their rewards. rows: `[B]` of the prompt set, of their prompts.
    """

    rollout: Rollout
    texts: list[str]
    result: reward.RewardResult
    rows: np.ndarray

    def take(self, rows: np.ndarray) -> RewardedRollout:
        """Return some of the completions."""
        functions = self.result.per_function
        result = dataclasses.replace(
            self.result,
            rewards=self.result.rewards[rows],
            per_function={name: values[rows] for name, values in functions.items()},
        )
        rollout = jax.tree.map(lambda leaf: leaf[rows], self.rollout)
        texts = [self.texts[row] for row in rows]
        return RewardedRollout(rollout, texts, result, self.rows[rows])


def joined(first: RewardedRollout, second: RewardedRollout, pad_id: int) -> RewardedRollout:
    """Concatenate two rollouts, each padded to the longer prompts and completions."""
    rollouts = [
        dataclasses.replace(drawn, features=runtime.fetch(drawn.features))
        for drawn in (first.rollout, second.rollout)
    ]
    lengths = [drawn.completion_mask.shape[1] for drawn in rollouts]
    widths = [drawn.tokens.shape[1] for drawn in rollouts]
    prompt_length = max(width - length for width, length in zip(widths, lengths, strict=True))
    padded = [data.widened(drawn, prompt_length, max(lengths), pad_id) for drawn in rollouts]
    functions = first.result.per_function
    result = dataclasses.replace(
        second.result,
        rewards=np.concatenate([first.result.rewards, second.result.rewards]),
        per_function={
            name: np.concatenate([values, second.result.per_function[name]])
            for name, values in functions.items()
        },
        failures=first.result.failures | second.result.failures,
    )
    rollout = jax.tree.map(lambda a, b: np.concatenate([a, b]), *padded)
    rows = np.concatenate([first.rows, second.rows])
    return RewardedRollout(rollout, first.texts + second.texts, result, rows)


def make_sampler(
    settings: RunSettings,
    model: StartingModel,
    completions_per_prompt: int,
    temperature: float,
    keep_features: bool = False,
) -> SampleFn:
    """Return the `sampler(params, prompts, key) -> Rollout` of a run.

    Raises:
      ValueError: an engine that does not load, or one for several processes.
    """
    sampling, greedy = settings.rollout, temperature == 0
    sampler_settings = rollout.SamplerSettings(
        completions_per_prompt=completions_per_prompt,
        max_completion_tokens=sampling.max_completion_tokens,
        temperature=temperature,
        end_ids=model.end_ids,
        pad_id=model.tokenizer.pad_token_id,
        top_k=None if greedy else sampling.top_k,
        top_p=None if greedy else sampling.top_p,
        min_p=None if greedy else sampling.min_p,
        cache_dtype=None if sampling.cache_dtype is None else DTYPES[sampling.cache_dtype],
        keep_features=keep_features,
    )
    if sampling.engine is not None:
        if jax.process_count() > 1:
            raise ValueError("rollout.engine samples in one process; leave it out for several.")
        generate = rollout.load_engine(sampling.engine, model.policy.source, sampler_settings)
        stored = functools.partial(models.stored_tensors, model.policy)
        return rollout.ExternalSampler(generate, sampler_settings, stored)
    find_stop = data.stop_finder(model.tokenizer, sampling.stop) if sampling.stop else None
    meshes = (model.rollout_mesh, model.mesh)
    return rollout.Sampler(model.policy, sampler_settings, find_stop, *meshes)


def prompt_batch(setup: RunSetup, request: SampleRequest) -> PromptBatch:
    """Tokenise prompts and place them on the rollout mesh; padded to one of few lengths."""
    encoded, rows = request.prompts.encoded, request.rows
    longest = max(len(encoded[row]) for row in rows)
    length = bucket_length(longest, setup.settings.data.max_prompt_tokens)
    pad_id = setup.model.tokenizer.pad_token_id
    batch = data.prompt_batch(encoded, rows, pad_id, length, request.copies)
    return runtime.place_rows(batch, setup.model.rollout_mesh)


def sample(
    setup: RunSetup, sampler: SampleFn, params: Params, request: SampleRequest, key: Array
) -> SampledTexts:
    """Sample completions of some prompts.

    Args:
      setup: the run.
      sampler: from `make_sampler`.
      params: params of the policy that samples.
      request: which prompts.
      key: consumed.
    """
    drawn = sampler(params, prompt_batch(setup, request), key)
    features = drawn.features
    drawn = runtime.fetch(dataclasses.replace(drawn, features=None))
    drawn = dataclasses.replace(drawn, features=features)
    texts, ids = data.decode_completions(
        setup.model.tokenizer, drawn.tokens, drawn.completion_mask, setup.model.end_ids
    )
    return SampledTexts(request, drawn, texts, ids)


def add_rewards(setup: RunSetup, sampled: SampledTexts) -> RewardedRollout:
    """Reward sampled completions.

    Raises:
      ValueError: what the reward functions did wrong.
    """
    prompts, texts = sampled.request.prompts, sampled.texts
    group = len(texts) // len(sampled.request.rows)
    repeated = np.repeat(np.asarray(sampled.request.rows), group)
    assert setup.rewards is not None  # as in every run that samples completions
    rewards = dataclasses.replace(
        setup.rewards, place=lambda number: prompts.prompt_set.place(repeated[number])
    )
    result = rewards(
        [prompts.prompt_set.prompts[row] for row in repeated],
        texts,
        sampled.ids,
        {name: [values[row] for row in repeated] for name, values in prompts.columns.items()},
        prompts.prompt_set.conversational,
        group=group,
    )
    return RewardedRollout(sampled.rollout, texts, result, repeated)


def collect(
    setup: RunSetup,
    sampler: SampleFn,
    params: Params,
    request: SampleRequest,
    key: Array,
    clock: Clock | None = None,
) -> RewardedRollout:
    """Sample completions of some prompts and reward them.

    Args:
      setup: the run.
      sampler: from `make_sampler`.
      params: params of the policy that samples.
      request: which prompts.
      key: consumed.
      clock: called with "sample" and "reward" when each is done; or None.

    Raises:
      ValueError: what the reward functions did wrong.
    """
    sampled = sample(setup, sampler, params, request, key)
    if clock is not None:
        clock("sample")
    rewarded = add_rewards(setup, sampled)
    if clock is not None:
        clock("reward")
    return rewarded
