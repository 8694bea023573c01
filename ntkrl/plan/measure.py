"""Compile a program for described devices; read memory and cost off the result."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from ntkrl.numerics import GIB
from ntkrl.plan import hlo
from ntkrl.plan.chips import Chip
from ntkrl.plan.networks import held_bytes
from ntkrl.training import AbstractRun, Program

UNITS = {"": 2.0**-30, "K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}
REFUSALS = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
    re.compile(r"trying to allocate ([\d.]+)([KMGT]?)iB"),
)
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|Ran out of memory", re.I)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of a program; sizes and costs of one device and one run of it.

    name, part, stages, runs, rows: see Program.
    peak_gib: memory at its peak, with what else lies there (GiB); None where it was not compiled.
    own_gib: its arguments. scratch_gib: its peak beyond them. beside_gib: of what else lies there,
        kept_gib of it for the run's looks, see Program.extra.
    flops, passes, traffic, received: see hlo.Cost. collectives: by kind, `(count, bytes)`.
    seconds: by roofline, of compute, memory and links; empty where the chip's rates are not known.
    failed: why the compiler refused, or None.
    compile_seconds: how long it took.
    """

    name: str
    part: str
    stages: tuple[str, ...]
    runs: float
    rows: int
    own_gib: float
    beside_gib: float
    compile_seconds: float
    peak_gib: float | None = None
    scratch_gib: float | None = None
    flops: float = 0.0
    passes: float = 0.0
    traffic: float = 0.0
    received: float = 0.0
    collectives: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    failed: str | None = None
    kept_gib: float = 0.0

    @property
    def roofline(self) -> float:
        """Seconds of one run that no program of this cost can go below; NaN where not known."""
        return max(self.seconds.values()) if self.seconds else float("nan")

    def fits(self, chip: Chip) -> bool:
        """Tell whether it runs; where the chip's memory is not known, whether it compiles."""
        if self.peak_gib is None or self.failed is not None:
            return False
        return chip.memory_gib is None or self.peak_gib <= chip.memory_gib


def measure(run: AbstractRun, program: Program, chip: Chip) -> tuple[Row, Any | None]:
    """Compile a program; a refusal for want of memory is a Row that says how much it needs."""
    own, kept = (held_bytes(tree) / GIB for tree in (program.arguments, program.extra))
    row = Row(
        name=program.name,
        part=program.part,
        stages=program.stages,
        runs=program.runs_per_step,
        rows=program.rows_per_device,
        own_gib=own,
        beside_gib=_beside(run, program) / GIB + kept,
        compile_seconds=0.0,
        kept_gib=kept,
    )
    start = time.perf_counter()
    try:
        compiled = program.function.lower(*program.arguments, **program.keywords).compile()
    except jax.errors.JaxRuntimeError as error:
        took = {"compile_seconds": time.perf_counter() - start}
        return _refused(row, str(error), took), None
    seconds = time.perf_counter() - start
    cost = hlo.count(compiled.as_text(), program.loop_trips)
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = (memory.argument_size_in_bytes + made + memory.temp_size_in_bytes) / GIB
    return dataclasses.replace(
        row,
        peak_gib=peak + row.beside_gib,
        scratch_gib=peak - own,
        flops=cost.flops,
        passes=cost.passes,
        traffic=cost.traffic,
        received=cost.received,
        collectives={kind: (one.count, one.size) for kind, one in cost.collectives.items()},
        seconds=roofline(cost, chip),
        compile_seconds=seconds,
    ), compiled


def roofline(cost: hlo.Cost, chip: Chip) -> dict[str, float]:
    """Return the seconds of compute, memory and links, each at its published rate."""
    if chip.flops is None:
        return {}
    return {
        "compute": cost.passes / chip.flops,
        "memory": cost.traffic / chip.memory_rate,
        "links": cost.received / chip.link_rate,
    }


def needed_gib(message: str) -> float | None:
    """Return the memory that a compiler's refusal says a program needs (GiB), if it says so."""
    found = next((hit for one in REFUSALS if (hit := one.search(message))), None)
    return None if found is None else float(found[1]) * UNITS[found[2]]


def _refused(row: Row, message: str, took: dict[str, float]) -> Row:
    if not OUT_OF_MEMORY.search(message):
        said = " ".join(message.split())[:200]
        return dataclasses.replace(row, failed=f"the compiler refuses it: {said}", **took)
    needed = needed_gib(message)
    if needed is None:
        return dataclasses.replace(row, failed="the compiler runs out of its memory", **took)
    # a message may count the scratch alone
    peak = needed if "temporaries" not in message else needed + row.own_gib
    return dataclasses.replace(
        row,
        peak_gib=peak + row.beside_gib,
        scratch_gib=max(peak - row.own_gib, 0.0),
        failed=f"does not fit: needs {peak + row.beside_gib:.1f} GiB",
        **took,
    )


def _beside(run: AbstractRun, program: Program) -> float:
    """Return the bytes of the run's trees that lie on a device and are no argument, at most."""
    stages = [one for one in run.stages if one.stage.name in program.stages]
    return max(
        sum(
            held_bytes(tree)
            for name, tree in run.resident(stage).items()
            if name not in program.resident
        )
        for stage in (stages if stages else run.stages)
    )
