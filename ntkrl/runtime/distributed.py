"""Multi-process runs: start, exchange of values, and detecting and aborting on lost processes.

Every use of JAX's private modules (cluster detection, the coordination service's client) is in this
file. A single process starts neither a service nor threads.
"""

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed
from tqdm import tqdm

from ntkrl import signals
from ntkrl.messages import notify
from ntkrl.runtime.config import differences
from ntkrl.runtime.health import OTHERS_FAILED, HealthMonitor, Limits, read_limits
from ntkrl.runtime.rendezvous import Hello, StartupTimeoutError, rendezvous
from ntkrl.runtime.start_watch import StartWatch

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
RUN_ID_VARIABLES = ("NTKRL_RUN_ID", "SLURM_JOB_ID")

_monitors: list[HealthMonitor] = []  # at most one, since JAX's distributed state is global too


def is_distributed() -> bool:
    """Return whether the environment describes a run of several processes.

    JAX detects Cloud TPU slices, SLURM, Open MPI and indexed Kubernetes jobs (with the package
    kubernetes); elsewhere the three VARIABLES describe the run.
    """
    slurm = "SLURM_STEP_NODELIST" in os.environ  # under srun
    names = ["JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", *(["SLURM_NTASKS"] if slurm else [])]
    counts = [os.environ[name] for name in names if name in os.environ]
    if not counts and VARIABLES[0] in os.environ:
        return True
    pod = "TPU_WORKER_HOSTNAMES" in os.environ and "," in os.environ["TPU_WORKER_HOSTNAMES"]
    job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    job = job and importlib.util.find_spec("kubernetes") is not None
    return pod or job or any(count != "1" for count in counts)


@contextlib.contextmanager
def distributed_session(run: str = "") -> Iterator[None]:
    """Connect to the other processes for the duration of a block.

    A process that fails in the block reports its error to the others and exits with its own
    status; they exit with OTHERS_FAILED and that error. For a single process nothing is done.

    Args:
      run: command and run directory, by which the processes of a run know each other; the first of
        RUN_ID_VARIABLES that is set is added.

    Raises:
      ValueError: an inconsistent description of the processes, or a port in use.
    """
    if not is_distributed():
        yield
        return
    try:
        monitor = _start(read_limits(), run)
    except StartupTimeoutError as error:
        notify(f"ntkrl: {error}")
        os._exit(OTHERS_FAILED)
    try:
        yield
        monitor.allgather_object("the end", None)
        monitor.close()
        _monitors.clear()
        jax.distributed.shutdown()
    except BaseException as error:
        monitor.fail(error)


def interrupt() -> NoReturn:
    """End this process after a second SIGINT, from any thread, and report it to the others."""
    for monitor in _monitors:
        monitor.fail(KeyboardInterrupt())
    signals.end_at_once()


def is_writer() -> bool:
    """Return whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def log(message: str) -> None:
    """Print a message once per run, above any progress bar."""
    if is_writer():
        with contextlib.suppress(BrokenPipeError):  # nobody reads: the run goes on
            tqdm.write(message)


def local_slice(count: int) -> slice:
    """Return the contiguous slice of `count` items that this process handles."""
    process, processes = jax.process_index(), jax.process_count()
    return slice(count * process // processes, count * (process + 1) // processes)


def heartbeat(activity: str | None = None) -> None:
    """Advance this process's progress marker, which identifies stalled processes.

    Args:
      activity: name of the marker, None to repeat the last; every process must pass the same
        markers in the same order.
    """
    for monitor in _monitors:
        passed, previous = monitor.progress
        monitor.progress = (passed + 1, previous if activity is None else activity)


def record_resume_step(rollout_step: int) -> None:
    """Record the rollout step after which the run would resume; 0 if it would start over."""
    for monitor in _monitors:
        monitor.resume_step = rollout_step


def allgather_object(name: str, value: Any = None) -> list[Any]:
    """Gather a small JSON value from every process, by process index; blocks until all have called.

    Args:
      name: of the exchange; every process must make the same calls in the same order.
      value: of this process.
    """
    return _monitors[0].allgather_object(name, value) if _monitors else [value]


def check_consistent(name: str, values: Mapping[str, Any]) -> None:
    """Check that all processes have the same JSON values.

    Args:
      name: of the values in the message.
      values: of this process.

    Raises:
      ValueError: (in all processes) some differ; the message lists every difference.
    """
    first, *others = allgather_object(name, values)
    problems = [
        f"{_monitors[0].describe(index)}: {'; '.join(changed)}"
        for index, other in enumerate(others, start=1)
        if (changed := differences(first, other))
    ]
    if problems:
        raise ValueError(f"processes differ from process 0 in their {name}. {' '.join(problems)}.")


def _start(limits: Limits, run: str) -> HealthMonitor:
    address, count, index = _describe_run(limits)
    run_ids = [os.environ[name] for name in RUN_ID_VARIABLES if name in os.environ]
    hello = Hello(index, count, socket.gethostname(), " ".join([run, *run_ids[:1]]))
    meeting, links = rendezvous(address, hello, limits.start)
    try:
        with StartWatch(links, meeting.hosts, limits.start):
            jax.distributed.initialize(
                meeting.address,
                count,
                index,
                # both longer than those of this package, since JAX aborts without a message
                initialization_timeout=int(2 * limits.start) + 60,
                heartbeat_timeout_seconds=int(10 * limits.silence) + 60,
                shutdown_timeout_seconds=int(limits.silence) + 1,
                coordinator_bind_address=meeting.bind_address,
            )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"JAX's coordinator cannot start at {meeting.bind_address} ({error}); stop the program "
            "that uses the port, or set another JAX_COORDINATOR_ADDRESS in all processes."
        ) from error
    monitor = HealthMonitor(distributed.global_state.client, index, meeting, limits)
    _monitors.append(monitor)
    return monitor


def _describe_run(limits: Limits) -> tuple[str, int, int]:
    """Return the coordinator's address, the process count and this process's index."""
    values = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not values:
        detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params
        return detect(None, None, None, None, None, int(limits.start))[:3]
    if len(values) == len(VARIABLES):
        address, count, index = values.values()
        if count.isdigit() and index.isdigit() and int(index) < int(count):
            return address, int(count), int(index)
    listed = ", ".join(f"{n}={values[n] if n in values else None}" for n in VARIABLES)
    raise ValueError(
        f"{listed}: all three must be set, as HOST:PORT of process 0, the number of "
        "processes, and the index of this process from 0."
    )
