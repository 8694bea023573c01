"""A config on a mesh: its programs compiled, their verdicts, and the settings that a search tries."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from ntkrl import runtime
from ntkrl.plan import abstract_models
from ntkrl.plan.advice import FITS, verdict
from ntkrl.plan.hardware import Machine
from ntkrl.plan.measure import ProgramCost, measure
from ntkrl.settings import RunSettings
from ntkrl.training import GENERATION, SCORING, UPDATE, AbstractRun

REMATS = ("products", "all", "none")  # of models.REMAT, the usual first
TIMED = (GENERATION, SCORING, UPDATE)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Compiled programs of a config on one mesh, with a verdict each.

    mesh, remat: settings that a search varies.
    crowding: see AbstractRun.crowding.
    programs: costs. verdicts: see advice.verdict.
    stages: names of the stages.
    """

    mesh: Mapping[str, int]
    remat: str
    crowding: str | None
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
        """Roofline seconds of a rollout step by stage and part; NaN where rates are unknown.

        Decoding counts every token at the full cache size, and no row that ends before the last.
        """
        return {
            stage: {
                part: math.fsum(
                    cost.runs * cost.roofline
                    for cost in self.programs
                    if cost.part == part and stage in cost.stages
                )
                for part in TIMED
            }
            for stage in self.stages
        }

    @property
    def total(self) -> float:
        """Roofline seconds of a rollout step of the last stage; NaN where rates are unknown."""
        return sum(self.seconds[self.stages[-1]].values())

    @property
    def largest(self) -> ProgramCost | None:
        """The program with the highest peak memory."""
        known = [cost for cost in self.programs if cost.peak_gib is not None]
        return max(known, key=lambda cost: cost.peak_gib) if known else None

    def rank(self) -> tuple[bool, float, float]:
        """Sort key: candidates that fit first, by time, then by memory."""
        peak = math.inf if self.largest is None else self.largest.peak_gib
        total = 0.0 if math.isnan(self.total) else self.total
        return (not self.fits, total if self.fits else peak, peak)

    def as_json(self, machine: str) -> dict[str, Any]:
        """Return the candidate as JSON values."""
        programs = [
            {
                **dataclasses.asdict(cost),
                "roofline": None if math.isnan(cost.roofline) else cost.roofline,
                "verdict": text,
            }
            for cost, text in zip(self.programs, self.verdicts, strict=True)
        ]
        return {
            "topology": machine,
            "mesh": self.mesh,
            "remat": self.remat,
            "programs": programs,
        }


def abstract_run(settings: RunSettings, machine: Machine) -> AbstractRun:
    """Return a run on a machine's devices whose arrays are placed shapes.

    Raises:
      ValueError: an unknown model, or a mesh that does not fit the devices; see AbstractRun.
    """
    mesh = runtime.make_mesh(**settings.mesh, devices=machine.devices)
    policy, params = abstract_models.describe_policy(settings.model, mesh)
    rewards = abstract_models.describe_rewards(settings, mesh)
    return AbstractRun(settings, mesh, policy, params, rewards)


def compile_candidate(
    settings: RunSettings, machine: Machine, bar: tqdm | None = None, probe: bool = False
) -> Candidate:
    """Compile every program of a config for a machine.

    Args:
      settings: of the config.
      machine: the devices.
      bar: shows the name of the program being compiled.
      probe: include the programs of probes and evaluations.
    """
    run = abstract_run(settings, machine)
    costs = []
    for program in run.programs(probe):
        if bar is not None:
            bar.set_postfix_str(program.name)
        cost, program.compiled = measure(program, machine.chip)
        costs.append(cost)
    return Candidate(
        mesh=dict(run.mesh.shape),
        remat=settings.model.remat,
        crowding=run.crowding(),
        programs=costs,
        verdicts=[verdict(run, cost, machine.chip) for cost in costs],
        stages=run.names,
    )


def candidates(settings: RunSettings, run: AbstractRun) -> Iterator[RunSettings]:
    """Yield settings with other meshes and rematerialisation, in the order a search tries them.

    Few tensor parts come first, data parallelism last. Left out are meshes that do not divide the
    heads, and those that replicate a step's rows, if others do not.
    """
    config, devices = run.policy.config, run.mesh.size
    rows = settings.minibatch_rows // settings.schedule.microbatches
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
