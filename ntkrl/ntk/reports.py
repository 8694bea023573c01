"""Notices of finished layers, sent from inside compiled programs.

Programs of a kernel with `report=True` call the listener after every layer they contract, from a
thread of the runtime. Their number in a computation is `Problem.body_reports` or `trace_reports`.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax

from ntkrl.types import Array

_listeners: list[Callable[[], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Call a function after every layer that a kernel with `report=True` contracts."""
    _listeners.append(listener)
    try:
        yield
    finally:
        jax.effects_barrier()
        _listeners.remove(listener)


def report_layer(value: Array) -> None:
    """Notify the listeners once a value has been computed."""
    jax.debug.callback(_notify, value)


def _notify(value: Array) -> None:
    for listener in _listeners:
        listener()
