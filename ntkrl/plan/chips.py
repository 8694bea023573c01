"""Published figures of chips, the fractions of them that programs reach, and overheads."""

import dataclasses
import math
from collections.abc import Mapping

from ntkrl.numerics import GIB
from ntkrl.plan.hlo import TPU_PASSES

MICROSECOND = 1e-6


@dataclasses.dataclass(frozen=True)
class Links:
    """Connections between the chips of one machine.

    rate: published bytes/s that a chip receives over one port.
    reached: fraction of it that large collectives reach.
    start_seconds: of a collective of no bytes. hop_seconds: of every hop in addition.
    torus: chips along each axis; () for a switch, which every chip joins by one port.
    ring: torus axes of this many chips or more are closed to rings.
    """

    rate: float
    reached: float = 1.0
    start_seconds: float = 0.0
    hop_seconds: float = 0.0
    torus: tuple[int, ...] = ()
    ring: int = 0

    def ports_and_hops(self, devices: int) -> tuple[int, int]:
        """Return the ports over which a group receives together, and hops across the group.

        A group is placed along the last axes of a torus. The chip at the end of an axis without a
        ring receives over one port, and all others wait for it.
        """
        if not self.torus:
            return 1, devices - 1
        ports, hops, chips = 0, 0, 1
        for size in reversed(self.torus):
            if chips < devices and size > 1:
                closed = size >= self.ring and devices >= chips * size
                length = min(size, -(-devices // chips))
                ports += 2 if closed else 1
                hops += length // 2 if closed else length - 1
                chips *= size
        return max(ports, 1), max(hops, 1)

    def seconds(self, kind: str, devices: int, received: float) -> tuple[float, float]:
        """Return seconds of bandwidth and of latency of a collective.

        Args:
          kind: such as "all-reduce", which passes over the group twice.
          devices: in a group.
          received: bytes per device.
        """
        ports, hops = self.ports_and_hops(devices)
        hops *= 2 if kind == "all-reduce" else 1
        if kind == "collective-permute":
            ports = hops = 1
        moved = received / (ports * self.rate * self.reached)
        return moved, self.start_seconds + hops * self.hop_seconds


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip; without flops, memory_rate or links, no time is predicted.

    flops: published bfloat16 FLOP/s of its matrix units.
    memory_gib: main memory a program may use (GiB).
    memory_rate: published bytes/s of main memory.
    links: to other chips.
    flops_reached, memory_reached: fractions of the published rates that large kernels reach.
    kernel_seconds: overhead of a kernel's launch.
    operation_rate: elementwise operations per second; None: never the limit.
    passes: time of a float32 product over a bfloat16 one, by precision.
    cache_bytes, cache_rate: a kernel that moves at most cache_bytes does so at cache_rate.
    source: of the fractions and overheads, for the reader of a plan.
    """

    flops: float | None = None
    memory_gib: float | None = None
    memory_rate: float | None = None
    links: Links | None = None
    flops_reached: float = 1.0
    memory_reached: float = 1.0
    kernel_seconds: float = 0.0
    operation_rate: float | None = None
    passes: Mapping[str, float] = dataclasses.field(default_factory=lambda: TPU_PASSES)
    cache_bytes: float = 0.0
    cache_rate: float = math.inf
    source: str = ""


# Source: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; v4's links from Jouppi et al. 2304.01433.
# Memory is the limit that the compiler enforces (libtpu 0.0.42), slightly below the published 32,
# 16, 95 and 32 GB. Links: jax-ml.github.io/scaling-book ("TPUs", "Sharding"): 45 of 50 GB/s each
# way, 90 of 100 for v5p and v6e, about 1 µs a hop, and rings on axes of 16 (v4, v5p: cubes of 4).
ICI_REACHED, ICI_HOP_SECONDS = 0.9, MICROSECOND
TPU_SOURCE = "Published rates, not measured; links after jax-ml.github.io/scaling-book."


def tpu(flops: float, memory_gib: float, memory_rate: float, link_rate: float) -> Chip:
    """Return a TPU by its published figures; see Chip and Links."""
    links = Links(link_rate, ICI_REACHED, hop_seconds=ICI_HOP_SECONDS)
    return Chip(flops, memory_gib, memory_rate, links, source=TPU_SOURCE)


TPUS = {
    "v4": tpu(275e12, 30.75, 1200e9, 50e9),
    "v5e": tpu(197e12, 15.75, 819e9, 50e9),
    "v5p": tpu(459e12, 95.74, 2765e9, 100e9),
    "v6e": tpu(918e12, 31.25, 1638e9, 100e9),
}

# On one H200 `python -m tests.bench.device` reached 765 of 989 TFLOP/s in a product of 8192² and
# 4.02 of 4.8 TB/s in adding one to an array of 4 GiB; a kernel's overhead is fitted to the decoding
# measured there (2.1 µs with 16 rows, 2.8 with 128). H100 and A100 were not measured: the same
# fractions are assumed.
GPU_FLOPS_REACHED, GPU_MEMORY_REACHED = 765 / 989, 4.02 / 4.8
GPU_KERNEL_SECONDS = 2.1 * MICROSECOND
# NCCL's model of itself (src/graph/tuning.cc), ring with protocol LL over NVLink: 6.6 µs and 0.6 µs
# a hop. Its all-reduce test reaches about 370 of 450 GB/s each way on eight H100.
NVLINK_REACHED = 370 / 450
NCCL_SECONDS, NCCL_HOP_SECONDS = 6.6 * MICROSECOND, 0.6 * MICROSECOND
GPU_SOURCE = "Rates and overheads measured on one H200; links after NCCL's own model."


def gpu(
    flops: float, float32: float, memory_bytes: float, memory_rate: float, link_rate: float
) -> Chip:
    """Return a GPU by its published figures.

    Args:
      flops: dense bfloat16 FLOP/s of the tensor cores.
      float32: FLOP/s of its other cores, which multiply float32 in full precision.
      memory_bytes: as the driver reports.
      memory_rate: bytes/s.
      link_rate: bytes/s of NVLink in one direction.
    """
    passes = {"default": 2.0, "high": 2.0, "highest": flops / float32}  # TF32 has half the rate
    return Chip(
        flops,
        memory_bytes / GIB,
        memory_rate,
        Links(link_rate, NVLINK_REACHED, NCCL_SECONDS, NCCL_HOP_SECONDS),
        flops_reached=GPU_FLOPS_REACHED,
        memory_reached=GPU_MEMORY_REACHED,
        kernel_seconds=GPU_KERNEL_SECONDS,
        operation_rate=float32 / 2,
        passes=passes,
        source=GPU_SOURCE,
    )


# Source: NVIDIA's data sheets of H200, H100 SXM and A100 SXM (80 and 40 GB), dense rates; memory
# as in gpus/*.txtpb
GPUS = {
    "h200": gpu(989e12, 67e12, 151397597184, 4.8e12, 450e9),
    "h100": gpu(989e12, 67e12, 84942979072, 3.35e12, 450e9),
    "a100": gpu(312e12, 19.5e12, 85100068864, 2.039e12, 300e9),
    "a100-40gb": gpu(312e12, 19.5e12, 42331013120, 1.555e12, 300e9),
}
