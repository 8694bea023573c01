"""The watch that each of several processes keeps over the others.

One daemon thread tells, through the store of JAX's coordination service, that this process lives
and how far it is, and reads what the others told; another judges it. They work while the main
thread hangs in a collective that a lost process will never join, and end this process then.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

MISTAKE, FAILED, OTHERS_FAILED, INTERRUPTED = 2, 1, 70, 130
"""Exit statuses; see `ntkrl.main`."""

STATUS = re.compile(
    r"\b(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE"
    r"|UNKNOWN): "
)
RPC_SECONDS = 5.0  # for the last words of a process
PATIENCE = 10**9  # milliseconds: for a value that is given before this process ends


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds after which a process is given up.

    start: to wait for all to come. silence: without a sign of life. stall: without going on,
    while the others wait; compiling and writing a large model take their time.
    """

    start: float = 300.0
    silence: float = 60.0
    stall: float = 1800.0

    @property
    def pause(self) -> float:
        """Seconds between two signs of life."""
        return min(max(self.silence / 10, 0.1), 2.0)

    @property
    def grace(self) -> float:
        """Seconds for a process to find by itself the mistake that another one has told of."""
        return min(self.silence / 5, 2.0)


def read_limits() -> Limits:
    """Read NTKRL_START_TIMEOUT, NTKRL_SILENCE_TIMEOUT and NTKRL_STALL_TIMEOUT (seconds).

    Raises:
      ValueError: one that is no positive number.
    """
    found, problems = {}, []
    for field in dataclasses.fields(Limits):
        name = f"NTKRL_{field.name.upper()}_TIMEOUT"
        if name not in os.environ:
            continue
        try:
            found[field.name] = float(os.environ[name])
        except ValueError:
            found[field.name] = math.nan
        if not 0 < found[field.name] < math.inf:
            problems.append(f"{name}={os.environ[name]} must be a positive number of seconds")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return Limits(**found)


@dataclasses.dataclass
class Seen:
    """What is known of a process.

    beat: number of its last sign of life, seen at `lived`. mark, doing: how many marks it has
    passed, seen at `moved`, and the last one's name.
    """

    lived: float
    moved: float
    beat: int = -1
    mark: int = 0
    doing: str = "the start"


