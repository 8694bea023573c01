"""Health monitor of a multi-process run.

One daemon thread publishes this process's heartbeat and progress in the key-value store of JAX's
coordination service and reads those of the others; a second one checks them. Both run while the
main thread hangs in a collective that a lost process will never join, and then end this process.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from ntkrl import durable_files, messages, run_lock, signals
from ntkrl.runtime.rendezvous import Meeting

MISTAKE, FAILED, OTHERS_FAILED, INTERRUPTED = 2, 1, 70, 130
"""Exit statuses; see `ntkrl.main`."""

STATUS = re.compile(
    r"\b(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE"
    r"|UNKNOWN): "
)
RPC_SECONDS = 5.0  # for the messages sent before exiting
GET_MILLISECONDS = 10**9  # no limit here: the monitor detects lost processes


@dataclasses.dataclass(frozen=True)
class Limits:
    """Timeouts in seconds.

    start: for all processes to connect. silence: without a heartbeat. stall: without progress of
    some processes while the others wait; compiling and writing a large model take long.
    """

    start: float = 300.0
    silence: float = 60.0
    stall: float = 1800.0

    @property
    def period(self) -> float:
        """Seconds between two heartbeats."""
        return min(max(self.silence / 10, 0.1), 2.0)

    @property
    def grace(self) -> float:
        """Seconds for a process to raise by itself an error that another has reported."""
        return min(self.silence / 5, 2.0)


def read_limits() -> Limits:
    """Read NTKRL_START_TIMEOUT, NTKRL_SILENCE_TIMEOUT and NTKRL_STALL_TIMEOUT (seconds).

    Raises:
      ValueError: a value that is not a positive number.
    """
    limits, problems = {}, []
    for field in dataclasses.fields(Limits):
        name = f"NTKRL_{field.name.upper()}_TIMEOUT"
        if name not in os.environ:
            continue
        try:
            limits[field.name] = float(os.environ[name])
        except ValueError:
            limits[field.name] = math.nan
        if not 0 < limits[field.name] < math.inf:
            problems.append(f"{name}={os.environ[name]} must be a positive number of seconds")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return Limits(**limits)


@dataclasses.dataclass
class ProgressRecord:
    """Last known state of a process.

    beat: number of its last heartbeat, received at `beat_time`. passed: progress markers passed,
    last changed at `progress_time`. activity: name of the last marker.
    """

    beat_time: float
    progress_time: float
    beat: int = -1
    passed: int = 0
    activity: str = "the start"


class HealthMonitor:
    """Detects lost and stalled processes and ends this one when there are any.

    progress: number of progress markers this process has passed, and the last one's name.
    resume_step: rollout step after which the run resumes, 0 for none; None if it cannot resume.
    """

    def __init__(self, client: Any, index: int, meeting: Meeting, limits: Limits):
        """Start both threads; `client` is of JAX's coordination service."""
        self.client, self.index, self.limits = client, index, limits
        self.hosts, self.keys = meeting.hosts, f"ntkrl/{meeting.session}"
        self.progress: tuple[int, str] = (0, ProgressRecord.activity)
        self.resume_step: int | None = None
        self.verdict: str | None = None
        self.exchanges = itertools.count()
        self.ending, self.stopped = threading.Lock(), threading.Event()
        now = time.monotonic()
        self.service_time = now
        self.records = {number: ProgressRecord(now, now) for number in range(len(self.hosts))}
        # JAX's client aborts the process, without a message, as soon as the coordinator is gone
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
        ctypes.CDLL(None).signal(signal.SIGABRT, self.handler)
        for work in (self._publish, self._check):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def describe(self, index: int) -> str:
        """Return "process 1 (host)"."""
        return f"process {index} ({self.hosts[index]})"

    def allgather_object(self, name: str, value: Any) -> list[Any]:
        """Implement `runtime.allgather_object`."""
        self.progress = (self.progress[0] + 1, f"exchange of {name}")
        number = next(self.exchanges)
        key = f"{self.keys}/exchange/{number}"
        self.client.key_value_set(f"{key}/{self.index}", json.dumps([name, value]))
        values = []
        for other in range(len(self.hosts)):
            message = self.client.blocking_key_value_get(f"{key}/{other}", GET_MILLISECONDS)
            other_name, other_value = json.loads(message)
            if other_name != name:
                raise RuntimeError(
                    f"{self.describe(other)} exchanges {other_name}, {self.describe(self.index)} "
                    f"{name}: the processes diverged; this is a bug in ntkrl."
                )
            values.append(other_value)
        if number > 0:  # all processes have read the previous exchange before joining this one
            self.client.key_value_delete(f"{self.keys}/exchange/{number - 1}/{self.index}")
        return values

    def fail(self, error: BaseException) -> NoReturn:
        """Report this process's error to the others and exit."""
        status, message = FAILED, f"{type(error).__name__}: {error}"
        from_jax = STATUS.search(message) is not None  # may be a ValueError too
        if from_jax:
            # a collective fails when a process is lost: let the checking thread name it and exit
            time.sleep(self.limits.silence + 5 * self.limits.period + self.limits.grace)
        if isinstance(error, KeyboardInterrupt):
            status, message = INTERRUPTED, "interrupted"
        elif isinstance(error, signals.StopRequest):
            status, message = 128 + error.signal, f"stopped by {error.signal.name}"
        elif (full := durable_files.full_disk(error)) is not None:
            status, message = MISTAKE, full
        elif isinstance(error, ValueError | OSError) and not from_jax:
            status, message = MISTAKE, str(error)
        if status == FAILED or "NTKRL_TRACEBACK" in os.environ:
            messages.notify("".join(traceback.format_exception(error)))
        self._exit(status, message, f"{self.describe(self.index)} failed: {message}")

    def close(self) -> None:
        """Stop monitoring, before all processes end normally."""
        self.stopped.set()

    def _exit(self, status: int, message: str, verdict: str | None = None) -> NoReturn:
        """Print the message, publish the verdict and end the process at once."""
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        try:
            self.stopped.set()
            messages.notify(f"\nntkrl: {message}{self._advice()}")
            publisher = threading.Thread(target=self._publish_exit, args=(verdict,), daemon=True)
            publisher.start()
            publisher.join(RPC_SECONDS + self.limits.grace + 2 * self.limits.period)
            run_lock.release_all()
        finally:  # other threads wait for it
            os._exit(status)

    def _advice(self) -> str:
        if self.resume_step is None:
            return ""
        resume = f"it resumes after rollout step {self.resume_step}"
        restart = "it starts over, since there is no checkpoint yet"
        return f"\nRun the same command again: {resume if self.resume_step else restart}."

    def _publish_exit(self, verdict: str | None) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # already set, or no service
            if verdict is not None:
                self.client.key_value_set(f"{self.keys}/verdict/0", verdict)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{self.keys}/exited/{self.index}", "")
            # the service ends with process 0, which must exit last
            oldest = time.monotonic() - 5 * self.limits.period
            alive = {n for n, record in self.records.items() if record.beat_time > oldest}
            while self.index == 0 and not alive <= self._indices(f"{self.keys}/exited/"):
                time.sleep(self.limits.period / 4)

    def _indices(self, directory: str) -> set[int]:
        names = [key.rpartition("/")[2] for key, _ in self.client.key_value_dir_get(directory)]
        return {int(name) for name in names if name.isdecimal()}

    def _publish(self) -> None:
        """Publish and read heartbeats, in a thread that an unresponsive service may block."""
        for beat in itertools.count():
            if self.stopped.wait(self.limits.period):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                message = json.dumps([beat, *self.progress])
                self.client.key_value_set(
                    f"{self.keys}/beat/{self.index}", message, allow_overwrite=True
                )
                beats = self.client.key_value_dir_get(f"{self.keys}/beat/")
                verdicts = self.client.key_value_dir_get(f"{self.keys}/verdict/")
                self._update(beats, verdicts)

    def _update(self, beats: list[tuple[str, str]], verdicts: list[tuple[str, str]]) -> None:
        now = self.service_time = time.monotonic()
        for key, message in beats:
            try:
                record = self.records[int(key.rpartition("/")[2])]
                beat, passed, activity = json.loads(message)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # of no process of this run
            if beat != record.beat:
                record.beat, record.beat_time = beat, now
            if passed != record.passed:
                record.passed, record.activity, record.progress_time = passed, activity, now
        for _, verdict in verdicts:
            self.verdict = verdict

    def _check(self) -> None:
        """Exit once another process has failed, is silent or has stalled."""
        previous = time.monotonic()
        while not self.stopped.wait(self.limits.period):
            now = time.monotonic()
            if now - previous > self.limits.silence / 2:  # this process was suspended, not the rest
                self.service_time = now
                for record in self.records.values():
                    record.beat_time = record.progress_time = now
            previous = now
            if self.verdict is not None:
                self.stopped.wait(self.limits.grace)
                self._exit(OTHERS_FAILED, self.verdict)
            problem = self._find_problem(now)
            if problem is not None:
                self._exit(OTHERS_FAILED, problem, problem)

    def _find_problem(self, now: float) -> str | None:
        """Name the processes without a heartbeat, or those that the others wait for."""
        limits, records = self.limits, self.records
        silent = [n for n, record in records.items() if now - record.beat_time > limits.silence]
        if now - self.service_time > limits.silence:
            silent = [0]
        if silent:
            named = " and ".join(map(self.describe, silent))
            return (
                f"{named} sent no heartbeat for {limits.silence:g} s (killed, out of memory, "
                "frozen, or its machine or network failed); last progress: "
                f"{records[silent[0]].activity}."
            )
        last = min(record.passed for record in records.values())
        late = {n: record for n, record in records.items() if record.passed == last}
        if min(now - record.progress_time for record in late.values()) <= limits.stall:
            return None
        everyone = len(late) == len(self.hosts)
        named = "no process" if everyone else " and ".join(map(self.describe, late))
        verb = "made progress" if everyone else "made no progress"
        activity = next(iter(late.values())).activity
        return f"{named} {verb} after {activity} for {limits.stall:g} s (NTKRL_STALL_TIMEOUT)."

    def _on_abort(self, signal_number: int) -> None:
        """Name the cause when JAX or XLA aborts this process; a C signal handler, must not raise.

        It makes no call to the service, whose client may hold its locks in this very thread.
        """
        aborted = time.monotonic()
        while time.monotonic() - aborted < 4 * self.limits.period + self.limits.grace:
            if self.verdict is not None:
                break
            if self.service_time > aborted + 2 * self.limits.period:  # the service still answers
                message = f"{self.describe(self.index)} was aborted by a fatal error of XLA; see "
                message += "its output"
                self._exit(128 + signal_number, message, message)
            time.sleep(self.limits.period / 4)
        gone = f"{self.describe(0)}, the coordinator, has exited; see its output for the cause."
        self._exit(OTHERS_FAILED, gone if self.verdict is None else self.verdict)
