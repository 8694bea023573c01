"""Messages about programs whose compilation takes long, by JAX's own events."""

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from jax import monitoring

from ntkrl.runtime.distributed import log

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Recorded as a scalar when JAX begins to compile a program, and as a duration when it ends."""
PATIENCE_SECONDS = 3.0
"""Shorter compilations, and programs read from the cache, are not worth a line."""
REPEAT_SECONDS = 600.0
"""A part of a run has many programs; they are one message, until so long after it."""


class CompileNotices:
    """A context in which compilations that take long are announced while they do.

    parts: by the name of a jitted function, the part of the run that it belongs to.
    other: part of all other functions.
    patience: seconds of compilation before the message.
    """

    def __init__(self, parts: Mapping[str, str], other: str, patience: float = PATIENCE_SECONDS):
        self.parts, self.other, self.patience = parts, other, patience
        self.pending: dict[int, threading.Timer] = {}
        self.announced: dict[str, float] = {}

    def __enter__(self) -> Self:
        monitoring.register_scalar_listener(self._begin)
        monitoring.register_event_duration_secs_listener(self._end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        monitoring.unregister_scalar_listener(self._begin)
        monitoring.unregister_event_duration_listener(self._end)
        for timer in self.pending.values():
            timer.cancel()

    def _begin(self, event: str, value: float, **details: Any) -> None:
        if event == COMPILE_EVENT:
            # the name of the module: jit_NAME or jit(NAME)
            name = str(details.get("fun_name", "")).removeprefix("jit")
            part = self.parts.get(name.removeprefix("_").strip("()"), self.other)
            timer = threading.Timer(self.patience, self._announce, [part])
            timer.daemon = True
            timer.start()
            self.pending[threading.get_ident()] = timer

    def _end(self, event: str, duration_secs: float, **details: Any) -> None:
        if event == COMPILE_EVENT and threading.get_ident() in self.pending:
            self.pending.pop(threading.get_ident()).cancel()

    def _announce(self, part: str) -> None:
        now = time.monotonic()
        if now - self.announced.get(part, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self.announced[part] = now
            log(f"compiling {part}; the first time this takes a minute or more …")