class Watch:
    """This process's view of the others, and theirs of it.

    position: how many marks this process has passed, and the last one's name. saved: the rollout
    step after which the run resumes, 0 for none; None where there is nothing to resume.
    """

    def __init__(self, client: Any, own: int, hosts: list[str], limits: Limits):
        """Start both threads.

        Args:
          client: of JAX's coordination service.
          own: number of this process.
          hosts: host name of each process.
          limits: when to give up.
        """
        self.client, self.own, self.hosts, self.limits = client, own, hosts, limits
        self.position, self.saved = (0, Seen.doing), None
        self.verdict: str | None = None
        self.numbers = itertools.count()
        self.ending, self.over = threading.Lock(), threading.Event()
        now = time.monotonic()
        self.answered = now
        self.seen = {number: Seen(now, now) for number in range(len(hosts))}
        # JAX's client aborts the process when the coordinator is gone, at once and without a name
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self.handler)
        for work in (self._tell, self._judge):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def who(self, number: int) -> str:
        """Name a process."""
        return f"process {number} ({self.hosts[number]})"

    def agree(self, name: str, value: Any) -> list[Any]:
        """Do `runtime.agree`."""
        self.position = (self.position[0] + 1, f"agreement on {name}")
        number = next(self.numbers)
        place = f"ntkrl/agree/{number}"
        self.client.key_value_set(f"{place}/{self.own}", json.dumps([name, value]))
        found = []
        for other in range(len(self.hosts)):
            # a process that never comes is the judge's to find
            told = self.client.blocking_key_value_get(f"{place}/{other}", PATIENCE)
            asked, theirs = json.loads(told)
            if asked != name:
                raise RuntimeError(
                    f"{self.who(other)} asks for agreement on {asked}, {self.who(self.own)} on "
                    f"{name}: the processes took different ways; this is a fault of ntkrl."
                )
            found.append(theirs)
        if number > 0:  # which all have read, or they would not be here
            self.client.key_value_delete(f"ntkrl/agree/{number - 1}/{self.own}")
        return found

    def failed(self, error: BaseException) -> NoReturn:
        """Tell the others why this process fails, and end it."""
        status, said = FAILED, f"{type(error).__name__}: {error}"
        broken = STATUS.search(said) is not None  # of JAX, in a ValueError too
        if broken:
            # a collective breaks where a process is lost: the judge will say which, and not return
            time.sleep(self.limits.silence + 5 * self.limits.pause + self.limits.grace)
        if isinstance(error, KeyboardInterrupt):
            status, said = INTERRUPTED, "interrupted"
        elif isinstance(error, ValueError | OSError) and not broken:
            status, said = MISTAKE, str(error)
        if status == FAILED or "NTKRL_TRACEBACK" in os.environ:
            traceback.print_exception(error)
        self._end(status, said, f"{self.who(self.own)} failed: {said}")

    def close(self) -> None:
        """Stop watching; all processes are about to end well."""
        self.over.set()

    def _end(self, status: int, said: str, verdict: str | None = None) -> NoReturn:
        """Say why, let the others know unless they do, and end the process at once."""
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending it
        self.over.set()
        sys.stdout.flush()
        print(f"\nntkrl: {said}{self._advice()}", file=sys.stderr, flush=True)
        words = threading.Thread(target=self._last_words, args=(verdict,), daemon=True)
        words.start()
        words.join(RPC_SECONDS + self.limits.grace + 2 * self.limits.pause)
        os._exit(status)

    def _advice(self) -> str:
        if self.saved is None:
            return ""
        after = f"it resumes after rollout step {self.saved}"
        start = "it starts again, since there is no checkpoint yet"
        return f"\nRun the same command again: {after if self.saved else start}."

    def _last_words(self, verdict: str | None) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another's verdict, or no service
            if verdict is not None:
                self.client.key_value_set("ntkrl/verdict/0", verdict)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"ntkrl/gone/{self.own}", "")
            # the service ends with process 0, which must go last
            now = time.monotonic()
            alive = {n for n, seen in self.seen.items() if now - seen.lived < 5 * self.limits.pause}
            while self.own == 0 and not alive <= self._numbers("ntkrl/gone/"):
                time.sleep(self.limits.pause / 4)

    def _numbers(self, place: str) -> set[int]:
        return {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get(place)}

    def _tell(self) -> None:
        """Tell and read until the end, in a thread that a dead service may hold up."""
        for beat in itertools.count():
            if self.over.wait(self.limits.pause):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                told = json.dumps([beat, *self.position])
                self.client.key_value_set(f"ntkrl/beat/{self.own}", told, allow_overwrite=True)
                beats = self.client.key_value_dir_get("ntkrl/beat/")
                verdicts = self.client.key_value_dir_get("ntkrl/verdict/")
                self._read(beats, verdicts)

    def _read(self, beats: list[tuple[str, str]], verdicts: list[tuple[str, str]]) -> None:
        now = self.answered = time.monotonic()
        for key, told in beats:
            seen = self.seen[int(key.rpartition("/")[2])]
            beat, mark, doing = json.loads(told)
            if beat != seen.beat:
                seen.beat, seen.lived = beat, now
            if mark != seen.mark:
                seen.mark, seen.doing, seen.moved = mark, doing, now
        for _, verdict in verdicts:
            self.verdict = verdict

    def _judge(self) -> None:
        """Look again and again whether a process is lost, and end this one then."""
        before = time.monotonic()
        while not self.over.wait(self.limits.pause):
            now = time.monotonic()
            if now - before > self.limits.silence / 2:  # this process slept: nobody else did
                self.answered = now
                for seen in self.seen.values():
                    seen.lived = seen.moved = now
            before = now
            if self.verdict is not None:
                self.over.wait(self.limits.grace)
                self._end(OTHERS_FAILED, self.verdict)
            lost = self._lost(now)
            if lost is not None:
                self._end(OTHERS_FAILED, lost, lost)

    def _lost(self, now: float) -> str | None:
        """Name the processes that are silent, or those that the others wait for."""
        limits = self.limits
        silent = [n for n, seen in self.seen.items() if now - seen.lived > limits.silence]
        if now - self.answered > limits.silence:
            silent = [0]
        if silent:
            named = " and ".join(map(self.who, silent))
            return (
                f"{named} gave no sign of life for {limits.silence:g} s (killed, out of memory, "
                "frozen, or its machine or network is gone), last at "
                f"{self.seen[silent[0]].doing}."
            )
        last = min(seen.mark for seen in self.seen.values())
        late = {n: seen for n, seen in self.seen.items() if seen.mark == last}
        if min(now - seen.moved for seen in late.values()) <= limits.stall:
            return None
        doing = next(iter(late.values())).doing
        named = " and ".join(map(self.who, late)) if len(late) < len(self.hosts) else "no process"
        verb = "went on" if len(late) == len(self.hosts) else "has not gone on"
        return f"{named} {verb} from {doing} for {limits.stall:g} s (NTKRL_STALL_TIMEOUT)."

    def _aborted(self, signal_number: int) -> None:
        """Say who is gone when JAX or XLA abort this process; a handler of C, which may not fail.

        It asks nothing of the service, whose client may hold its locks in this very thread.
        """
        aborted = time.monotonic()
        while time.monotonic() - aborted < 4 * self.limits.pause + self.limits.grace:
            if self.verdict is not None:
                break
            if self.answered > aborted + 2 * self.limits.pause:  # the service lives
                said = f"{self.who(self.own)} was aborted by a fatal error of XLA; see its output"
                self._end(128 + signal_number, said, said)
            time.sleep(self.limits.pause / 4)
        gone = f"{self.who(0)}, which coordinates, is gone; its own output says why."
        self._end(OTHERS_FAILED, gone if self.verdict is None else self.verdict)
