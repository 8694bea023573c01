"""The checked-in table: models and machines side by side, written anew by one command."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from ntkrl.plan import topology
from ntkrl.plan.command import WHOLE, Found, choices, compiled
from ntkrl.plan.printing import TIMED, mesh_name, shown
from ntkrl.plan.programs import described
from ntkrl.plan.topology import Machine
from ntkrl.settings import RunSettings

MACHINES = ("v5e-16", "v6e-16", "v5p-32", "v5e-64", "v5e-256")
MODELS = ("EleutherAI/pythia-2.8b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen3-8B")
CROWDED = "; more chips than rows to spread"
COLUMNS = ("model", "machine", "mesh", "peak GiB", "of", "largest program")
TIMES = ("s per step", *TIMED, "verdict")


def write_table(path: str, settings: RunSettings, command: str) -> None:
    """Compile a config for every model and machine; write a Markdown table after each.

    The mesh is the first that a search would try: fully sharded, with tensor parts only where the
    rows of a step do not reach all chips. Seconds are of the last stage.

    Args:
      path: the file.
      settings: of the config; its model's path, template and mesh are replaced.
      command: how the file is made, for its head.

    Raises:
      ValueError: no TPU compiler here.
    """
    pairs = [(model, name) for model in MODELS for name in MACHINES]
    lines: list[str] = []
    with tqdm(pairs, desc="plan", file=sys.stderr) as bar:
        for model, name in bar:
            bar.set_postfix_str(f"{model} {name}")
            machine = topology.machine(name)
            lines.append(_line(model, machine, *_best(settings, model, machine)))
            jax.clear_caches()
            Path(path).write_text(_page(lines, command, len(pairs)), encoding="utf-8")


def _best(settings: RunSettings, model: str, machine: Machine) -> tuple[Found, RunSettings]:
    given = dataclasses.replace(settings.model, path=model, template=None)
    one = dataclasses.replace(settings, model=given, mesh=WHOLE)
    chosen = next(choices(one, described(one, machine.devices)))
    chosen = dataclasses.replace(chosen, model=given)
    return compiled(chosen, machine), chosen


def _line(model: str, machine: Machine, found: Found, settings: RunSettings) -> str:
    most = found.largest
    parts = list(found.seconds.values())[-1]
    wrong = [said for said in found.verdicts if said != "fits"]
    times = [math.nan] * 4 if wrong else [found.total, *parts.values()]
    cells = [
        model.rpartition("/")[2],
        machine.name,
        mesh_name(found.mesh),
        "–" if most is None else f"{most.peak_gib:.1f}",
        f"{machine.chip.memory_gib:.4g}",
        "–" if most is None else most.name,
        *map(shown, times),
        (wrong[0] if wrong else "fits") + ("" if found.crowded is None else CROWDED),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """# What the paper's run takes

Written by `{}`: every program compiled by the TPU's
compiler for chips that were not there. Peak is of one chip, with all that the run keeps there but
for copies that a probe or ledger takes; seconds are of a rollout step of the last stage by
roofline, which no run goes below. The mesh is the first that a search tries, not the best of it.
No TPU has measured any of this.
"""


def _page(lines: Sequence[str], command: str, wanted: int) -> str:
    columns = (*COLUMNS, *TIMES)
    missing = f"{len(lines)} of {wanted} rows were compiled.\n" if len(lines) < wanted else ""
    rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *lines]
    return "\n".join([HEAD.format(command) + missing, *rows, ""])
