"""Machines and files: mesh and shardings, distributed start, checkpoints, config reading."""

from ntkrl.runtime.checkpoint import Best, Checkpoints, DamagedError, NotSavedError
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
from ntkrl.runtime.notice import Notice, PreemptedError
from ntkrl.runtime.rundir import changes, check_claim, claim, config_identity, save_arrays

__all__ = [
    "Best",
    "Checkpoints",
    "DamagedError",
    "NotSavedError",
    "Notice",
    "PreemptedError",
    "changes",
    "check_claim",
    "claim",
    "config_identity",
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
