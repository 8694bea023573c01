"""Several processes, one run: start together, agree on values, and wait for nobody who is gone.

What is private to JAX (its finding of clusters, the client of its coordination service) is reached
for in this file alone. A single process has neither a service nor threads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import clusters, distributed
from tqdm import tqdm

from ntkrl.runtime.config import differences
from ntkrl.runtime.meeting import NobodyCameError, meet
from ntkrl.runtime.watch import OTHERS_FAILED, Limits, Watch, read_limits

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_watches: list[Watch] = []  # at most one, as JAX's own state is one per process


def several() -> bool:
    """Tell whether the environment describes a run of several processes.

    JAX finds Cloud TPU slices, SLURM, Open MPI and indexed jobs of Kubernetes (with the package
    kubernetes) by itself; elsewhere the three VARIABLES describe the run.
    """
    slurm = "SLURM_STEP_NODELIST" in os.environ  # under srun
    counts = ["JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", *(["SLURM_NTASKS"] if slurm else [])]
    given = [os.environ[name] for name in counts if name in os.environ]
    if not given and VARIABLES[0] in os.environ:
        return True
    pod = "TPU_WORKER_HOSTNAMES" in os.environ and "," in os.environ["TPU_WORKER_HOSTNAMES"]
    job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    job = job and importlib.util.find_spec("kubernetes") is not None
    return pod or job or any(count != "1" for count in given)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the other processes of a run for a block, and leave it together.

    Of several processes, one that fails in the block tells the others why and ends with its own
    status; they end with OTHERS_FAILED and that reason, wherever they are. For a single process
    nothing is done.

    Raises:
      ValueError: a description that makes no sense, or a port that is taken.
    """
    if not several():
        yield
        return
    try:
        watch = _start(read_limits())
    except NobodyCameError as error:
        print(f"ntkrl: {error}", file=sys.stderr, flush=True)
        os._exit(OTHERS_FAILED)
    try:
        yield
        watch.agree("the end", None)
        watch.close()
        _watches.clear()
        jax.distributed.shutdown()
    except BaseException as error:
        watch.failed(error)


def is_writer() -> bool:
    """Tell whether this is the process that writes files and talks: the first."""
    return jax.process_index() == 0


def tell(sentence: str) -> None:
    """Print a sentence once, above a progress bar."""
    if is_writer():
        tqdm.write(sentence)


def own_part(count: int) -> slice:
    """Return which of `count` things are this process's to do; each process has a block."""
    own, of = jax.process_index(), jax.process_count()
    return slice(count * own // of, count * (own + 1) // of)


def mark(doing: str | None = None) -> None:
    """Note how far this process is, by which one that is stuck is told from those that wait.

    Args:
      doing: the mark's name, or None for that of the last; every process must pass the same marks
        in the same order.
    """
    for watch in _watches:
        passed, before = watch.position
        watch.position = (passed + 1, before if doing is None else doing)


def saved(rollout_step: int) -> None:
    """Note after which rollout step the run would resume; 0 where it would start again."""
    for watch in _watches:
        watch.saved = rollout_step


def agree(name: str, value: Any = None) -> list[Any]:
    """Give a small JSON value, and get that of every process once all have given theirs.

    Args:
      name: what it is about; every process must ask the same questions in the same order.
      value: of this process.

    Returns:
      The values, by process; for a single process its own.
    """
    return _watches[0].agree(name, value) if _watches else [value]


def check_alike(what: str, given: Mapping[str, Any]) -> None:
    """Check that all processes were given the same values.

    Args:
      what: how they are called in the message.
      given: JSON values of this process.

    Raises:
      ValueError: (in all processes) one was given others; every difference is named.
    """
    first, *others = agree(what, given)
    problems = [
        f"{_watches[0].who(number)}: {'; '.join(changed)}"
        for number, other in enumerate(others, start=1)
        if (changed := differences(first, other))
    ]
    if problems:
        raise ValueError(f"processes differ from process 0 in their {what}. {' '.join(problems)}.")


def _start(limits: Limits) -> Watch:
    """Meet the other processes, start JAX's service, and watch."""
    address, count, own = _described(limits)
    hosts = meet(address, count, own, limits.start)
    jax.distributed.initialize(
        address,
        count,
        own,
        initialization_timeout=int(limits.start) + 1,
        # so that the watch is first to see who is gone
        heartbeat_timeout_seconds=int(10 * limits.silence) + 60,
        shutdown_timeout_seconds=int(limits.silence) + 1,
    )
    watch = Watch(distributed.global_state.client, own, hosts, limits)
    _watches.append(watch)
    return watch


def _described(limits: Limits) -> tuple[str, int, int]:
    """Return the coordinator's address, the number of processes, and the number of this one."""
    given = [os.environ[name] if name in os.environ else None for name in VARIABLES]
    if given == [None] * 3:
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        return detect(None, None, None, None, None, int(limits.start))[:3]
    address, count, own = given
    if None in given or not (count.isdigit() and own.isdigit() and int(own) < int(count)):
        shown = ", ".join(f"{n}={v}" for n, v in zip(VARIABLES, given, strict=True))
        raise ValueError(
            f"{shown}: all three must be given, as HOST:PORT of process 0, the number of "
            "processes, and the number of this one from 0."
        )
    return address, int(count), int(own)
