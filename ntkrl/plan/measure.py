"""Compile a program for a machine and read its memory, cost and time off the result."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping

import jax

from ntkrl.messages import OUT_OF_MEMORY
from ntkrl.numerics import GIB
from ntkrl.plan import hlo
from ntkrl.plan.chips import Chip
from ntkrl.training import AbstractRun, Program, device_bytes, peak_bytes, resident_bytes

UNITS = {"": 2.0**-30, "K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}
REFUSALS = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
    re.compile(r"trying to allocate ([\d.]+)([KMGT]?)iB"),
)
CAUSES = ("compute", "operations", "memory", "launches", "links", "latency")
NO_TILES = "Couldn't find output tile sizes"


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Memory and cost of one run of a program on one device.

    name, part, stages: see training.Program.
    runs: in a rollout step.
    rows: that a device reads at a time.
    argument_gib: its arguments.
    resident_gib: trees of the run on the device beside them, copies_gib of which are copies for
      probes (see training.Program.extra).
    compile_seconds: duration of the compilation.
    peak_gib: peak memory, resident trees included; None if it was not compiled.
    scratch_gib: the program's peak beyond its arguments.
    flops, passes, traffic, launches, received: see hlo.HloCost.
    collectives: by kind, `(count, bytes)`.
    causes: predicted seconds by cause, see predict(); empty if the chip's rates are unknown.
    failed: reason of the compiler for refusing the program, or None.
    """

    name: str
    part: str
    stages: tuple[str, ...]
    runs: float
    rows: int
    argument_gib: float
    resident_gib: float
    copies_gib: float = 0.0
    compile_seconds: float = 0.0
    peak_gib: float | None = None
    scratch_gib: float | None = None
    flops: float = 0.0
    passes: float = 0.0
    traffic: float = 0.0
    launches: float = 0.0
    received: float = 0.0
    collectives: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    causes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    @property
    def seconds(self) -> float:
        """Predicted time of one run; NaN if the chip's rates are unknown."""
        return sum(self.causes.values()) if self.causes else float("nan")

    def fits(self, chip: Chip) -> bool:
        """Return whether it fits the chip's memory; if that is unknown, whether it compiles."""
        if self.peak_gib is None or self.failed is not None:
            return False
        return chip.memory_gib is None or self.peak_gib <= chip.memory_gib


def measure(run: AbstractRun, program: Program, chip: Chip) -> ProgramCost:
    """Compile a program, set its `compiled`, and return its cost.

    Args:
      run: the run of the program.
      program: to compile.
      chip: the device it is compiled for.

    Returns:
      The cost. If the compiler refused the program, for instance for lack of memory, `compiled`
      stays None and the cost says why, with the memory needed where the compiler reports it.
    """
    copies = device_bytes(program.extra) / GIB
    cost = ProgramCost(
        name=program.name,
        part=program.part,
        stages=program.stages,
        runs=program.runs_per_step,
        rows=program.rows_per_device,
        argument_gib=device_bytes(program.arguments) / GIB,
        resident_gib=resident_bytes(run, program) / GIB,
        copies_gib=copies,
    )
    start = time.perf_counter()
    try:
        lowered = program.function.lower(*program.arguments, **program.keywords)
        compiled = _compiled(lowered)
    except jax.errors.JaxRuntimeError as error:
        cost = dataclasses.replace(cost, compile_seconds=time.perf_counter() - start)
        return _refused(cost, str(error))
    seconds = time.perf_counter() - start
    program.compiled = compiled
    text = compiled.as_text()
    assert text is not None  # every backend of XLA reports it
    counts = hlo.count(text, passes=chip.passes)
    peak = peak_bytes(compiled) / GIB
    return dataclasses.replace(
        cost,
        compile_seconds=seconds,
        peak_gib=peak + cost.resident_gib,
        scratch_gib=peak - cost.argument_gib,
        flops=counts.flops,
        passes=counts.passes,
        traffic=counts.traffic,
        launches=counts.launches,
        received=counts.received,
        collectives={kind: (x.runs, x.size) for kind, x in counts.collectives.items()},
        causes=predict(counts, chip, program.unread),
    )


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program, without Triton's products if it has no tiles for one of them.

    XLA chooses tiles by timing them on the GPU; without a GPU its first choice may not exist.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def predict(cost: hlo.HloCost, chip: Chip, unread: float = 0.0) -> dict[str, float]:
    """Return the seconds of a program by cause; their sum is its time.

    Kernels run one after the other, each for its overhead and the longest of its arithmetic, its
    elementwise operations and its traffic. Copies in the background overlap with them, and so do
    collectives in the background; other collectives are waited for.

    Args:
      cost: of the compiled program.
      chip: its rates.
      unread: bytes that kernels bound by main memory move in the program, and not in a mean run.

    Returns:
      compute, operations, memory: of kernels bound by matrix products, by elementwise operations
      and by main memory. launches: overheads. links, latency: bandwidth and latency of collectives,
      as far as they are waited for. Empty if the chip's rates are unknown.
    """
    if chip.flops is None or chip.memory_rate is None:
        return {}
    memory_rate = chip.memory_rate * chip.memory_reached
    seconds = dict.fromkeys(CAUSES, 0.0)
    copies = 0.0
    for kernel in cost.kernels:
        cached = kernel.traffic <= chip.cache_bytes
        bounds = {
            "memory": kernel.traffic / (chip.cache_rate if cached else memory_rate),
            "compute": kernel.passes / (chip.flops * chip.flops_reached),
            "operations": kernel.operations / (chip.operation_rate or math.inf),
        }
        cause = max(bounds, key=lambda name: bounds[name])
        if kernel.in_background:
            copies += kernel.runs * bounds["memory"]
            continue
        seconds[cause] += kernel.runs * bounds[cause]
        seconds["launches"] += kernel.runs * chip.kernel_seconds
    busy = sum(seconds.values())
    if cost.traffic / memory_rate > busy and copies:
        seconds["memory"] += cost.traffic / memory_rate - busy
    seconds["memory"] = max(seconds["memory"] - unread / memory_rate, 0.0)
    if chip.links is not None:
        hidden = max(busy, sum(seconds.values()))
        for transfer in cost.transfers:
            moved, latency = chip.links.seconds(transfer.kind, transfer.devices, transfer.received)
            if transfer.in_background:
                hidden -= transfer.runs * (moved + latency)
                continue
            seconds["links"] += transfer.runs * moved
            seconds["latency"] += transfer.runs * latency
        seconds["links"] += max(-hidden, 0.0)
    return seconds


def needed_gib(message: str) -> float | None:
    """Return the memory that a program needs by a compiler's error (GiB), if it states it."""
    match = next((hit for pattern in REFUSALS if (hit := pattern.search(message))), None)
    return None if match is None else float(match[1]) * UNITS[match[2]]


def _refused(cost: ProgramCost, message: str) -> ProgramCost:
    if not OUT_OF_MEMORY.search(message):
        reason = " ".join(message.split())[:200]
        return dataclasses.replace(cost, failed=f"the compiler refuses it: {reason}")
    needed = needed_gib(message)
    if needed is None:
        return dataclasses.replace(cost, failed="the compiler runs out of memory")
    # a message on temporaries counts scratch memory alone
    program = needed if "temporaries" not in message else needed + cost.argument_gib
    peak = program + cost.resident_gib
    return dataclasses.replace(
        cost,
        peak_gib=peak,
        scratch_gib=max(program - cost.argument_gib, 0.0),
        failed=f"does not fit: needs {peak:.1f} GiB",
    )
