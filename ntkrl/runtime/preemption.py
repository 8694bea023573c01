"""Preemption: SIGTERM, and JAX's preemption sync point for runs of several processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

DUPLICATE_SECONDS = 5.0
"""A second SIGTERM within this time is treated as a copy of the first."""


class PreemptedError(Exception):
    """The run was preempted and has saved a checkpoint; the same command resumes it."""


class PreemptionNotice:
    """Context manager that records a request to stop.

    A single process handles SIGTERM. With several processes JAX handles the signal: a SIGTERM to
    any of them is broadcast with a common step after which all stop, so that all save the same
    one. A later SIGTERM ends the process at once; within DUPLICATE_SECONDS it counts as the same
    request, since a scheduler and a launcher may both send one.
    """

    def __init__(self):
        self.received, self.received_at = False, 0.0
        self.previous_handler: Any = None

    def __enter__(self) -> PreemptionNotice:
        # Python allows handlers in the main thread only; elsewhere SIGTERM keeps its default
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.previous_handler = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.previous_handler is not None:
            signal.signal(signal.SIGTERM, self.previous_handler)

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and now - self.received_at > DUPLICATE_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.received, self.received_at = True, self.received_at if self.received else now

    def reached(self, step: int) -> bool:
        """Return whether to save and stop after a step.

        Args:
          step: rollout steps finished; every process must call this after every step.
        """
        if jax.process_count() > 1 and not self.received:
            self.received = multihost_utils.reached_preemption_sync_point(step)
            if self.received and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self.received
