"""How the processes of a run find each other: at a port of the first, before JAX uses it.

JAX's own start can say that somebody is missing, but not who, and ends the process by an abort.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

ANSWER_SECONDS = 5.0  # for a line that is on its way


class NobodyCameError(RuntimeError):
    """Processes that did not come in time, told in full."""


def meet(address: str, count: int, own: int, seconds: float) -> list[str]:
    """Wait until every process of a run has come.

    Args:
      address: "host:port" of process 0, as every process knows it.
      count: number of processes.
      own: number of this process, in [0, count).
      seconds: to wait.

    Returns:
      The host name of each process.

    Raises:
      NobodyCameError: some did not come; all are told which.
      ValueError: a port that is taken, numbers given twice, or counts that differ.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT.")
    if own == 0:
        found = _receive(int(port), address, count, seconds)
    else:
        found = _visit((host, int(port)), count, own, seconds)
    if "missing" in found:
        named = ", ".join(map(str, found["missing"]))
        raise NobodyCameError(
            f"process {named} of {count} did not come to {address} within {seconds:g} s (not "
            "started, or no way to that address); start all of them again, or give them more time "
            "by NTKRL_START_TIMEOUT=SECONDS."
        )
    if "problem" in found:
        raise ValueError(found["problem"])
    return found["hosts"]


def _receive(port: int, address: str, count: int, seconds: float) -> dict[str, Any]:
    """Be process 0: let the others in, and tell all of them how it went."""
    hosts, connections = {0: socket.gethostname()}, []
    problem, deadline = None, time.monotonic() + seconds
    with _listening(port, address) as server:
        while len(hosts) < count and problem is None:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(ANSWER_SECONDS)
                told = json.loads(connection.makefile("r").readline())
                number, of, host = told["process"], told["of"], told["host"]
            except (OSError, ValueError, TypeError, KeyError):
                continue  # nobody came, or nobody of ours
            connections.append(connection)
            if of != count:
                problem = f"process {number} ({host}) is one of {of}, process 0 one of {count}"
            elif number in hosts:
                problem = f"two processes have the number {number}, on {hosts[number]} and {host}"
            hosts[number] = host
    missing = sorted(set(range(count)) - set(hosts))
    answer: dict[str, Any] = {"hosts": [hosts[number] for number in sorted(hosts)]}
    if problem is not None:
        answer = {"problem": f"{problem}; see JAX_NUM_PROCESSES and JAX_PROCESS_ID."}
    elif missing:
        answer = {"missing": missing}
    for connection in connections:
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.close()
        except OSError:
            pass  # gone since; the watch over the run will tell
    return answer


def _listening(port: int, address: str) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ValueError(
            f"process 0 ({socket.gethostname()}) cannot use the port of {address} ({error}); end "
            "the program that has it, or give all processes another JAX_COORDINATOR_ADDRESS."
        ) from error


def _visit(address: tuple[str, int], count: int, own: int, seconds: float) -> dict[str, Any]:
    """Be another process: come to process 0, again until it is there, and hear how it went."""
    told = {"process": own, "of": count, "host": socket.gethostname()}
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, ANSWER_SECONDS)) as connection:
                connection.sendall(json.dumps(told).encode() + b"\n")
                # process 0 may have started later, and waits as long as this one
                connection.settimeout(seconds + ANSWER_SECONDS)
                found = json.loads(connection.makefile("r").readline())
                if isinstance(found, dict):
                    return found
        except (OSError, ValueError):
            pass  # not there yet, or another program's port
        time.sleep(min(max(left, 0), 0.2))
    return {"missing": [0]}
