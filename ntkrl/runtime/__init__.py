"""Machines and files: mesh and shardings, distributed start, checkpoints, config reading."""

from ntkrl.runtime.checkpoint import Best, Checkpoints, DamagedError, NotSavedError
from ntkrl.runtime.config import from_json, joined, read_config, settings, to_json
from ntkrl.runtime.mesh import (
    fetch,
    make_mesh,
    on_host,
    place,
    place_rows,
    replicated,
    row_sharding,
)
from ntkrl.runtime.notice import Notice, PreemptedError
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
from ntkrl.runtime.rundir import (
    changes,
    check_claim,
    claim,
    config_identity,
    save_arrays,
    save_text,
)

__all__ = [
    "Best",
    "Checkpoints",
    "DamagedError",
    "NotSavedError",
    "Notice",
    "PreemptedError",
    "agree",
    "changes",
    "check_alike",
    "check_claim",
    "claim",
    "config_identity",
    "fetch",
    "from_json",
    "is_writer",
    "joined",
    "make_mesh",
    "mark",
    "on_host",
    "own_part",
    "place",
    "place_rows",
    "read_config",
    "replicated",
    "row_sharding",
    "save_arrays",
    "save_text",
    "saved",
    "settings",
    "several",
    "tell",
    "to_json",
    "together",
]
