"""Locks of directories: one command at a time writes into a run directory.

A lock has two forms, and a start needs both. `flock` ends with its process, by SIGKILL too, and
excludes the processes of a machine, or of all machines where the file system forwards it. Network
file systems and object stores may lack it or grant it to every host; there the lease decides: a
file that names host, process and start, whose heartbeat is rewritten every few seconds.

Leases are numbered. A start creates the number after the highest, exclusively, and has the lock if
every other lease in the directory is one whose end it had seen; otherwise it withdraws and looks
again. A lease has ended if its process is gone, or, on another host, if its heartbeat stands still
for NTKRL_LEASE_TIMEOUT seconds. Neither form imports JAX.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ntkrl.lease import Lease, look, new_lease
from ntkrl.messages import PLACE_ERRORS, notify, unwritable

SILENCE_SECONDS = 60.0
"""Time without a heartbeat after which a lease of another host has ended; NTKRL_LEASE_TIMEOUT."""
BEATS = 12
"""Heartbeats in that time."""
NAME_SECONDS = 2.0
"""Time for a process with the flock to write its lease, which names it to those that it refuses."""
OPEN_TRIES = 20
LOST = 2
"""Exit status of a command whose lease another start took over."""
NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}

_locks: list["DirectoryLock"] = []


class InUseError(ValueError):
    """Another process has the lock; the message names it."""


class DirectoryLock:
    """Context manager that has the lock of a directory, or raises InUseError.

    The directory is created; on release, it is removed again if it was and is empty.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        command: str,
        name: str = "run",
        log: Callable[[str], None] | None = None,
    ):
        """Name the lock; entering it takes it.

        Args:
          directory: that the command writes into.
          command: in words, for those that are refused.
          name: of the lock; locks of other names in the directory are independent.
          log: called with a line before a wait and on a takeover; None prints to stderr.

        Raises:
          ValueError: NTKRL_LEASE_TIMEOUT is not a positive number.
        """
        self.limit = _read_limit()
        self.directory, self.name = Path(directory), name
        self.log = _notify if log is None else log
        self.lease = new_lease(command)
        self.lock_path = self.directory / f".{name}.lock"
        self.path: Path | None = None
        self.descriptor: int | None = None
        self.created: list[Path] = []
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "DirectoryLock":
        """Take the lock.

        Raises:
          InUseError: another process has it.
          ValueError: the directory is a file, or is in a place that cannot be written.
          OSError: it cannot be created or written for another reason, such as a full disk.
        """
        try:
            self._take_flock()
            while not self._take_lease():
                time.sleep(random.uniform(0.0, 0.05))
        except BaseException as error:
            self.release()
            if isinstance(error, OSError) and error.errno in PLACE_ERRORS:
                message = unwritable(self.directory, error, "--config.run_dir")
                raise ValueError(message) from error
            raise
        _locks.append(self)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back; a second call, or one in a forked process, does nothing."""
        if self.lease.pid != os.getpid():
            return
        self.released.set()
        if self in _locks:
            _locks.remove(self)
            if self.thread is not threading.current_thread():
                self.thread.join(self.limit / BEATS)
        with contextlib.suppress(OSError):
            if self.path is not None and self._is_ours(self.path):
                self.path.unlink()
                self.lock_path.unlink()
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.path = self.descriptor = None
        with contextlib.suppress(OSError):  # not empty
            while self.created:
                self.created.pop().rmdir()

    def _take_flock(self) -> None:
        """Open and lock the lock file, which a release may remove in between."""
        for _ in range(OPEN_TRIES):
            try:
                self._make_directory()
                descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                self._refuse(self._await_lease())
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    os.close(descriptor)
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self.lock_path.stat()):
                    self.descriptor = descriptor
                    return
            os.close(descriptor)
        removed = "no file can be made there, or it was removed each time"
        raise FileNotFoundError(errno.ENOENT, removed, str(self.lock_path))

    def _make_directory(self) -> None:
        missing, directory = [], self.directory
        while not directory.exists():
            missing.append(directory)
            directory = directory.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
        self.created += [path for path in reversed(missing) if path not in self.created]

    def _take_lease(self) -> bool:
        """Create a lease; return False where another start was faster, so that it must look again.

        Raises:
          InUseError: the process of another lease is alive.
        """
        leases = self._leases()
        ended = {number: self._await_end(path) for number, path in leases.items()}
        number = max(leases, default=0) + 1
        path = self._lease_path(number)
        try:
            with path.open("xb") as file:
                self.path = path
                file.write(self._text())
                file.flush()
                os.fsync(file.fileno())  # one cut short by a power cut would have to be watched
        except FileExistsError:
            return False
        except FileNotFoundError:  # a release removed the directory
            with contextlib.suppress(FileNotFoundError):
                self._make_directory()
            return False
        except OSError as error:
            if error.errno != errno.ESTALE:  # an object store's word for: another wrote it first
                raise
            self.path = None
            return False
        _, lease = look(path)
        others = self._leases().keys() - ended.keys() - {number}
        if others or lease is None or lease.token != self.lease.token:
            path.unlink(missing_ok=True)
            self.path = None
            return False
        for other, reason in ended.items():
            leases[other].unlink(missing_ok=True)
            if reason is not None:
                self.log(f"taking over {self.directory}: {reason}")
        return True

    def _is_ours(self, path: Path) -> bool:
        """Return whether a lease is this one, or an empty file left by a write that failed."""
        sign, lease = look(path)
        return sign is not None and (lease is None or lease.token == self.lease.token)

    def _await_end(self, path: Path) -> str | None:
        """Return the reason why a lease has ended, None if it was given back.

        A lease of another host is watched, since clocks differ: one that beats is alive.

        Raises:
          InUseError: its process is alive.
        """
        limit, begun, logged = self.limit, time.monotonic(), False
        sign, lease = look(path)
        while True:
            before, unread = sign, lease is None
            sign, lease = look(path)
            if sign is None:
                return None
            if lease is not None and lease.is_here():
                if lease.is_alive():
                    self._refuse(lease)
                return f"the process of {lease.describe()}, is gone"
            if sign != before and not unread:
                self._refuse(lease)
            watched, age = time.monotonic() - begun, 0.0
            if lease is not None:
                age = time.time() - float(lease.beat)
            if watched >= limit or (age >= limit and watched >= 2 * limit / BEATS):
                who = "an unreadable lease" if lease is None else lease.describe()
                return f"{who}, is silent"
            if not logged and (lease is not None or watched > NAME_SECONDS):
                logged = True  # an unreadable lease may be one that is just being written
                who = "a command that left no name" if lease is None else lease.describe()
                self.log(
                    f"{self.directory} was in use by {who}; watching for up to "
                    f"{limit:g} s whether that is alive (NTKRL_LEASE_TIMEOUT)"
                )
            time.sleep(limit / BEATS / 4)

    def _await_lease(self) -> Lease | None:
        """Return the newest lease once it is written, None if it is not in time."""
        deadline = time.monotonic() + NAME_SECONDS
        while time.monotonic() < deadline:
            leases = self._leases()
            lease = look(leases[max(leases)])[1] if leases else None
            if lease is not None:
                return lease
            time.sleep(0.02)
        return None

    def _refuse(self, lease: Lease | None) -> NoReturn:
        holder = "another process, which has not named itself"
        if lease is not None:
            holder = lease.describe()
        raise InUseError(
            f"{self.directory} is in use by {holder}; wait for its end, stop it, or write to "
            "another directory (--config.run_dir)."
        )

    def _leases(self) -> dict[int, Path]:
        """Return the files of leases by number."""
        prefix = f".{self.name}.lease."
        with contextlib.suppress(FileNotFoundError):
            numbers = [
                int(name.removeprefix(prefix))
                for name in os.listdir(self.directory)
                if name.startswith(prefix) and name.removeprefix(prefix).isdigit()
            ]
            return {number: self._lease_path(number) for number in sorted(numbers)}
        return {}

    def _lease_path(self, number: int) -> Path:
        return self.directory / f".{self.name}.lease.{number}"

    def _text(self) -> bytes:
        """Return the lease as of now; its length does not change, so that it is rewritten."""
        values = dataclasses.asdict(self.lease) | {"beat": f"{time.time():.3f}"}
        return json.dumps(values).encode() + b"\n"

    def _beat(self) -> None:
        """Rewrite the heartbeat; end the process when the lease is another's."""
        misses, path = 0, self.path
        assert path is not None  # as while the lock is held
        while not self.released.wait(self.limit / BEATS):
            try:
                with path.open("r+b", buffering=0) as file:
                    current = file.read()
                    if self.lease.token.encode() in current:
                        file.seek(0)
                        file.write(self._text())  # in place: needs no room on a full disk
            except FileNotFoundError:
                current = b""
            except OSError:
                continue  # a server that does not answer; the next beat may reach it
            taken = self.lease.token.encode() not in current or path != self._newest()
            misses = misses + 1 if taken else 0
            if misses > 1 and not self.released.is_set():
                self._end_process()

    def _newest(self) -> Path | None:
        try:
            leases = self._leases()
        except OSError:
            return self.path
        return leases[max(leases)] if leases else None

    def _end_process(self) -> NoReturn:
        notify(
            f"\nntkrl: the lease of {self.directory} is gone: another start took it over after "
            f"{self.limit:g} s without a heartbeat, or the directory was removed. This process "
            "ends, since two must not write there."
        )
        os._exit(LOST)


def release_all() -> None:
    """Give back all locks of this process, before an exit that runs no context's end."""
    for lock in list(_locks):
        lock.release()


def _read_limit() -> float:
    """Return NTKRL_LEASE_TIMEOUT (seconds).

    Raises:
      ValueError: it is not a positive number.
    """
    text = os.environ.get("NTKRL_LEASE_TIMEOUT", str(SILENCE_SECONDS))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ValueError(f"NTKRL_LEASE_TIMEOUT={text} must be a positive number of seconds.")


def _notify(message: str) -> None:
    notify(f"ntkrl: {message}")
