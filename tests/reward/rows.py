"""Rows that hang, fail, crash or take all memory: `python -m tests.reward.rows NAME` scores some.

In a process of its own: rows are scored in processes forked from it, and that of pytest has threads
of JAX.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from ntkrl.reward.row_limits import RowScores


def hang():
    time.sleep(60)


def count_in_c():
    return 7 ** (10**9)  # one operation of the interpreter


def ignore_everything():
    while True:
        try:
            time.sleep(1)
        except BaseException:
            continue


def end():
    os._exit(0)


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def allocate():
    bytearray(1 << 45)


def nest():
    return nest() + 1


SLOW, FAILED = (hang, count_in_c, ignore_everything), (end, crash, allocate, nest)


def by_hand(row):
    """A number, None, another, and an exception."""
    return [0.5, None, 2][row]


def second_and_fourth(misbehave):
    """Half the row's number, but for two rows."""
    return lambda row: float(misbehave() or 0) if row in (1, 3) else row / 2


def thirty_hang(row):
    return 1.0 if row >= 30 else hang()


def one_needs_more(row):
    time.sleep(0.9 * (row == 2))
    return 1.0


def busy(row):
    time.sleep(0.02)
    return hang() if row % 50 == 7 else 1.0


STARTED = set()


def cold(row):
    """As a machine does that is slow to start a process: seconds of its first row alone."""
    if os.getpid() not in STARTED:
        STARTED.add(os.getpid())
        time.sleep(0.06)
    return 1.0


# score, rows, row_seconds, call_seconds
CASES = {
    "by_hand": (by_hand, 4, 5.0, 20.0),
    "empty": (by_hand, 0, 5.0, 20.0),
    "thirty_hang": (thirty_hang, 32, 5.0, 8.0),
    "busy": (busy, 200, 1.0, 7.5),
    "cold": (cold, 300, 1.0, 10.0),
    "one_needs_more": (one_needs_more, 8, 5.0, 8.0),
} | {each.__name__: (second_and_fourth(each), 6, 0.5, 20.0) for each in (*SLOW, *FAILED)}


def resources():
    """Open files and child processes."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return len(os.listdir("/proc/self/fd")), children


def main(name):
    """Print the scores, the seconds they took, and whether anything is left open."""
    before, began = resources(), time.monotonic()
    scores = RowScores(*CASES[name])
    seconds, clean = time.monotonic() - began, resources() == before
    values = sorted(scores.values.items())
    print(json.dumps([values, scores.slow, scores.failed, seconds, clean]))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:  # another thread than the first
        thread = threading.Thread(target=main, args=sys.argv[1:2])
        thread.start()
        thread.join()
