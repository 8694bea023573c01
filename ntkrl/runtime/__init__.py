"""Machines and files: mesh and shardings, distributed start, checkpoints, config reading."""

from ntkrl.runtime.checkpoint import Checkpoints
from ntkrl.runtime.config import from_json, read_config, settings, to_json
from ntkrl.runtime.mesh import fetch, make_mesh, place, place_rows, replicated, row_parts
from ntkrl.runtime.processes import (
    agree,
    check_alike,
    is_writer,
    mark,
    own_part,
    saved,
    several,
    tell,
    together,
)
from ntkrl.runtime.rundir import check_claim, claim, save_arrays

__all__ = [
    "Checkpoints",
    "agree",
    "check_alike",
    "check_claim",
    "claim",
    "fetch",
    "from_json",
    "is_writer",
    "make_mesh",
    "mark",
    "own_part",
    "place",
    "place_rows",
    "read_config",
    "replicated",
    "row_parts",
    "save_arrays",
    "saved",
    "settings",
    "several",
    "tell",
    "to_json",
    "together",
]
