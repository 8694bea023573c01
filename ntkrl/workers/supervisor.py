"""Supervisor of a worker: `python -m ntkrl.workers.supervisor SERVICE CHANNEL LIFELINE`.

It forks the worker, waits until the worker ends or the run closes the lifeline, kills the worker's
process group and everything that came from it (on Linux in other sessions too), and ends as the
worker did. It executes no code of users, so that nothing keeps it from doing so.
"""

import contextlib
import ctypes
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time

from ntkrl.workers.service import end_with_parent, heed_terminations, ignore_terminations, serve

CHILD_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER
ENDING_SECONDS = 5.0
PARENT_MILLISECONDS = 1000
"""Milliseconds between two looks at the run, should a fork of it hold the lifeline."""


def main(service: str, channel: int, lifeline: int) -> None:
    """Supervise a worker until it or the run ends; return in the worker, after its last answer.

    Args:
      service: module of the worker's service.
      channel, lifeline: descriptors of sockets; the run has the other ends.
    """
    os.dup2(2, 1)  # what users' code prints is no output of the run
    for descriptor in (channel, lifeline):
        os.set_inheritable(descriptor, False)
    ignore_terminations()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1)
    waking, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    run, supervisor = os.getppid(), os.getpid()
    worker = os.fork()
    with contextlib.suppress(OSError):  # both do, so that it has its group at once
        os.setpgid(worker, worker)
    if worker:
        os.close(channel)
        _finish(worker, _wait(worker, (lifeline, waking), run))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in (lifeline, waking, wakes):
        os.close(descriptor)
    end_with_parent(supervisor)
    heed_terminations()
    open_service = importlib.import_module(service).open_service
    with socket.socket(fileno=channel) as connection:
        serve(connection, open_service)


def _wait(worker: int, descriptors: tuple[int, int], run: int) -> int | None:
    """Return the worker's wait status, or None once the run has closed the lifeline or ended."""
    lifeline, waking = descriptors
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    while True:
        ready = dict(poller.poll(PARENT_MILLISECONDS))
        if lifeline in ready or os.getppid() != run:
            return None
        if waking in ready:
            os.read(waking, 1 << 10)
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # others: orphans of users' code
                if ended[0] == worker:
                    return ended[1]


def _finish(worker: int, status: int | None) -> None:
    """End all processes that came from the worker, then this one as the worker ended."""
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline:
        for child in _children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.002)
        except ChildProcessError:  # none is left
            break
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _children() -> list[int]:
    """Return the children of this process, of which orphans of the worker's become ones."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
