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


class CompileNotices:
    """A context in which each compilation that takes long is announced, once it does.

    programs: by the name of a jitted function, what it computes, in words.
    patience: seconds before the message.
    """

    def __init__(self, programs: Mapping[str, str], patience: float = PATIENCE_SECONDS):
        self.programs, self.patience = programs, patience
        self.pending: dict[int, _Notice] = {}

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
        for notice in self.pending.values():
            notice.timer.cancel()

    def _begin(self, event: str, value: float, **details: Any) -> None:
        if event == COMPILE_EVENT:
            name = str(details.get("fun_name", "")).removeprefix("jit_")
            name = name.removeprefix("jit(").removesuffix(")")
            notice = _Notice(self.programs.get(name, f"the program {name!r}"), self.patience)
            self.pending[threading.get_ident()] = notice

    def _end(self, event: str, duration_secs: float, **details: Any) -> None:
        if event == COMPILE_EVENT:
            notice = self.pending.pop(threading.get_ident(), None)
            if notice is not None:
                notice.end()


class _Notice:
    """The notice of one compilation."""

    def __init__(self, program: str, patience: float):
        self.program, self.begin, self.shown = program, time.perf_counter(), False
        self.timer = threading.Timer(patience, self._show)
        self.timer.daemon = True
        self.timer.start()

    def _show(self) -> None:
        self.shown = True
        log(f"compiling {self.program}; this may take a minute or more …")

    def end(self) -> None:
        self.timer.cancel()
        if self.shown:
            log(f"compiled {self.program} in {time.perf_counter() - self.begin:.0f} s")
