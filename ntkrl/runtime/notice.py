"""Being asked to leave: SIGTERM, and JAX's preemption notice where a run has several processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

SAME_SECONDS = 5.0
"""In which a second SIGTERM is the first one, sent twice."""


class PreemptedError(Exception):
    """A run saved what it had and left, because it was asked to; the same command goes on."""


class Notice:
    """Listens for a request to leave, from `with` on.

    A single process listens to SIGTERM. Several share one notice: JAX, which owns the signal then,
    passes a SIGTERM of any of them on and names a step after which all leave, so that all save the
    same one. Another SIGTERM later ends the process at once; within some seconds it is the same
    request, which a scheduler and a launcher may both pass on.
    """

    def __init__(self):
        self.told, self.when = False, 0.0
        self.before: Any = None

    def __enter__(self) -> Notice:
        # outside the main thread, where Python lets nobody listen, a SIGTERM ends the process
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *rest: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _tell(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.told and now - self.when > SAME_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.told, self.when = True, self.when if self.told else now

    def reached(self, step: int) -> bool:
        """Return whether to save and leave after a step.

        Args:
          step: rollout steps finished; every process asks after every one.
        """
        if jax.process_count() > 1 and not self.told:
            self.told = multihost_utils.reached_preemption_sync_point(step)
            if self.told and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self.told
