"""Check, before a run samples, that the host's memory suffices.

Devices that report no limit, as CPUs, share the host's memory; others use it for what is fetched
from them. Counted is what is certain to be there at once if completions reach their full length.
Where that is a good part of the memory, the update is compiled too, whose peak the compiler states.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from ntkrl import rollout
from ntkrl.numerics import DTYPES, GIB, bucket_length
from ntkrl.setup import RunSetup
from ntkrl.training.abstract_run import AbstractRun, device_bytes

HOST_BYTES = (5, 33)
"""Bytes on the host of a token of a rollout: of any token, and more of a completion's."""
SAMPLE_BYTES = (5, 13)
"""The same of a sample of an evaluation."""
COMPILED_ABOVE = 0.125
"""Share of the host's memory from which on the update is compiled for its peak."""
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Limits of a container."""


def host_memory() -> float:
    """Return the bytes of memory of this host, or of the container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in LIMIT_FILES:
        text = Path(name).read_text().strip() if Path(name).is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return float(min(limits))


@dataclasses.dataclass(frozen=True)
class RolloutMemory:
    """Bytes of the host that a rollout step needs, linear in its rows.

    fixed: of params, optimizer and reward models. sampled: of a row while it is sampled, updated:
    while it is learnt from; the larger of both counts.
    """

    fixed: float
    sampled: float
    updated: float

    def needed(self, rows: int) -> float:
        """Return the bytes of a rollout of so many rows."""
        return self.fixed + rows * max(self.sampled, self.updated)

    def most_rows(self, limit: float) -> int:
        """Return the most rows within a limit (bytes); 0 if none."""
        return max(int((limit - self.fixed) / max(self.sampled, self.updated)), 0)


def check_host(
    setup: RunSetup, run: AbstractRun, update_peak: Callable[[RunSetup, int], float | None]
) -> None:
    """Refuse a run whose rollouts or evaluations do not fit the host's memory.

    Args:
      setup: the run, with prompts. run: the same, by shapes.
      update_peak: bytes of an update with a number of microbatches on each device, or None.

    Raises:
      ValueError: they do not fit; the message has the figures and the largest group that fits.
    """
    settings, limit = setup.settings, host_memory()
    if settings.evaluates and setup.held_out is not None:
        check_evaluation(setup, limit)
    width = bucket_length(max(map(len, setup.train.encoded)), settings.data.max_prompt_tokens)
    memory = rollout_memory(run, width)
    prompts, group = settings.data.prompts_per_step, settings.rollout.completions_per_prompt
    rows = prompts * group
    if limit * COMPILED_ABOVE < memory.needed(rows) <= limit and memory.fixed:
        shorter = dataclasses.replace(settings.data, max_prompt_tokens=width)
        narrow = dataclasses.replace(setup, settings=dataclasses.replace(settings, data=shorter))
        peak = update_peak(narrow, settings.microbatches)
        if peak is not None:
            beside = len(run.mesh.local_devices) * peak - memory.fixed
            updated = max(memory.updated, beside / rows)
            memory = dataclasses.replace(memory, updated=updated)
    needed = memory.needed(rows)
    if needed <= limit:
        return
    most, least = memory.most_rows(limit) // prompts, 2
    if most >= least:
        advice = f"rollout.completions_per_prompt={most} is the most that fits"
    else:
        prompts_fit = memory.most_rows(limit) // group
        fewer = f"data.prompts_per_step={prompts_fit} is the most that fits, or "
        advice = (
            f"{fewer if prompts_fit else ''}lower rollout.max_completion_tokens or the model's size"
        )
    raise ValueError(
        f"a rollout step does not fit this host's memory: {prompts} prompts × {group} completions "
        f"of up to {settings.rollout.max_completion_tokens} tokens need at least "
        f"{needed / GIB:.1f} of {limit / GIB:.1f} GiB; {advice}."
    )


def check_evaluation(setup: RunSetup, limit: float) -> None:
    """Refuse an evaluation whose samples do not fit a limit of memory (bytes).

    Raises:
      ValueError: they do not fit; the message has the figures and the most samples that fit.
    """
    settings, prompts = setup.settings, setup.held_out_prompts
    evaluation, budget = settings.evaluation, settings.rollout.max_completion_tokens
    count = min(evaluation.prompts, prompts.size)
    width = bucket_length(max(map(len, prompts.encoded)), settings.data.max_prompt_tokens)
    # every sampling is kept until its metrics are computed
    sample = count * evaluation.repeats * token_bytes(SAMPLE_BYTES, width, budget)
    needed, most = evaluation.samples_per_prompt * sample, int(limit / sample)
    if needed <= limit:
        return
    advice = "lower eval.prompts, eval.repeats or rollout.max_completion_tokens"
    if most:
        advice = f"eval.samples_per_prompt={most} is the most that fits"
    raise ValueError(
        f"an evaluation does not fit this host's memory: {count} held-out prompts × "
        f"{evaluation.samples_per_prompt} samples × {evaluation.repeats} repeats of up to {budget} "
        f"tokens need at least {needed / GIB:.1f} of {limit / GIB:.1f} GiB; {advice}."
    )


def token_bytes(kinds: tuple[int, int], width: int, budget: int) -> int:
    """Return the bytes of a row of `width` prompt and `budget` completion tokens.

    Args:
      kinds: bytes of any token, and more of a completion's.
      width, budget: tokens.
    """
    any_token, completion_token = kinds
    return any_token * (width + budget) + completion_token * budget


def rollout_memory(run: AbstractRun, width: int) -> RolloutMemory:
    """Return the memory of a run's rollouts whose longest prompts have `width` tokens."""
    settings, policy, budget = run.settings, run.model.policy, run.budget
    arrays = token_bytes(HOST_BYTES, width, budget)
    if jax.local_devices()[0].platform != "cpu":
        return RolloutMemory(0.0, arrays, arrays)
    devices, rows = len(run.mesh.local_devices), 64 * run.mesh.size
    fixed = devices * max(device_bytes(run.resident(stage)) for stage in run.stages)
    assert run.functions is not None  # as of every run that samples
    sampler, cache = run.functions.samplers[False], 0.0
    if isinstance(sampler, rollout.Sampler):
        fixed += devices * device_bytes(sampler.copy_shapes(run.model.params))
        cache = device_bytes(sampler.cache_shapes(rows, width)) * devices / rows
    hidden = 0.0
    if not all(stage.head_alone for stage in run.stages):  # every layer's input is kept
        layers = policy.config.num_hidden_layers
        itemsize = jnp.dtype(DTYPES[settings.network_dtypes[0]]).itemsize
        parts = settings.microbatches * settings.schedule.minibatches
        hidden = (width + budget) * policy.feature_size * layers * itemsize / parts
    return RolloutMemory(fixed, cache + arrays, hidden + arrays)
