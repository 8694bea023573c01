"""Leases: files that name the process which has a lock, and tell whether it is alive."""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Lease:
    """Content of a lease.

    host: name of the machine. machine: its boot and process namespace, in which `pid` counts.
    pid, birth: the process, and its start (clock ticks after boot, where known), since numbers are
    reused. command: that it runs. since, beat: seconds since 1970, of its start and last heartbeat.
    token: random, of this lease.
    """

    host: str
    machine: str
    pid: int
    birth: str
    command: str
    since: str
    beat: str
    token: str

    def describe(self) -> str:
        """Return command, host, process, start and last heartbeat in words."""
        begun = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(self.since)))
        age = max(time.time() - float(self.beat), 0.0)
        return (
            f"`{self.command}` on {self.host}, process {self.pid}, since {begun}, last heartbeat "
            f"{age:.0f} s ago"
        )

    def is_here(self) -> bool:
        """Return whether its process, if it is alive, can be seen from this one."""
        return self.machine == machine()

    def is_alive(self) -> bool:
        """Return whether its process, on this machine, is running."""
        return birth(self.pid) == self.birth


def new_lease(command: str) -> Lease:
    """Return a lease of this process that begins now."""
    now, pid = f"{time.time():.3f}", os.getpid()
    return Lease(
        host=socket.gethostname(),
        machine=machine(),
        pid=pid,
        birth=birth(pid),
        command=command,
        since=now,
        beat=now,
        token=secrets.token_hex(8),
    )


def look(path: Path) -> tuple[object | None, Lease | None]:
    """Return a value that changes with every heartbeat, and the lease if it is readable.

    Both are None where there is no file.
    """
    try:
        with path.open("rb") as file:  # opening it asks a network file system for its newest state
            status, text = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None, None
    lease = None
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # not written yet
        lease = Lease(**json.loads(text))
        float(lease.beat), float(lease.since)
    return (status.st_mtime_ns, text), lease


def machine() -> str:
    """Return an identity of the process numbers here: boot and process namespace, or the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def birth(pid: int) -> str:
    """Return the start of a process in ticks after boot, "?" if unknown, "" if it is not alive."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "?"
    state, *fields = status.rpartition(b")")[2].split()
    return "" if state == b"Z" else fields[18].decode()
