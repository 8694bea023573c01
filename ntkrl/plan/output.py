"""Text of `ntkrl plan`: programs and stages, candidates of a search, and the Markdown table."""

import math
from collections.abc import Mapping, Sequence

from ntkrl.plan.candidate import FITS, TIMED, Candidate
from ntkrl.plan.chips import Chip
from ntkrl.plan.hardware import Machine
from ntkrl.plan.measure import ProgramCost

SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter"}
SHORT |= {"all-to-all": "all-to-all", "collective-permute": "permute"}
PROGRAM_COLUMNS = (
    *("program", "runs", "peak GiB", "TFLOP", "GB moved"),
    *("collectives, GB", "ms", "bound"),
)
CANDIDATE_COLUMNS = (
    "mesh",
    "rollout mesh",
    "remat",
    "peak GiB",
    "program",
    "s per step",
    "verdict",
)
TABLE_COLUMNS = (
    *("model", "machine", "mesh", "rollout mesh", "peak GiB", "of", "largest program"),
    *("s per step", *TIMED, "verdict"),
)
TABLE_HEAD = """# Memory and time of a run

Written by `{}`: the TPU compiler's figures for every program of
the run, not measurements on a TPU. Peak: memory of one chip, with all that stays there during the
run, except copies for probes and ledgers. Seconds: predicted for a rollout step of the last stage,
by the rates in `ntkrl/plan/chips.py`. Mesh: the first that a search tries, not the best.
"""


def format_programs(candidate: Candidate, machine: Machine) -> str:
    """Return the programs of a candidate, the time of each stage's step, and advice."""
    memory_gib = machine.chip.memory_gib
    limit = "?" if memory_gib is None else f"{memory_gib:.4g}"
    lines = [
        f"{machine.name}: {len(machine.devices)} devices of {limit} GiB, mesh "
        f"{mesh_name(candidate.mesh)}, rollout mesh {mesh_name(candidate.rollout_mesh)}, "
        f"remat {candidate.remat}, "
        f"microbatches {candidate.microbatches}",
        "",
        *_aligned([PROGRAM_COLUMNS, *map(_program_cells, candidate.programs)]),
        "",
    ]
    lines += [f"{stage}: {_times(parts)}" for stage, parts in candidate.seconds.items()]
    if machine.chip.source:
        lines.append(f"assumed: {_assumptions(machine.chip)}")
    if candidate.warning is not None:
        lines.append(candidate.warning)
    verdicts = zip(candidate.programs, candidate.verdicts, strict=True)
    problems = [f"{cost.name}: {verdict}" for cost, verdict in verdicts if verdict != FITS]
    if not problems:
        cost = candidate.largest
        assert cost is not None  # every program fits, so that its peak is known
        problems = [f"fits: {cost.name} takes most, {cost.peak_gib:.2f} of {limit} GiB per device"]
    return "\n".join(lines + problems)


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """Return a line per candidate of a search, the best first."""
    cells = [CANDIDATE_COLUMNS]
    for candidate in candidates:
        largest = candidate.largest
        cells.append(
            (
                mesh_name(candidate.mesh),
                mesh_name(candidate.rollout_mesh),
                candidate.remat,
                "?" if largest is None else f"{largest.peak_gib:.2f}",
                "" if largest is None else largest.name,
                _seconds(candidate.total),
                candidate.verdict,
            )
        )
    return "\n".join([*_aligned(cells), "", "the first in full:", ""])


def table_row(model: str, machine: Machine, candidate: Candidate) -> str:
    """Return a line of the Markdown table."""
    largest, parts = candidate.largest, list(candidate.seconds.values())[-1]
    times = [candidate.total, *parts.values()] if candidate.fits else [math.nan] * 4
    repeated = "" if candidate.warning is None else "; more chips than rows to spread"
    cells = (
        model.rpartition("/")[2],
        machine.name,
        mesh_name(candidate.mesh),
        mesh_name(candidate.rollout_mesh),
        "–" if largest is None else f"{largest.peak_gib:.1f}",
        f"{machine.chip.memory_gib:.4g}",
        "–" if largest is None else largest.name,
        *map(_seconds, times),
        candidate.verdict + repeated,
    )
    return f"| {' | '.join(cells)} |"


def format_table(rows: Sequence[str], command: str, total: int) -> str:
    """Return the Markdown page of rows compiled so far, `total` at the end."""
    missing = f"{len(rows)} of {total} rows were compiled.\n" if len(rows) < total else ""
    head = [f"| {' | '.join(TABLE_COLUMNS)} |", f"|{'---|' * len(TABLE_COLUMNS)}"]
    return "\n".join([TABLE_HEAD.format(command) + missing, *head, *rows, ""])


def _assumptions(chip: Chip) -> str:
    """Return the rates that the times are predicted with."""
    assert chip.flops is not None and chip.memory_rate is not None and chip.links is not None
    flops, memory, link = chip.flops / 1e12, chip.memory_rate / 1e12, chip.links.rate / 1e9
    return (
        f"{flops * chip.flops_reached:.0f} of {flops:.0f} TFLOP/s in bfloat16, a float32 product "
        f"takes {chip.passes['highest']:.3g} times as long; {memory * chip.memory_reached:.2f} of "
        f"{memory:.2f} TB/s; {chip.kernel_seconds * 1e6:.2g} µs a kernel; links of "
        f"{link * chip.links.reached:.0f} of {link:.0f} GB/s a port, "
        f"{chip.links.start_seconds * 1e6:.2g} µs a collective and "
        f"{chip.links.hop_seconds * 1e6:.2g} µs a hop. {chip.source}"
    )


def mesh_name(mesh: Mapping[str, int]) -> str:
    """Return the axes of a mesh that are larger than one."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _seconds(seconds: float) -> str:
    """Return seconds in three digits, or a dash where they are unknown."""
    return "–" if math.isnan(seconds) else f"{seconds:.3g}"


def _program_cells(cost: ProgramCost) -> tuple[str, ...]:
    peak = "refused" if cost.peak_gib is None else f"{cost.peak_gib:.2f}"
    if cost.failed is not None:
        return (cost.name, f"{cost.runs:g}", peak, "", "", "", "", "")
    collectives = (
        f"{SHORT[kind]} {size / 1e9:.3g}" for kind, (_, size) in cost.collectives.items()
    )
    return (
        cost.name,
        f"{cost.runs:g}",
        peak,
        f"{cost.flops / 1e12:.3g}",
        f"{cost.traffic / 1e9:.3g}",
        ", ".join(collectives),
        _seconds(1e3 * cost.seconds),
        max(cost.causes, key=lambda cause: cost.causes[cause]) if cost.causes else "–",
    )


def _times(parts: Mapping[str, float]) -> str:
    total = math.fsum(parts.values())
    if math.isnan(total):
        return "time not known: no rates are known for these devices"
    split = ", ".join(f"{part} {_seconds(value)}" for part, value in parts.items() if value)
    return f"{_seconds(total)} s per rollout step predicted ({split})"
