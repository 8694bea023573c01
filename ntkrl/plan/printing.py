"""A plan as text: one line per program, a line per stage, candidates of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ntkrl.plan.measure import Row
from ntkrl.training import GENERATION, SCORING, UPDATE

if TYPE_CHECKING:
    from ntkrl.plan.command import Found
    from ntkrl.plan.topology import Machine

TIMED = (GENERATION, SCORING, UPDATE)
SHORT = {
    "all-gather": "gather",
    "all-reduce": "reduce",
    "reduce-scatter": "scatter",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
}
COLUMNS = ("program", "runs", "peak GiB", "TFLOP", "GB moved", "collectives, GB", "ms", "bound")


def steps(stages: Sequence[str], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return seconds of a rollout step by roofline, by stage and part; NaN where not known.

    Decoding counts every token at the full cache, and no row that is done before the last.
    """
    return {
        stage: {
            part: math.fsum(
                row.runs * row.roofline for row in rows if row.part == part and stage in row.stages
            )
            for part in TIMED
        }
        for stage in stages
    }


def format_programs(found: Found, machine: Machine) -> str:
    """Return the programs of a candidate, a stage's time per rollout step, and what to turn."""
    chip = machine.chip
    limit = "?" if chip.memory_gib is None else f"{chip.memory_gib:.4g}"
    head = (
        f"{machine.name}: {len(machine.devices)} devices of {limit} GiB, mesh "
        f"{mesh_name(found.mesh)}, remat {found.remat}"
    )
    cells = [list(COLUMNS), *map(_cells, found.rows)]
    lines = [head, "", *lay_out(cells), ""]
    lines += [f"{name}: {_times(parts)}" for name, parts in found.seconds.items()]
    if found.crowded is not None:
        lines.append(found.crowded)
    told = zip(found.rows, found.verdicts, strict=True)
    wrong = [f"{row.name}: {said}" for row, said in told if said != "fits"]
    lines += wrong if wrong else [_fitting(found, limit)]
    return "\n".join(lines)


def format_candidates(found: Sequence[Found]) -> str:
    """Return a line per candidate of a search, the best first."""
    cells = [["mesh", "remat", "peak GiB", "program", "s per step", "verdict"]]
    for one in found:
        most = one.largest
        cells.append(
            [
                mesh_name(one.mesh),
                one.remat,
                "?" if most is None else f"{most.peak_gib:.2f}",
                "" if most is None else most.name,
                shown(one.total),
                "fits" if one.fits else next(s for s in one.verdicts if s != "fits"),
            ]
        )
    return "\n".join([*lay_out(cells), "", "the first in full:", ""])


def mesh_name(mesh: Mapping[str, int]) -> str:
    """Write a mesh in words: its axes that are more than one."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def lay_out(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns as wide as they need, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def shown(seconds: float) -> str:
    """Write seconds in three digits, or a dash where they are not known."""
    return "–" if math.isnan(seconds) else f"{seconds:.3g}"


def _cells(row: Row) -> list[str]:
    peak = "refused" if row.peak_gib is None else f"{row.peak_gib:.2f}"
    if row.failed is not None:
        return [row.name, f"{row.runs:g}", peak, "", "", "", "", ""]
    moved = ", ".join(
        f"{SHORT[kind]} {size / 1e9:.3g}" for kind, (_, size) in row.collectives.items()
    )
    bound = max(row.seconds, key=lambda name: row.seconds[name]) if row.seconds else "–"
    milliseconds = 1e3 * row.roofline
    return [
        row.name,
        f"{row.runs:g}",
        peak,
        f"{row.flops / 1e12:.3g}",
        f"{row.traffic / 1e9:.3g}",
        moved,
        shown(milliseconds),
        bound,
    ]


def _times(parts: Mapping[str, float]) -> str:
    total = math.fsum(parts.values())
    if math.isnan(total):
        return "time not known: no published rates for these devices"
    split = ", ".join(f"{part} {shown(seconds)}" for part, seconds in parts.items() if seconds)
    return f"{shown(total)} s per rollout step at best ({split})"


def _fitting(found: Found, limit: str) -> str:
    most = found.largest
    return f"fits: {most.name} takes most, {most.peak_gib:.2f} of {limit} GiB per device"
