"""Watch of the other processes while JAX connects them.

JAX aborts with a native stack trace, after its time limit, when a process is lost in between. The
connections of the rendezvous stay open meanwhile: the end of one is noticed at once, and told.
"""

import os
import select
import socket
import threading
import time
from typing import NoReturn

from ntkrl.messages import notify
from ntkrl.runtime.health import OTHERS_FAILED

CONNECTED = b"connected\n"
"""Sent by a process that no longer needs to be watched."""
TEXT_BYTES = 4096


class StartWatch:
    """Context manager that ends this process if another is lost before the context ends."""

    def __init__(self, links: dict[int, socket.socket], hosts: list[str], seconds: float):
        """Bind the connections.

        Args:
          links: to other processes by index: of process 0 to all, of the others to process 0.
          hosts: of all processes.
          seconds: time limit of the context.
        """
        self.links, self.hosts, self.seconds = links, hosts, seconds
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="start", daemon=True)

    def __enter__(self) -> "StartWatch":
        self.thread.start()
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        self.stopped.set()
        self.thread.join()
        for link in self.links.values():
            if kind is None:
                _send(link, CONNECTED)
            link.close()

    def _watch(self) -> None:
        watched, deadline = dict(self.links), time.monotonic() + self.seconds
        while watched and not self.stopped.is_set():
            readable, _, _ = select.select(list(watched.values()), [], [], 0.1)
            for index, link in list(watched.items()):
                if link not in readable:
                    continue
                text = _receive(link)
                if text == CONNECTED:
                    del watched[index]
                elif not self.stopped.is_set():
                    ended = f"process {index} ({self.hosts[index]}) ended while the processes "
                    self._end(text.decode(errors="replace") or f"{ended}connected; see its output.")
            if time.monotonic() > deadline:
                self._end(
                    f"the processes did not connect within {self.seconds:g} s; restart all of "
                    "them, or allow more time with NTKRL_START_TIMEOUT=SECONDS."
                )

    def _end(self, message: str) -> NoReturn:
        for link in self.links.values():
            _send(link, message.encode())
        notify(f"\nntkrl: {message}")
        os._exit(OTHERS_FAILED)


def _send(link: socket.socket, text: bytes) -> None:
    try:
        link.settimeout(1.0)
        link.sendall(text)
    except OSError:  # it has ended
        pass


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(TEXT_BYTES)
    except OSError:
        return b""
