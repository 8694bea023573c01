"""By hand: functions of the calling program under a time limit, and the progress they receive."""

import threading
import time

import numpy as np
import pytest

from ntkrl.reward import RewardSet, TrainerState, open_callable, open_function

ARGUMENTS = (["p", "p"], ["a", "bb"], [[1], [2, 3]], {})


def opened(call, seconds=30.0, **fields):
    """A function of the calling program."""
    return RewardSet((open_callable(f"python:{call.__name__}", call, seconds, **fields),))


def test_calls_in_a_thread_of_this_process():
    seen = []

    def length(completions, log_metric):
        seen.append(threading.current_thread())
        log_metric("count", len(completions))
        return [len(text) for text in completions]

    async def later(completions, **kwargs):
        return [2.0 * len(text) for text in completions]

    result = opened(length)(*ARGUMENTS)
    np.testing.assert_array_equal(result.rewards, [1.0, 2.0])
    assert result.logged == {"count": 2.0} and list(result.per_function) == ["length"]
    assert seen[0].daemon and seen[0] is not threading.main_thread()
    np.testing.assert_array_equal(opened(later)(*ARGUMENTS).rewards, [2.0, 4.0])


def test_a_call_that_hangs_is_reported_or_counted():
    release = threading.Event()

    def hangs(completions):
        release.wait(60)
        return [0.0] * len(completions)

    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"hangs did not answer within 0.2 s; its call still runs"):
        opened(hangs, 0.2)(*ARGUMENTS)
    result = opened(hangs, 0.2, on_failure=-1.0)(*ARGUMENTS)
    assert time.monotonic() - begin < 20
    np.testing.assert_array_equal(result.rewards, [-1.0, -1.0])
    assert "still runs" in result.failures["hangs"]
    release.set()


def raises(completions):
    return [1 / 0 for _ in completions]


def leaves(completions):
    raise SystemExit


def short(completions):
    return [0.0]


def text(completions):
    return ["good" for _ in completions]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (raises, f"raises raised ZeroDivisionError: division by zero at {__file__}:"),
        (leaves, "leaves raised SystemExit, which ends a program"),
        (short, "short returned 1 rewards for 2 completions"),
        (text, "text returned values that are not finite float32 numbers"),
    ],
)
def test_failures(call, words):
    with pytest.raises(ValueError) as error:
        opened(call)(*ARGUMENTS)
    assert words in str(error.value)


def test_parameters_are_checked_when_it_is_opened():
    with pytest.raises(ValueError, match="len takes obj by position only"):
        open_callable("python:len", len, 1.0)
    with pytest.raises(ValueError, match="score requires 'solution', which is not a column"):

        def score(completions, solution):
            return []

        opened(score).check_columns(("answer",))


def test_the_state_of_the_trainer_in_process_and_in_a_worker(tmp_path):
    """law: a function here and a file's in its process receive the same fields."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def progress(completions, trainer_state):\n"
        "    share = trainer_state.global_step / trainer_state.max_steps\n"
        "    return [share + trainer_state.epoch for _ in completions]\n"
    )

    def here(completions, trainer_state):
        share = trainer_state.global_step / trainer_state.max_steps
        return [share + trainer_state.epoch for _ in completions]

    functions = (
        open_function(f"{file}:progress", 60.0, {}),
        open_callable("python:here", here, 60.0),
    )
    state = TrainerState(global_step=3, max_steps=12, epoch=0.5, num_train_epochs=2)
    result = RewardSet(functions).during(state)(*ARGUMENTS)
    # 3 / 12 + 0.5; without the state the calls fail
    for name in ("progress", "here"):
        np.testing.assert_array_equal(result.per_function[name], [0.75, 0.75])
