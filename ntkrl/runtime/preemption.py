"""Preemption: signals to end, and JAX's preemption sync point for runs of several processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from ntkrl import signals
from ntkrl.runtime.distributed import allgather_object, interrupt

DUPLICATE_SECONDS = 5.0
"""A second signal within this time is treated as a copy of the first; SIGINT never is."""
AGAIN = "interrupt again to stop at once"


class PreemptedError(Exception):
    """The run was stopped and has saved a checkpoint; the same command resumes it.

    signal: that stopped it, or None for a request of the calling program.
    """

    def __init__(self, message: str, number: signal.Signals | None = None):
        super().__init__(message)
        self.signal = number


class PreemptionNotice:
    """Context manager that records a request to stop: SIGTERM, SIGHUP or SIGINT.

    With several processes JAX handles SIGTERM: one to any process is broadcast with a common step
    after which all stop, so that all save the same one; the other signals are passed on as SIGTERM.
    A later signal ends the process at once; within DUPLICATE_SECONDS it counts as the same request,
    since a scheduler and a launcher may both send one. SIGINT from the keyboard is never a copy.

    A program that calls a run goes on after it: there a second SIGINT raises KeyboardInterrupt
    instead.

    received: the signal, None before. requested: by the calling program.
    """

    def __init__(self, ends_process: bool = True) -> None:
        """Start to listen when the context is entered.

        Args:
          ends_process: whether a second signal ends the process at once.
        """
        self.ends_process, self.requested = ends_process, False
        self.received: signal.Signals | None = None
        self.first: signal.Signals | None = None
        self.first_time = 0.0
        self.several = jax.process_count() > 1
        numbers = [n for n in signals.ENDING if not (self.several and n == signal.SIGTERM)]
        self.listener = signals.SignalListener(numbers, self._report, self._handle)

    def __enter__(self) -> PreemptionNotice:
        self.listener.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.listener.__exit__()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal, in the main thread."""
        if self.received is not None and not self.ends_process:
            raise KeyboardInterrupt("stopped without saving")
        if not self.several and self.received is None:
            self.received = signal.Signals(number)

    def _report(self, number: signal.Signals) -> None:
        """Report the first signal and end the process at a later one, in the listener's thread."""
        now = time.monotonic()
        if self.first is not None:
            if not self.ends_process:
                return
            if number == signal.SIGINT:
                interrupt()
            if now - self.first_time > DUPLICATE_SECONDS:
                signals.end_by(number)
            return
        self.first, self.first_time = number, now
        tqdm.write(
            f"{number.name}: finishing the current rollout step, to save and stop; "
            f"{signals.AGAIN if self.ends_process else AGAIN}, without saving",
            file=sys.stderr,
        )
        if self.several and self.received is None:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX's handler

    def stop(self) -> None:
        """Stop the run as a signal does; every process must call this after the same step."""
        self.requested = True

    def signal_name(self) -> str:
        """Return the name of the signal that was received, or of the request."""
        return "request" if self.received is None else self.received.name

    def reached(self, step: int) -> bool:
        """Return whether to save and stop after a step.

        Args:
          step: rollout steps finished; every process must call this after every step.
        """
        if self.several and self.received is None:
            if multihost_utils.reached_preemption_sync_point(step):
                name = None if self.first is None else self.first.name
                names = [name for name in allgather_object("signals", name) if name is not None]
                self.received = signal.Signals[names[0] if names else "SIGTERM"]
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self.requested or self.received is not None
