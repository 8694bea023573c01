"""Time limits per row: a row that takes too long, or ends its process, costs the others nothing.

Rows are scored in a child process, forked with everything imported, which is killed when a row is
over its limit; another one continues with the next row. Signals would not do: they interrupt
neither a product of integers of a billion digits nor a parser that has used up its stack.
"""

import bisect
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Sequence

from ntkrl import workers

ANSWER = struct.Struct("=?d")
"""Of one row: whether it was scored, and its reward; NaN where it does not apply."""
MEMORY = 2 << 30
"""Bytes that rows may allocate beyond what their process starts with."""
USUAL = 8
"""A row gets at least so many times the median of those that were scored, …"""
PATIENCE = 0.5
"""… and, before any was, this many seconds, halved by each row that needs more."""
Score = Callable[[int], float | None]


class RowScores:
    """The rewards of rows, within a limit per row and one for all of them.

    First every row gets an equal part of half the time, so that slow rows cannot take the time of
    quick ones, but never less than several times what rows took so far: on a busy machine, parts
    of many rows are shorter than any row. The rest of the time is divided equally among the rows
    that need more. To be used where the process has few threads, as in a worker process.

    values: row to reward, None where it does not apply; for rows that were scored.
    slow, failed: rows over their limit, and rows whose scoring raised or ended its process.
    """

    def __init__(self, score: Score, rows: int, row_seconds: float, call_seconds: float):
        """Score rows 0 to `rows` − 1, one after another.

        Args:
          score: from a row's number to its reward.
          rows: number of rows.
          row_seconds: limit of a row.
          call_seconds: limit of all rows.
        """
        self.score = score
        self.values: dict[int, float | None] = {}
        self.slow: list[int] = []
        self.failed: list[int] = []
        self.row_seconds, start = row_seconds, time.monotonic()
        self.deadline, self.patience = start + call_seconds, PATIENCE
        # seconds of scored rows, rising; the first row of a process takes longer
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self._pass(range(rows), start + call_seconds / 2)
        again, self.slow = self.slow, []
        self._pass(again, self.deadline)

    def _pass(self, rows: Sequence[int], end: float) -> None:
        """Score rows, each in an equal part of the time until `end`, or in a usual row's time."""
        done = 0
        while done < len(rows):
            if time.monotonic() >= self.deadline:
                self.slow += rows[done:]
                return
            child, first = _Child(self.score, rows[done:]), True
            try:
                while done < len(rows):
                    start = time.monotonic()
                    limit = self._limit((end - start) / (len(rows) - done), first)
                    answer = child.answer(max(min(limit, self.deadline - start), 0.0))
                    row, done = rows[done], done + 1
                    if answer is None:
                        self.patience /= 2
                        (self.failed if child.ended else self.slow).append(row)
                        break
                    bisect.insort(self.times[first], time.monotonic() - start)
                    scored, reward = answer
                    if scored:
                        self.values[row] = None if reward != reward else reward
                    else:
                        self.failed.append(row)
                    first = False
            finally:
                child.close()

    def _limit(self, part: float, first: bool) -> float:
        times = self.times[first]
        usual = USUAL * times[len(times) // 2] if times else self.patience
        return min(max(part, usual), self.row_seconds)


class _Child:
    """A process that scores rows in order and writes an ANSWER for each."""

    def __init__(self, score: Score, rows: Sequence[int]):
        self.ended = False
        self.reader, writer = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(score, rows, writer, parent)
            finally:
                os._exit(0)  # without the exit handlers of the parent
        os.close(writer)

    def answer(self, seconds: float) -> tuple[bool, float] | None:
        """Return the answer of the next row; None if it took too long or the process ended."""
        if not select.select([self.reader], [], [], seconds)[0]:
            return None
        written = os.read(self.reader, ANSWER.size)  # written at once
        self.ended = len(written) < ANSWER.size
        return None if self.ended else ANSWER.unpack(written)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.reader)


def _serve(score: Score, rows: Sequence[int], writer: int, parent: int) -> None:
    workers.end_with_parent(parent)
    workers.ignore_terminations()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    workers.limit_memory(MEMORY)
    for row in rows:
        try:
            reward = score(row)
            answer = ANSWER.pack(True, float("nan") if reward is None else reward)
        except Exception:
            answer = ANSWER.pack(False, 0.0)
        os.write(writer, answer)
