"""Law: rows that hang, fail, crash or take all memory cost their own reward and nothing else."""

import json
import subprocess
import sys

import pytest

from tests.reward.rows import FAILED, SLOW


def scored(name, *thread):
    """Score the rows of a case; return rewards by row, slow rows, failed rows and seconds."""
    command = [sys.executable, "-m", "tests.reward.rows", name, *thread]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    values, slow, failed, seconds, clean = json.loads(run.stdout)
    assert clean, "a process or a file is left"
    return dict(values), slow, failed, seconds


def test_by_hand():
    """by hand: rewards, None, and an exception; no rows."""
    assert scored("by_hand")[:3] == ({0: 0.5, 1: None, 2: 2.0}, [], [3])
    assert scored("empty")[:3] == ({}, [], [])


@pytest.mark.parametrize("thread", [(), ("thread",)], ids=["main", "thread"])
@pytest.mark.parametrize("misbehave", [each.__name__ for each in (*SLOW, *FAILED)])
def test_others_keep_their_reward(misbehave, thread):
    """law: rows before, between and after keep their rewards, in any thread."""
    is_slow = misbehave in [each.__name__ for each in SLOW]
    values, slow, failed, seconds = scored(misbehave, *thread)
    assert values == {0: 0.0, 2: 1.0, 4: 2.0, 5: 2.5}
    assert (slow, failed) == (([1, 3], []) if is_slow else ([], [1, 3]))
    assert seconds < 10


def test_slow_rows_first():
    """law: rows that use up all their time leave the others theirs, and the call its limit."""
    values, slow, failed, seconds = scored("thirty_hang")
    assert values == {30: 1.0, 31: 1.0} and slow == list(range(30)) and not failed
    assert seconds < 10  # of 8, and 2 for the processes


def test_rows_that_need_more_get_it():
    """law: time that quick rows leave is divided among those over the first limit."""
    # the third row's part of the first four seconds is 4 / 6 = 0.67 s
    values, slow, failed, _ = scored("one_needs_more")
    assert len(values) == 8 and not slow and not failed


def test_a_busy_machine():
    """law: rows that all take longer than an equal part of half the time keep their rewards.

    200 rows of 20 ms, 4 of which hang, have 7.5 s: a part is 19 ms, in which none would end.
    """
    values, slow, failed, seconds = scored("busy")
    assert slow == [7, 57, 107, 157] and not failed and set(values.values()) == {1.0}
    assert len(values) == 196 and seconds < 10


def test_a_process_that_starts_slowly():
    """law: the first row of a process may take long; ending it would make the next one first."""
    values, slow, failed, _ = scored("cold")  # a part is 17 ms, the first row takes 60
    assert len(values) == 300 and not slow and not failed
