"""Settings to change where a program does not fit, by its part and by what fills the memory."""

from __future__ import annotations

from ntkrl.plan.hardware import Chip
from ntkrl.plan.measure import ProgramCost
from ntkrl.probe import CADENCES
from ntkrl.training import GENERATION, PROBE, SCORING, UPDATE, AbstractRun

FITS = "fits"


def verdict(run: AbstractRun, cost: ProgramCost, chip: Chip) -> str:
    """Return "fits", or the memory needed and the first setting to change."""
    if cost.failed is not None and cost.peak_gib is None:
        return cost.failed
    if cost.fits(chip):
        return FITS
    return f"does not fit: needs {cost.peak_gib:.1f} GiB; {advice(run, cost, chip)}"


def advice(run: AbstractRun, cost: ProgramCost, chip: Chip) -> str:
    """Return the first setting to change, as written on the command line."""
    settings = run.settings
    # an evaluation samples as many completions at a time as a step
    samples = cost.part == GENERATION or cost.name.startswith("evaluation ")
    if samples and settings.rollout.gather_params:
        return "set rollout.gather_params=False"
    if cost.part == PROBE and cost.name.startswith("ledger "):
        return _smaller_ledger(run, cost, chip)
    if chip.memory_gib is not None:
        if 0 < cost.peak_gib - chip.memory_gib <= cost.copies_gib:
            return _fewer_copies(run)
        if cost.argument_gib + cost.resident_gib > chip.memory_gib:
            return _smaller_state(run, cost)
    compute = settings.model.dtype
    if settings.model.compute_dtype is not None:
        compute = settings.model.compute_dtype
    if cost.part == UPDATE:
        if cost.rows > 1:
            return f"set schedule.microbatches={2 * settings.schedule.microbatches}"
        heads = tuple(stage.stage.name for stage in run.stages if stage.head_alone)
        if settings.model.remat != "all" and not cost.name.endswith(heads):
            return "set model.remat=all"
    if samples and not cost.name.endswith("prefill"):
        cache = settings.rollout.cache_dtype
        if (compute if cache is None else cache) == "float32":
            return "set rollout.cache_dtype=bfloat16"
    if cost.part == SCORING and cost.name.startswith("reward "):
        if cost.rows > 1:
            return f"set reward.batch_size={settings.reward.batch_size // 2}"
        if settings.reward.dtype == "float32":
            return "set reward.dtype=bfloat16"
    elif compute == "float32":
        return "set model.compute_dtype=bfloat16"
    if cost.part == UPDATE and settings.schedule.chunk_tokens > 256:
        return f"set schedule.chunk_tokens={settings.schedule.chunk_tokens // 2}"
    if (samples or cost.part == SCORING) and cost.rows > 1:
        return f"lower data.prompts_per_step = {settings.data.prompts_per_step}"
    return f"raise mesh.tensor = {run.mesh.shape['tensor']}, or take more chips"


def _smaller_ledger(run: AbstractRun, cost: ProgramCost, chip: Chip) -> str:
    """Return the setting that shrinks a ledger; turn it off where its arguments do not fit."""
    limit, arrays = chip.memory_gib, cost.argument_gib + cost.resident_gib
    # probe.memory_gib also bounds how many probe completions are read together
    if cost.rows > 1 and (limit is None or arrays <= limit):
        return f"set probe.memory_gib={run.settings.probe.memory_gib / 2:g}"
    return "set probe.ledger_every_steps=None"


def _fewer_copies(run: AbstractRun) -> str:
    """Return the settings that need copies of the state before a step, turned off."""
    names = [name for name in CADENCES if getattr(run.settings.probe, name) is not None]
    if "ledger_every_steps" in names:  # its copies are the larger ones
        names = ["ledger_every_steps"]
    return "set " + " ".join(f"probe.{name}=None" for name in names)


def _smaller_state(run: AbstractRun, cost: ProgramCost) -> str:
    """Return the setting that shrinks the arrays resident throughout the run."""
    settings, shape = run.settings, run.mesh.shape
    if shape["data"] > 1:
        return f"spread the params: set mesh.data=1 mesh.fsdp={shape['data'] * shape['fsdp']}"
    if run.rewards and settings.reward.dtype == "float32":
        return "set reward.dtype=bfloat16"
    if cost.part != UPDATE and not settings.schedule.offload_optimizer:
        return "set schedule.offload_optimizer=True"
    if not settings.model.lora["rank"]:
        return "take more chips, or train adapters with model.lora.rank=16"
    return "take more chips, or keep params in bfloat16 with model.dtype=bfloat16"
