"""Law: rows that hang, fail, crash or take all memory cost their own reward and nothing else."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ntkrl.reward.row_limits import RowScores


def scored(score, rows, row_seconds=0.4, call_seconds=20.0):
    """Score rows; return the scores and the seconds it took."""
    began = time.monotonic()
    return RowScores(score, rows, row_seconds, call_seconds), time.monotonic() - began


def test_by_hand():
    """by hand: rewards, None, and an exception."""
    rewards = [0.5, None, 2]

    def score(row):
        return rewards[row] if row < 3 else {}[row]

    scores, _ = scored(score, 4)
    assert scores.values == {0: 0.5, 1: None, 2: 2.0}
    assert scores.failed == [3] and scores.slow == []
    assert RowScores(score, 0, 1.0, 1.0).values == {}


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


def nest(depth=0):
    return nest(depth + 1) + 1


@pytest.mark.parametrize(
    ("misbehave", "kind"),
    [
        (hang, "slow"),
        (count_in_c, "slow"),
        (ignore_everything, "slow"),
        (end, "failed"),
        (crash, "failed"),
        (allocate, "failed"),
        (nest, "failed"),
    ],
)
def test_others_keep_their_reward(misbehave, kind):
    """law: rows before, between and after keep their rewards, in any thread."""
    result = []

    def score(row):
        return float(misbehave() or 0) if row in (1, 3) else row / 2

    def run():
        result.append(scored(score, 6))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    scores, seconds = result[0]
    assert scores.values == {0: 0.0, 2: 1.0, 4: 2.0, 5: 2.5}
    assert getattr(scores, kind) == [1, 3] and len(scores.slow + scores.failed) == 2
    assert seconds < 8


def test_slow_rows_first():
    """law: rows that use up all their time leave the others theirs, and the call its limit."""
    scores, seconds = scored(lambda row: 1.0 if row >= 30 else hang(), 32, 5.0, 4.0)
    assert scores.values == {30: 1.0, 31: 1.0} and scores.slow == list(range(30))
    assert seconds < 6


def test_rows_that_need_more_get_it():
    """law: time that quick rows leave is divided among those over the first limit."""
    # the first limit is 4 / (2 × 8) = 0.25 s
    scores, _ = scored(lambda row: time.sleep(0.7 * (row == 2)) or 1.0, 8, 5.0, 4.0)
    assert len(scores.values) == 8 and scores.slow == []


def test_no_process_is_left():
    """law: children are collected, and no descriptor stays open."""

    def resources():
        thread = Path(f"/proc/self/task/{os.getpid()}")
        return len(os.listdir("/proc/self/fd")), (thread / "children").read_text()

    before = resources()
    scored(lambda row: hang() if row == 1 else 1.0, 3)
    assert resources() == before
