"""`ntkrl plan`: a config on a machine, or the machines and meshes it is compared on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ntkrl.plan import printing, topology
from ntkrl.plan.measure import Row, measure
from ntkrl.plan.programs import crowded, described, programs
from ntkrl.plan.topology import Machine
from ntkrl.plan.verdict import verdict
from ntkrl.settings import RunSettings
from ntkrl.training import AbstractRun

REMATS = ("products", "all", "none")  # of models.REMAT, the usual first
CANDIDATES = 6


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What `ntkrl plan` was asked for.

    topology: see topology.machine.
    search: compare meshes and what is made again, in place of the config's.
    limit: candidates of a search at most, ≥ 1.
    json: file for the rows, or None.
    """

    topology: str
    search: bool = False
    limit: int = CANDIDATES
    json: str | None = None

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}.")


def read_options(options: Mapping[str, str]) -> PlanSettings:
    """Turn the words of a command line into settings.

    Args:
      options: `{name: text}`; "search" counts by being there.

    Raises:
      ValueError: a limit that is no positive number.
    """
    given: dict[str, Any] = {**options, "search": "search" in options}
    if "limit" in given:
        if not given["limit"].isdigit():
            raise ValueError(f"--limit={given['limit']} must be a whole number.")
        given["limit"] = int(given["limit"])
    return PlanSettings(**given)


@dataclasses.dataclass(frozen=True)
class Found:
    """The rows of one candidate, with a verdict each.

    mesh, remat: of the candidate. crowded: see programs.crowded. seconds: of a rollout step by
    stage and part, see printing.steps.
    """

    mesh: dict[str, int]
    remat: str
    crowded: str | None
    rows: list[Row]
    verdicts: list[str]
    seconds: Mapping[str, Mapping[str, float]]

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(said == "fits" for said in self.verdicts)

    @property
    def total(self) -> float:
        """Seconds of a rollout step of the last stage; NaN where rates are not known."""
        return sum(list(self.seconds.values())[-1].values())

    @property
    def largest(self) -> Row | None:
        """The program with the highest peak."""
        known = [row for row in self.rows if row.peak_gib is not None]
        return max(known, key=lambda row: row.peak_gib) if known else None

    def rank(self) -> tuple[Any, ...]:
        """Order candidates: those that fit, by time, then by memory."""
        peak = math.inf if self.largest is None else self.largest.peak_gib
        total = 0.0 if math.isnan(self.total) else self.total
        return (not self.fits, total if self.fits else peak, peak)


def plan(settings: RunSettings, asked: PlanSettings) -> list[Found]:
    """Print what a config takes on a machine; write rows as JSON where asked.

    Args:
      settings: from `read_settings`.
      asked: the rest of the command line.

    Raises:
      ValueError: an unknown machine, no compiler for it, an unknown model, or a mesh that does not
        fit.
    """
    machine = topology.machine(asked.topology)
    candidates = [settings]
    if asked.search:
        run = described(dataclasses.replace(settings, mesh=WHOLE), machine.devices)
        candidates = list(itertools.islice(choices(settings, run), asked.limit))
    found = []
    with tqdm(total=len(candidates), desc="plan", file=sys.stderr, disable=None) as bar:
        for one in candidates:
            found.append(compiled(one, machine, bar, probe=not asked.search))
            jax.clear_caches()  # a compiled program holds memory of this machine
            bar.update()
    found.sort(key=Found.rank)
    if asked.search:
        print(printing.format_candidates(found))
    print(printing.format_programs(found[0], machine))
    if asked.json is not None:
        written = [as_json(one, machine) for one in found]
        Path(asked.json).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return found


WHOLE = {"data": 1, "fsdp": -1, "tensor": 1}


def compiled(
    settings: RunSettings, machine: Machine, bar: tqdm | None = None, probe: bool = False
) -> Found:
    """Compile every program of a config for a machine.

    Args:
      settings, machine: what, and for which devices.
      bar: told which program is being compiled.
      probe: with the product with a kernel.
    """
    run = described(settings, machine.devices)
    steps, made, result = programs(run, probe), [], None
    while True:
        try:
            program = steps.send(result)
        except StopIteration:
            break
        if bar is not None:
            bar.set_postfix_str(program.name)
        row, result = measure(run, program, machine.chip)
        made.append(row)
    return Found(
        mesh=dict(run.mesh.shape),
        remat=settings.model.remat,
        crowded=crowded(run),
        rows=made,
        verdicts=[verdict(run, row, machine.chip) for row in made],
        seconds=printing.steps(run.stage_names, made),
    )


def choices(settings: RunSettings, run: AbstractRun) -> Iterator[RunSettings]:
    """Yield meshes and what is made again: few tensor parts first, whole rows per device last.

    Left out are meshes that do not divide the heads, and those that leave a step's rows whole on
    every device, where others do not.
    """
    config, devices = run.model.policy.config, run.mesh.size
    step = settings.minibatch_rows // settings.schedule.microbatches
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    shapes = [
        {"data": data, "fsdp": devices // tensor // data, "tensor": tensor}
        for tensor in divisors(devices)
        for data in divisors(devices // tensor)
        if heads % tensor == 0
    ]
    spread = [one for one in shapes if step % (one["data"] * one["fsdp"]) == 0]
    # where every device reads all rows, tensor parts are what divides the work
    shapes, sign = (spread, 1) if spread else (shapes, -1)
    shapes = sorted(shapes, key=lambda one: (one["data"], sign * one["tensor"]))
    for remat, shape in itertools.product(REMATS, shapes):
        model = dataclasses.replace(settings.model, remat=remat)
        yield dataclasses.replace(settings, mesh=shape, model=model)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, increasing."""
    return [one for one in range(1, number + 1) if number % one == 0]


def as_json(found: Found, machine: Machine) -> dict[str, Any]:
    """Return a candidate as JSON values."""
    made = [
        {**dataclasses.asdict(row), "roofline": row.roofline, "verdict": said}
        for row, said in zip(found.rows, found.verdicts, strict=True)
    ]
    for one in made:
        one["roofline"] = None if math.isnan(one["roofline"]) else one["roofline"]
    return {"topology": machine.name, "mesh": found.mesh, "remat": found.remat, "programs": made}
