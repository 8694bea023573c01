"""What to turn when a program does not fit: chosen from what it is and what fills the memory."""

from __future__ import annotations

from ntkrl.plan.chips import Chip
from ntkrl.plan.measure import Row
from ntkrl.probe import CADENCES
from ntkrl.training import GENERATION, PROBE, SCORING, UPDATE, AbstractRun


def verdict(run: AbstractRun, row: Row, chip: Chip) -> str:
    """Return "fits", or what is missing and the first knob to turn."""
    if row.failed is not None and row.peak_gib is None:
        return row.failed
    if row.fits(chip):
        return "fits"
    return f"does not fit: needs {row.peak_gib:.1f} GiB; {knob(run, row, chip)}"


def knob(run: AbstractRun, row: Row, chip: Chip) -> str:
    """Return the first setting to change, as it would be written on the command line."""
    lying = row.own_gib + row.beside_gib
    settings, compute = run.settings, run.settings.model.compute_dtype
    narrow = settings.model.dtype if compute is None else compute
    # an evaluation draws as many completions together as a step does
    draws = row.part == GENERATION or row.name.startswith("evaluation ")
    if draws and settings.rollout.gather_params:
        return "set rollout.gather_params=False"
    if row.part == PROBE and row.name.startswith("ledger "):
        return _smaller_ledger(run, row, chip)
    if chip.memory_gib is not None and 0 < row.peak_gib - chip.memory_gib <= row.kept_gib:
        return _no_looks(run)
    if chip.memory_gib is not None and lying > chip.memory_gib:
        return _smaller_state(run, row)
    if row.part == UPDATE:
        if row.rows > 1:
            return f"set schedule.microbatches={2 * settings.schedule.microbatches}"
        if settings.model.remat != "all" and not row.name.endswith(_heads(run)):
            return "set model.remat=all"
    if draws and not row.name.endswith("prefill"):
        cache = settings.rollout.cache_dtype
        if (narrow if cache is None else cache) == "float32":
            return "set rollout.cache_dtype=bfloat16"
    if row.part == SCORING and row.name.startswith("reward "):
        if row.rows > 1:
            return f"set reward.batch_size={settings.reward.batch_size // 2}"
        if settings.reward.dtype == "float32":
            return "set reward.dtype=bfloat16"
    elif narrow == "float32":
        return "set model.compute_dtype=bfloat16"
    if row.part == UPDATE and settings.schedule.chunk_tokens > 256:
        return f"set schedule.chunk_tokens={settings.schedule.chunk_tokens // 2}"
    if (draws or row.part == SCORING) and row.rows > 1:
        return f"lower data.prompts_per_step = {settings.data.prompts_per_step}"
    return f"raise mesh.tensor = {run.mesh.shape['tensor']}, or take more chips"


def _heads(run: AbstractRun) -> tuple[str, ...]:
    """Return the names of stages that read no body."""
    return tuple(stage.stage.name for stage in run.stages if stage.head_alone)


def _smaller_ledger(run: AbstractRun, row: Row, chip: Chip) -> str:
    """Return what makes a ledger smaller; to turn it off where what lies there is too much."""
    limit, lying = chip.memory_gib, row.own_gib + row.beside_gib
    # which also says how many probe completions are read together
    if row.rows > 1 and (limit is None or lying <= limit):
        return f"set probe.memory_gib={run.settings.probe.memory_gib / 2:g}"
    return "set probe.ledger_every_steps=None"


def _no_looks(run: AbstractRun) -> str:
    """Return what does without the copies that are kept during a step."""
    names = [name for name in CADENCES if getattr(run.settings.probe, name) is not None]
    if "ledger_every_steps" in names:  # its copies are the larger ones
        names = ["ledger_every_steps"]
    return "set " + " ".join(f"probe.{name}=None" for name in names)


def _smaller_state(run: AbstractRun, row: Row) -> str:
    """Return what makes the arrays smaller that lie there all the time."""
    settings, shape = run.settings, run.mesh.shape
    if shape["data"] > 1:
        return f"spread the params: set mesh.data=1 mesh.fsdp={shape['data'] * shape['fsdp']}"
    if run.scorers and settings.reward.dtype == "float32":
        return "set reward.dtype=bfloat16"
    if row.part != UPDATE and not settings.schedule.offload_optimizer:
        return "set schedule.offload_optimizer=True"
    if not settings.model.lora["rank"]:
        return "take more chips, or train adapters with model.lora.rank=16"
    return "take more chips, or keep params in bfloat16 with model.dtype=bfloat16"
