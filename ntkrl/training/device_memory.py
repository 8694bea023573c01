"""Fit a run into the memory of its devices before its first step.

The compiler states the peak memory of the update at full length. Where that exceeds the devices'
memory, a minibatch is read in more parts. Devices that report no limit, as CPUs, read it at once.
A run that cannot sample in the memory of devices and host is refused.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ntkrl import durable_files, reward, rollout, runtime
from ntkrl.json_files import read_object
from ntkrl.numerics import GIB
from ntkrl.settings import RunSettings
from ntkrl.setup import RunSetup, decoding_work
from ntkrl.training.abstract_run import AbstractRun, device_bytes
from ntkrl.training.host_memory import check_host
from ntkrl.training.programs import peak_bytes, resident_bytes, updates

LAYOUT_FILE = "layout.json"
"""In a run directory: what was chosen by memory, so that a resumed run does the same arithmetic."""


def fit(setup: RunSetup, directory: Path) -> RunSetup:
    """Return the run with the number of microbatches chosen, unless the config sets it; log it.

    Args:
      setup: the run.
      directory: of the run; a number chosen there for the same mesh is kept.

    Raises:
      ValueError: sampling does not fit the devices' memory, or a rollout the host's.
    """
    settings, mesh = setup.settings, setup.model.mesh
    limit = None if settings.method.reward_model else runtime.device_memory(mesh)
    if settings.method.samples and settings.rollout.engine is None:
        run, parts = abstract_run(setup, settings), setup.model.rollout_mesh.shape
        if mesh.size > 1:
            runtime.log(f"sampling on data={parts['data']} × tensor={parts['tensor']} devices")
        if limit is not None:
            check_sampling(run, limit)
        check_host(setup, run, _update_peak)
    if settings.schedule.microbatches is not None:
        return setup
    saved = _saved_count(directory, setup)
    if saved is not None:
        count, reason = saved, f"as chosen in {directory / LAYOUT_FILE}"
    elif limit is None:
        count, reason = 1, "the devices report no limit of memory"
    else:
        counts = settings.microbatch_counts(mesh)
        count, peak = fewest_microbatches(counts, limit, lambda count: _update_peak(setup, count))
        needed = "more than" if peak is None else f"{peak / GIB:.1f} of"
        reason = f"an update needs {needed} {limit / GIB:.1f} GiB per device"
    runtime.log(f"microbatches of {settings.minibatch_rows} rows: {count} ({reason})")
    return dataclasses.replace(setup, settings=settings.with_microbatches(count))


def save_layout(setup: RunSetup, directory: Path) -> None:
    """Write what `fit` chose, in the process that writes."""
    if runtime.is_writer():
        values = {"mesh": dict(setup.model.mesh.shape), "microbatches": setup.settings.microbatches}
        durable_files.save_text(directory / LAYOUT_FILE, json.dumps(values) + "\n")


def check_sampling(run: AbstractRun, limit: float) -> None:
    """Check that what sampling keeps on a device is within a limit (bytes).

    Counted are the arrays that stay throughout the run, the copy of the params and the full cache:
    less than the peak that `ntkrl plan` reports.

    Raises:
      ValueError: they exceed it; the message has the figures and the first setting to change.
    """
    settings, model = run.settings, run.model
    assert run.functions is not None  # as of every run that samples
    sampler = run.functions.samplers[False]
    assert isinstance(sampler, rollout.Sampler)
    rows = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
    copy = device_bytes(sampler.copy_shapes(model.params))
    cache = device_bytes(sampler.cache_shapes(rows, run.width))
    kept = max(device_bytes(run.resident(stage)) for stage in run.stages)
    if copy + cache + kept <= limit:
        return
    parts = model.rollout_mesh.shape
    work = decoding_work(settings, model.policy, model.params)
    more = work.more_parts(run.mesh.size, parts["tensor"])
    if more is not None:
        advice = f"set rollout.mesh.tensor={more}"
    elif settings.network_dtypes[1] == "float32":
        advice = "set rollout.cache_dtype=bfloat16 or model.compute_dtype=bfloat16"
    else:
        advice = "lower data.prompts_per_step, or take more devices"
    raise ValueError(
        f"sampling does not fit: it needs at least {(copy + cache + kept) / GIB:.1f} of "
        f"{limit / GIB:.1f} GiB per device: {kept / GIB:.1f} of params, optimizer and reward "
        f"models, {copy / GIB:.1f} of the copy that is sampled from (data={parts['data']} × "
        f"tensor={parts['tensor']}), {cache / GIB:.1f} of its cache; {advice}."
    )


def fewest_microbatches(
    counts: list[int], limit: float, peak: Callable[[int], float | None]
) -> tuple[int, float | None]:
    """Return the first count whose peak memory is within a limit, and the peak; or the last.

    Args:
      counts: rising, at least one.
      limit: bytes of a device.
      peak: bytes of an update with a count; None where the compiler refuses it for its memory.
    """
    bytes_needed = None
    for count in counts:
        bytes_needed = peak(count)
        if bytes_needed is not None and bytes_needed <= limit:
            break
    return count, bytes_needed


def _update_peak(setup: RunSetup, count: int) -> float | None:
    """Return the peak memory of an update over all stages, beside what a probed step copies."""
    run = abstract_run(setup, setup.settings.with_microbatches(count))
    peaks = []
    for program in updates(run, probes=True):
        try:
            compiled = program.function.lower(*program.arguments, **program.keywords).compile()
        except jax.errors.JaxRuntimeError:
            return None
        peaks.append(peak_bytes(compiled) + resident_bytes(run, program))
    return max(peaks)


def abstract_run(setup: RunSetup, settings: RunSettings) -> AbstractRun:
    """Return a run described by shapes, on its own devices."""

    def shapes(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            params,
        )

    functions = () if setup.rewards is None else setup.rewards.functions
    scorers = {
        function.name: (function.call.scorer, shapes(function.call.params))
        for function in functions
        if isinstance(function.call, reward.RewardModel)
    }
    model = dataclasses.replace(setup.model, params=shapes(setup.model.params))
    return AbstractRun(settings, model, scorers)


def _saved_count(directory: Path, setup: RunSetup) -> int | None:
    """Return the number that an earlier start chose for the same mesh and rows, or None."""
    path = directory / LAYOUT_FILE
    if not path.exists():
        return None
    values = read_object(path)
    if values.get("mesh") != dict(setup.model.mesh.shape):
        return None
    counts, count = setup.settings.microbatch_counts(setup.model.mesh), values.get("microbatches")
    return count if count in counts else None
