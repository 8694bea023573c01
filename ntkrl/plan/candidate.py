"""A config on a mesh: its compiled programs, verdicts with advice, and settings to search."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from ntkrl import trees
from ntkrl.plan import abstract_models
from ntkrl.plan.chips import Chip
from ntkrl.plan.hardware import Machine
from ntkrl.plan.measure import ProgramCost, measure
from ntkrl.probe import CADENCES
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel, choose_rollout_mesh, decoding_work
from ntkrl.training import (
    GENERATION,
    PROBE,
    SCORING,
    UPDATE,
    AbstractRun,
    Program,
    run_programs,
)

REMATS = ("products", "all", "none")  # of models.REMAT, the usual first
TIMED = (GENERATION, SCORING, UPDATE)
FITS = "fits"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Compiled programs of a config on one mesh, with a verdict each.

    mesh, remat: settings that a search varies.
    rollout_mesh, microbatches: the config's, or as a run chooses them.
    warning: see repetition_warning().
    programs: costs. verdicts: see verdict().
    stages: names of the stages.
    """

    mesh: Mapping[str, int]
    rollout_mesh: Mapping[str, int]
    microbatches: int
    remat: str
    warning: str | None
    programs: list[ProgramCost]
    verdicts: list[str]
    stages: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if every program fits."""
        return self.verdict == FITS

    @property
    def verdict(self) -> str:
        """The first verdict on a program that does not fit, or "fits"."""
        return next((text for text in self.verdicts if text != FITS), FITS)

    @property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Predicted seconds of a rollout step by stage and part; NaN where rates are unknown.

        Decoding counts every token at the full cache size, and no row that ends before the last.
        """
        return {
            stage: {
                part: math.fsum(
                    cost.runs * cost.seconds
                    for cost in self.programs
                    if cost.part == part and stage in cost.stages
                )
                for part in TIMED
            }
            for stage in self.stages
        }

    @property
    def total(self) -> float:
        """Predicted seconds of a rollout step of the last stage; NaN where rates are unknown."""
        return sum(self.seconds[self.stages[-1]].values())

    @property
    def largest(self) -> ProgramCost | None:
        """The program with the highest peak memory."""
        known = [cost for cost in self.programs if cost.peak_gib is not None]
        return max(known, key=operator.attrgetter("peak_gib"), default=None)

    def rank(self) -> tuple[bool, float, float]:
        """Sort key: candidates that fit first, by time, then by memory."""
        known = (cost.peak_gib for cost in self.programs if cost.peak_gib is not None)
        peak = max(known, default=math.inf)
        total = 0.0 if math.isnan(self.total) else self.total
        return (not self.fits, total if self.fits else peak, peak)

    def as_json(self, machine: str) -> dict[str, Any]:
        """Return the candidate as JSON values."""
        programs = [
            {
                **dataclasses.asdict(cost),
                "seconds": None if math.isnan(cost.seconds) else cost.seconds,
                "verdict": text,
            }
            for cost, text in zip(self.programs, self.verdicts, strict=True)
        ]
        return {
            "topology": machine,
            "mesh": self.mesh,
            "rollout_mesh": self.rollout_mesh,
            "microbatches": self.microbatches,
            "remat": self.remat,
            "programs": programs,
        }


class SpecialTokens(NamedTuple):
    """The part of a tokenizer that a sampler uses."""

    pad_token_id: int = 0


def abstract_run(settings: RunSettings, machine: Machine) -> AbstractRun:
    """Return a run on a machine's devices whose arrays are placed shapes.

    Raises:
      ValueError: an unknown model, a mesh that does not fit the devices; see also AbstractRun.
    """
    if settings.method.reward_model:
        raise ValueError("plan knows methods rl and sft; a reward model has no plan yet.")
    mesh = settings.make_mesh(machine.devices)
    policy, params = abstract_models.describe_policy(settings.model, mesh)
    scorers = abstract_models.describe_rewards(settings, mesh)
    sampling_mesh = choose_rollout_mesh(settings, policy, params, mesh)
    model = StartingModel(policy, params, SpecialTokens(), "", (0,), mesh, sampling_mesh)
    return AbstractRun(settings, model, scorers)


