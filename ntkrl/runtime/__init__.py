"""Configs, device meshes, multi-process runs, checkpoints and files of a run directory."""

from ntkrl.runtime.checkpoint import (
    Best,
    Checkpoints,
    CheckpointWriteError,
    CorruptCheckpointError,
)
from ntkrl.runtime.compile_cache import enable_compile_cache
from ntkrl.runtime.compile_notices import CompileNotices
from ntkrl.runtime.config import (
    from_json,
    join_config_flag,
    parse_section,
    read_config,
    to_json,
)
from ntkrl.runtime.config_files import find_config, packaged_configs
from ntkrl.runtime.distributed import (
    allgather_object,
    check_consistent,
    distributed_session,
    heartbeat,
    is_distributed,
    is_writer,
    local_slice,
    log,
    record_resume_step,
)
from ntkrl.runtime.errors import ErrorCollector
from ntkrl.runtime.mesh import (
    device_memory,
    fetch,
    make_mesh,
    offload_to_host,
    on_device,
    place,
    place_rows,
    replicated,
    row_sharding,
)
from ntkrl.runtime.preemption import PreemptedError, PreemptionNotice
from ntkrl.runtime.rundir import (
    check_run_dir,
    check_shared,
    claim_run_dir,
    clear_untrained,
    config_changes,
    config_identity,
    is_longer,
    locked,
    stage_lengths,
    unclaimed,
)
from ntkrl.runtime.setting_names import name_problem
from ntkrl.runtime.settings import CheckpointSettings
from ntkrl.runtime.start_record import record_start
