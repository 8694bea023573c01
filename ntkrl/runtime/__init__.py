"""Machines and files: mesh and shardings, distributed start, checkpoints, config reading."""

from ntkrl.runtime.checkpoint import Best, Checkpoints, DamagedError, NotSavedError
from ntkrl.runtime.config import from_json, joined, read_config, read_section, to_json
from ntkrl.runtime.errors import ErrorCollector
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
    check_shared,
    claim,
    config_identity,
    save_arrays,
    save_text,
)
from ntkrl.runtime.settings import CheckpointSettings

__all__ = [
    "Best",
    "CheckpointSettings",
    "Checkpoints",
    "DamagedError",
    "ErrorCollector",
    "NotSavedError",
    "Notice",
    "PreemptedError",
    "agree",
    "changes",
    "check_alike",
    "check_claim",
    "check_shared",
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
    "read_section",
    "replicated",
    "row_sharding",
    "save_arrays",
    "save_text",
    "saved",
    "several",
    "tell",
    "to_json",
    "together",
]