def compile_candidate(
    settings: RunSettings, machine: Machine, bar: tqdm | None = None, probe: bool = False
) -> Candidate:
    """Compile every program of a config for a machine.

    Args:
      settings: of the config.
      machine: the devices.
      bar: shows the name of the program being compiled.
      probe: include the programs of probes and evaluations, and a product with the kernel.
    """

    def measured(run: AbstractRun, programs: Iterable[Program]) -> list[ProgramCost]:
        costs = []
        for program in programs:
            if bar is not None:
                bar.set_postfix_str(program.name)
            costs.append(measure(run, program, machine.chip))
        return costs

    run = abstract_run(settings, machine)
    first, *more = settings.microbatch_counts(run.mesh)
    run = abstract_run(settings.with_microbatches(first), machine)
    costs = measured(run, candidate_programs(run, probe))
    for count in more:
        if all(cost.fits(machine.chip) for cost in costs if cost.part == UPDATE):
            break
        run = abstract_run(settings.with_microbatches(count), machine)
        updates = measured(run, (p for p in run_programs(run, probe) if p.part == UPDATE))
        renewed = {cost.name: cost for cost in updates}
        costs = [renewed.get(cost.name, cost) for cost in costs]
    return Candidate(
        mesh=dict(run.mesh.shape),
        rollout_mesh=dict(run.model.rollout_mesh.shape),
        microbatches=run.settings.microbatches,
        remat=settings.model.remat,
        warning=repetition_warning(run),
        programs=costs,
        verdicts=[verdict(run, cost, machine.chip) for cost in costs],
        stages=run.stage_names,
    )


def candidate_programs(run: AbstractRun, probe: bool) -> Iterator[Program]:
    """Yield the programs of a run; with `probe`, also K c for the last position of a prompt."""
    yield from run_programs(run, probe)
    if probe:
        model = run.model
        apply, arguments = abstract_models.kernel_apply(
            model.policy, model.params, run.mesh, run.width
        )
        yield Program("kernel apply", PROBE, (), apply, arguments, frozenset({"params"}), 0.0)


def repetition_warning(run: AbstractRun) -> str | None:
    """Return a warning if a step has too few rows for the mesh, so that devices repeat them."""
    rows, parts = run.minibatch(run.stages[0])[0].tokens.shape[0], trees.row_parts(run.mesh)
    rows //= run.settings.microbatches
    if rows % parts == 0:
        return None
    return (
        f"data × fsdp = {parts} does not divide the {rows} rows read together in a step: devices "
        "repeat each other's work; raise data.prompts_per_step or mesh.tensor"
    )


def candidates(settings: RunSettings, run: AbstractRun) -> Iterator[RunSettings]:
    """Yield settings with other meshes and rematerialisation, in the order a search tries them.

    Few tensor parts come first, data parallelism last. Left out are meshes that do not divide the
    heads, and those that replicate a step's rows, if others do not.
    """
    config, devices = run.model.policy.config, run.mesh.size
    rows = settings.minibatch_rows // settings.microbatches
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    meshes = [
        {"data": data, "fsdp": devices // tensor // data, "tensor": tensor}
        for tensor in _divisors(devices)
        for data in _divisors(devices // tensor)
        if heads % tensor == 0
    ]
    sharded = [mesh for mesh in meshes if rows % (mesh["data"] * mesh["fsdp"]) == 0]
    # where every device reads all rows, only tensor parts divide the work
    meshes, sign = (sharded, 1) if sharded else (meshes, -1)
    meshes = sorted(meshes, key=lambda mesh: (mesh["data"], sign * mesh["tensor"]))
    for remat, mesh in itertools.product(REMATS, meshes):
        model = dataclasses.replace(settings.model, remat=remat)
        yield dataclasses.replace(settings, mesh=mesh, model=model)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


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
    if samples:
        work = decoding_work(settings, run.model.policy, run.model.params)
        parts = work.more_parts(run.mesh.size, run.model.rollout_mesh.shape["tensor"])
        if parts is not None:
            return f"set rollout.mesh.tensor={parts}"
    if cost.part == PROBE and cost.name.startswith("ledger "):
        return _smaller_ledger(run, cost, chip)
    if chip.memory_gib is not None:
        assert cost.peak_gib is not None  # verdict() asks for advice only where it is known
        # the copy that is sampled from is none of a probe
        if not samples and 0 < cost.peak_gib - chip.memory_gib <= cost.copies_gib:
            return _fewer_copies(run)
        if cost.argument_gib + cost.resident_gib > chip.memory_gib:
            return _smaller_state(run, cost)
    compute = settings.model.dtype
    if settings.model.compute_dtype is not None:
        compute = settings.model.compute_dtype
    if cost.part == UPDATE:
        if cost.rows > 1:
            return f"set schedule.microbatches={2 * settings.microbatches}"
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
    if run.scorers and settings.reward.dtype == "float32":
        return "set reward.dtype=bfloat16"
    if cost.part != UPDATE and not settings.schedule.offload_optimizer:
        return "set schedule.offload_optimizer=True"
    if not settings.model.lora["rank"]:
        return "take more chips, or train adapters with model.lora.rank=16"
    return "take more chips, or keep params in bfloat16 with model.dtype=bfloat16"
