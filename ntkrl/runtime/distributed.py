"""Multi-process runs: rendezvous, exchange of values, and detecting and aborting on lost processes.

Every use of JAX's private modules (cluster detection, the coordination service's client) is in this
file. A single process starts neither a service nor threads.
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import clusters, distributed
from tqdm import tqdm

from ntkrl.runtime.config import differences
from ntkrl.runtime.health import OTHERS_FAILED, HealthMonitor, Limits, read_limits

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
REPLY_SECONDS = 5.0

_monitors: list[HealthMonitor] = []  # at most one, since JAX's distributed state is global too


class StartupTimeoutError(RuntimeError):
    """Some processes did not connect in time; the message lists them."""


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
def distributed_session() -> Iterator[None]:
    """Connect to the other processes for the duration of a block.

    A process that fails in the block reports its error to the others and exits with its own
    status; they exit with OTHERS_FAILED and that error. For a single process nothing is done.

    Raises:
      ValueError: an inconsistent description of the processes, or a port in use.
    """
    if not is_distributed():
        yield
        return
    try:
        monitor = _start(read_limits())
    except StartupTimeoutError as error:
        print(f"ntkrl: {error}", file=sys.stderr, flush=True)
        os._exit(OTHERS_FAILED)
    try:
        yield
        monitor.allgather_object("the end", None)
        monitor.close()
        _monitors.clear()
        jax.distributed.shutdown()
    except BaseException as error:
        monitor.fail(error)


def is_writer() -> bool:
    """Return whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def log(message: str) -> None:
    """Print a message once per run, above any progress bar."""
    if is_writer():
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


def _start(limits: Limits) -> HealthMonitor:
    address, count, index = _describe_run(limits)
    hosts = rendezvous(address, count, index, limits.start)
    jax.distributed.initialize(
        address,
        count,
        index,
        initialization_timeout=int(limits.start) + 1,
        # longer than the monitor's limit, since JAX's check aborts without a message
        heartbeat_timeout_seconds=int(10 * limits.silence) + 60,
        shutdown_timeout_seconds=int(limits.silence) + 1,
    )
    monitor = HealthMonitor(distributed.global_state.client, index, hosts, limits)
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


def rendezvous(address: str, count: int, index: int, seconds: float) -> list[str]:
    """Wait for every process at a port of process 0, which JAX uses afterwards; return host names.

    `jax.distributed.initialize` alone aborts on a timeout without naming the missing processes.

    Args:
      address: "host:port" of process 0, the same in every process.
      count: number of processes.
      index: of this process, in [0, count).
      seconds: time limit.

    Raises:
      StartupTimeoutError: some processes did not connect; reported to every process.
      ValueError: a port in use, duplicate indices, or different counts.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT.")
    if index == 0:
        answer = _serve(int(port), address, count, seconds)
    else:
        answer = _connect((host, int(port)), count, index, seconds)
    if "missing" in answer:
        listed = ", ".join(map(str, answer["missing"]))
        raise StartupTimeoutError(
            f"process {listed} of {count} did not connect to {address} within {seconds:g} s (not "
            "started, or the address is unreachable); restart all of them, or allow more time "
            "with NTKRL_START_TIMEOUT=SECONDS."
        )
    if "problem" in answer:
        raise ValueError(answer["problem"])
    return answer["hosts"]


def _serve(port: int, address: str, count: int, seconds: float) -> dict[str, Any]:
    """Accept the other processes at process 0 and send the outcome to each."""
    hosts, connections = {0: socket.gethostname()}, []
    problem, deadline = None, time.monotonic() + seconds
    with _listen(port, address) as server:
        while len(hosts) < count and problem is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            server.settimeout(remaining)
            try:
                connection, _ = server.accept()
                connection.settimeout(REPLY_SECONDS)
                hello = json.loads(connection.makefile("r").readline())
                other, its_count, host = hello["process"], hello["count"], hello["host"]
            except (OSError, ValueError, TypeError, KeyError):
                continue  # a timeout, or a connection that is not from this run
            connections.append(connection)
            if its_count != count:
                problem = f"process {other} ({host}) expects {its_count} processes, process 0 "
                problem += f"expects {count}"
            elif other in hosts:
                problem = f"two processes have the index {other}, on {hosts[other]} and {host}"
            hosts[other] = host
    missing = sorted(set(range(count)) - set(hosts))
    answer: dict[str, Any] = {"hosts": [hosts[other] for other in sorted(hosts)]}
    if problem is not None:
        answer = {"problem": f"{problem}; see JAX_NUM_PROCESSES and JAX_PROCESS_ID."}
    elif missing:
        answer = {"missing": missing}
    for connection in connections:
        with contextlib.suppress(OSError):  # lost since; the health monitor will report it
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.close()
    return answer


def _listen(port: int, address: str) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ValueError(
            f"process 0 ({socket.gethostname()}) cannot use the port of {address} ({error}); stop "
            "the program that uses it, or set another JAX_COORDINATOR_ADDRESS in all processes."
        ) from error


def _connect(address: tuple[str, int], count: int, index: int, seconds: float) -> dict[str, Any]:
    """Connect to process 0, with retries, and return its answer."""
    hello = {"process": index, "count": count, "host": socket.gethostname()}
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        timeout = min(remaining, REPLY_SECONDS)
        try:
            with socket.create_connection(address, timeout=timeout) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                # process 0 may have started later, and waits just as long
                connection.settimeout(seconds + REPLY_SECONDS)
                answer = json.loads(connection.makefile("r").readline())
                if isinstance(answer, dict):
                    return answer
        except (OSError, ValueError):
            pass  # not listening yet, or another program's port
        time.sleep(min(max(remaining, 0), 0.2))
    return {"missing": [0]}
