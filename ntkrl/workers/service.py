"""The worker's side: answers in order, limits, and signals that it leaves to the run."""

import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

Respond = Callable[[bytes], bytes]
OpenService = Callable[[bytes], tuple[bytes, Respond]]
IDENTITY_BYTES = 16
HEADER = struct.Struct(f"={IDENTITY_BYTES}sQ")
"""Before each request and answer: what identifies the request, and the bytes that follow."""
PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG
TERMINATIONS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which a scheduler or a user ends all processes of a job."""


def serve(channel: socket.socket, open_service: OpenService) -> None:
    """Answer requests until the run closes the socket.

    Args:
      channel: blocking.
      open_service: of the service's module, see `Worker`.
    """
    process, respond = os.getpid(), None
    while (request := _receive(channel)) is not None:
        identity, content = request
        if respond is None:
            answer, respond = open_service(content)
        else:
            answer = respond(content)
        if os.getpid() != process:  # a fork that the code returned from, like its parent
            os._exit(0)
        channel.sendall(HEADER.pack(identity, len(answer)) + answer)


def ignore_terminations() -> None:
    """Leave signals that end all processes of a job to the run, which saves and ends this one."""
    for number in TERMINATIONS:
        signal.signal(number, signal.SIG_IGN)


def heed_terminations() -> None:
    """Undo `ignore_terminations`, which a fork inherits."""
    for number in TERMINATIONS:
        interrupts = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if interrupts else signal.SIG_DFL)


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when the thread that forked it ends, even if it never returns.

    Args:
      parent: its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(0)


def limit_memory(size: int) -> None:
    """Limit the address space of this process, and later children, to `size` bytes beyond now."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            present = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (present + size, limits[1]))


def _receive(channel: socket.socket) -> tuple[bytes, bytes] | None:
    """Return a request's identity and content; None once the run has closed the socket."""
    header = _read(channel, HEADER.size)
    if header is None:
        return None
    identity, length = HEADER.unpack(header)
    content = _read(channel, length)
    return None if content is None else (identity, bytes(content))


def _read(channel: socket.socket, size: int) -> bytearray | None:
    content = bytearray(size)
    view, count = memoryview(content), 0
    while count < size:
        received = channel.recv_into(view[count:])
        if not received:
            return None
        count += received
    return content
