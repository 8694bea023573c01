"""Processes that serve code which may hang, crash or exhaust memory: users' functions, templates.

A run talks to a worker over a private socket. Between them stands a supervisor, which ends the
worker and all processes that it started when the run closes it or ends, by SIGKILL too, even while
the worker never returns to Python.
"""

from ntkrl.workers.process import Worker, WorkerEndedError, WorkerError, WorkerTimeoutError
from ntkrl.workers.service import end_with_parent, ignore_terminations, limit_memory

__all__ = [
    "Worker",
    "WorkerEndedError",
    "WorkerError",
    "WorkerTimeoutError",
    "end_with_parent",
    "ignore_terminations",
    "limit_memory",
]
