"""Signals that are heard at once, even while the main thread compiles or waits for a device.

Python runs a signal's handler in the main thread between two bytecodes: minutes late where that
thread is in a long call of a library. Python's C handler, however, writes the number of every
signal to a descriptor at once; a thread that reads it can report the signal, or end the process.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

from ntkrl import run_lock
from ntkrl.messages import notify

INTERRUPTED = 130
"""Exit status of a command that SIGINT ended."""
QUIET_SECONDS = 1.0
"""Time for an interrupted command to end by itself before it reports that it has not yet."""
GRACE_SECONDS = 10.0
"""Time for a command that is told to end to leave its contexts."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = "press Ctrl-C again to end at once"


class StopRequest(BaseException):
    """SIGTERM or SIGHUP, raised in the main thread of a command that has nothing to save."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


class SignalListener:
    """Context manager that passes signals to a function, in a thread of its own.

    Signals that are ignored stay so (`nohup`, background jobs of a script). Python allows handlers
    in the main thread alone: in another thread the context does nothing.
    """

    def __init__(
        self,
        numbers: Iterable[signal.Signals],
        receive: Callable[[signal.Signals], None],
        handle: Callable[[int, FrameType | None], Any],
    ):
        """Bind both functions.

        Args:
          numbers: the signals.
          receive: called in the thread, at once.
          handle: Python's handler, called in the main thread as soon as that is possible.
        """
        self.numbers, self.receive, self.handle = tuple(numbers), receive, handle
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalListener":
        if threading.current_thread() is not threading.main_thread():
            return self
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.previous_descriptor = signal.set_wakeup_fd(
            self.writer.fileno(), warn_on_full_buffer=False
        )
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()
        for number in self.numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
        signal.set_wakeup_fd(self.previous_descriptor)
        self.writer.close()
        if self.thread is not threading.current_thread():
            self.thread.join(QUIET_SECONDS)
        self.reader.close()

    def _listen(self) -> None:
        while True:
            try:
                numbers = self.reader.recv(64)
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                if number in self.numbers:
                    self.receive(signal.Signals(number))


@contextlib.contextmanager
def command_signals() -> Iterator[None]:
    """Let the signals that end a command do so in order, and in any case within seconds.

    SIGINT raises KeyboardInterrupt; a second one ends the process at once. SIGTERM and SIGHUP raise
    StopRequest, and end the process GRACE_SECONDS later.
    """
    ended, interrupts = threading.Event(), []

    def receive(number: signal.Signals) -> None:
        if number != signal.SIGINT:
            threading.Thread(target=enforce, args=(number,), daemon=True).start()
            return
        interrupts.append(number)
        if len(interrupts) > 1:
            end_at_once()
        threading.Thread(target=remind, daemon=True).start()

    def remind() -> None:
        if not ended.wait(QUIET_SECONDS):
            notify(f"\nfinishing the current computation; {AGAIN}")

    def enforce(number: signal.Signals) -> None:
        if not ended.wait(GRACE_SECONDS):
            end_by(number)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise StopRequest(number)

    try:
        with SignalListener(ENDING, receive, handle):
            yield
    finally:
        ended.set()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Install Python's handler of SIGTERM again, which JAX replaces in runs of several processes.

    JAX's would only note the signal, for a run that saves.
    """
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    yield


def end_at_once() -> NoReturn:
    """End the process after a second SIGINT."""
    run_lock.release_all()
    notify("\nended at once")
    os._exit(INTERRUPTED)


def end_by(number: signal.Signals) -> None:
    """End the process by a signal's default action, from any thread."""
    run_lock.release_all()
    ctypes.CDLL(None).signal(int(number), None)  # SIG_DFL
    os.kill(os.getpid(), number)
    time.sleep(GRACE_SECONDS)  # until it is delivered
