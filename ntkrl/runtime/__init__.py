"""Machines and files: mesh and shardings, distributed start, checkpoints, config reading."""

from ntkrl.runtime.checkpoint import Checkpoints
from ntkrl.runtime.config import from_json, read_config, settings, to_json
from ntkrl.runtime.mesh import (
    fetch,
    make_mesh,
    on_host,
    place_rows,
    replicated,
    row_sharding,
    start_processes,
)
from ntkrl.runtime.rundir import check_claim, claim, save_arrays

__all__ = [
    "Checkpoints",
    "check_claim",
    "claim",
    "fetch",
    "from_json",
    "make_mesh",
    "on_host",
    "place_rows",
    "read_config",
    "replicated",
    "row_sharding",
    "save_arrays",
    "settings",
    "start_processes",
    "to_json",
]
