"""Published figures of chips: the one table that rooflines and verdicts are made of.

Source: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; links of v4 from Jouppi et al. 2304.01433
(six of 50 GB/s each way). Memory is what the compiler lets a program use, a little less than what
is published (32, 16, 95 and 32 GB); found with libtpu 0.0.42 by asking for too much.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; None where a figure is not known.

    flops: bfloat16 FLOP/s of its matrix units.
    memory_gib: main memory a program may use (GiB).
    memory_rate: bytes/s of main memory.
    link_rate: bytes/s that come in over all its links together.
    """

    flops: float | None = None
    memory_gib: float | None = None
    memory_rate: float | None = None
    link_rate: float | None = None


CHIPS = {
    "v4": Chip(275e12, 30.75, 1200e9, 300e9),
    "v5e": Chip(197e12, 15.75, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25, 1638e9, 400e9),
}
