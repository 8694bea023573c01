"""Story: users' functions in separate processes, which hang, die and print."""

import datetime
import decimal
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import numpy as np
import pytest

from ntkrl.reward import RewardFunction, RewardSet, load_function, open_function
from ntkrl.reward.contract import RewardError
from ntkrl.reward.loading import WorkerFunction

CODE = """
    import asyncio, os, sys, time
    import numpy as np

    def plain(completions, answer, log_metric, log_extra, **kwargs):
        print("to be seen, and to disturb nothing", flush=True)
        log_metric("length", np.mean([len(c) for c in completions]))
        log_extra("answer", answer)
        return [None if a is None else float(len(c)) / 3 for c, a in zip(completions, answer)]

    async def later(prompts, completions):
        await asyncio.sleep(0.01)
        return np.arange(len(completions), dtype=np.float32)

    def slow(completions, seconds):
        time.sleep(seconds[0])
        return [1.0] * len(completions)

    def spin(completions):
        open("spinning", "w").close()
        while True:
            pass

    def gone(completions, leave):
        if leave[0]:
            os._exit(7)
        return [2.0] * len(completions)

    def wrong(completions):
        return ["x"] * len(completions)

    def failing(completions):
        return [1 / 0]

    def stamped(completions, stamp):
        import datetime
        assert stamp == [datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.timezone.utc)] * 2
        return [float(time.hour) for time in stamp]

    def all_columns(completions, log_extra, **columns):
        log_extra("type", [type(columns["column"][0]).__name__])
        log_extra("values", [columns["column"]])
        return [1.0] * len(completions)

    def ids_alone(completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    def numbers(completions, log_metric, log_extra):
        import torch
        for value in (np.float32(1), np.ones(()), np.full(1, 4.0), torch.tensor(2.0)):
            log_metric("numpy and torch", value)
        log_metric("bfloat16", torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True))
        log_extra("rows", torch.arange(2))
        log_extra("rows", [np.float64(0.5), torch.ones(2), np.arange(2), None, object, b"x"])
        return torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)

    def array_metric(completions, log_metric):
        log_metric("length", np.arange(3))
        return [0.0, 0.0]

    def light(completions):
        return [float(name in sys.modules) for name in ("jax", "numpy")]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """Write the file, and return a maker of functions from it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(CODE))
    return lambda name, seconds=30.0, **options: open_function(
        f"mine.py:{name}", seconds, {}, **options
    )


def call(functions, completions=("ab", "c"), **columns):
    """Reward some completions."""
    made = RewardSet(tuple(functions))
    return made(["p"] * len(completions), completions, [[1]] * len(completions), columns)


def test_equal_to_the_function_itself(rewards):
    """oracle: the same function loaded into this process; its signature is known here."""
    here, there = load_function("mine.py:plain"), rewards("plain")
    assert there.missing([]) == here.missing([]) == ["answer"]
    also = RewardFunction("also", lambda completions: [1.0] * len(completions))
    result = [call([f, also], ("abcd", "x"), answer=["1", None]) for f in (here, there)]
    np.testing.assert_allclose(result[0].rewards, [1 + 4 / 3, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(result[0].rewards, result[1].rewards)
    assert result[0].logged == result[1].logged == {"length": 2.5}
    assert result[0].extra == result[1].extra == {"answer": ["1", None]}
    np.testing.assert_array_equal(call([rewards("later")]).rewards, [0.0, 1.0])


def test_processes_start_without_jax(rewards):
    """law: a worker loads numpy and the user's imports, and no accelerator library."""
    np.testing.assert_array_equal(call([rewards("light")]).rewards, [0.0, 1.0])


def test_out_of_time_and_again(rewards):
    """law: a call that takes too long is ended in time, and the next one is served."""
    function = rewards("slow", 1.0)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"mine.py:slow did not answer within 1 s; its process"):
        call([function], seconds=[60, 60])
    assert time.monotonic() - began < 5
    np.testing.assert_array_equal(call([function], seconds=[0, 0]).rewards, [1.0, 1.0])


def test_a_process_that_ends(rewards):
    """law: an exit inside the function is reported with its status; the next call succeeds."""
    function = rewards("gone")
    with pytest.raises(RewardError, match="mine.py:gone ended with status 7"):
        call([function], leave=[True, True])
    np.testing.assert_array_equal(call([function], leave=[False, True]).rewards, [2.0, 2.0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spin", "did not answer within 1 s"),
        ("wrong", "values that are not finite float32 numbers"),
        ("failing", r"raised ZeroDivisionError: division by zero at mine.py:33\."),
    ],
)
def test_failures_stop_or_count(rewards, name, message):
    """law: a failure stops the run, or every row gets the default and the failure is counted."""
    with pytest.raises(RewardError, match=message):
        call([rewards(name, 1.0)])
    result = call([rewards(name, 1.0, on_failure=-1.0, weight=2.0), rewards("later")])
    np.testing.assert_array_equal(result.rewards, [-2.0, -1.0])
    assert list(result.failures) == [name]


def test_functions_run_at_the_same_time(rewards):
    """law: three functions that wait a second each take less than two together."""
    functions = [rewards("slow") for _ in range(3)]
    named = [RewardFunction(f"slow{i}", f.call) for i, f in enumerate(functions)]
    began = time.monotonic()
    call(named, seconds=[1.0, 1.0])
    assert time.monotonic() - began < 2


def test_large_requests_and_answers(rewards):
    """law: more than a pipe holds goes through in both directions."""
    texts = ("x" * 200_000,) * 40
    answers = ["y" * 100_000] * 40
    result = call([rewards("plain")], texts, answer=answers)
    assert result.rewards[0] == pytest.approx(200_000 / 3) and result.extra["answer"] == answers


def test_what_cannot_be_loaded_is_told_at_the_start(rewards):
    """law: messages of the loader pass through from the process."""
    with pytest.raises(ValueError, match="mine.py has no 'plane'; did you mean 'plain'"):
        rewards("plane")


def test_a_worker_ends_with_its_run(rewards, tmp_path):
    """law: a run killed while a function spins leaves no process behind."""
    child = (
        "from ntkrl.reward.loading import WorkerFunction\n"
        "function = WorkerFunction('mine.py:spin', 60.0)\n"
        "print(function.worker.process.pid, flush=True)\n"
        "function(completions=['a'])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    while not (tmp_path / "spinning").exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        state = open(f"/proc/{worker}/stat").read().split(")")[1].split()[0]
        if state == "Z":  # ended, and nobody is there to collect it
            return
        time.sleep(0.05)
    pytest.fail("the worker goes on")


def test_close_ends_the_process(rewards):
    """law: a closed function has no process; it starts again when it is called."""
    function = rewards("later").call
    assert isinstance(function, WorkerFunction)
    process = function.worker.process
    function.close()
    assert process.poll() is not None
    assert function(prompts=[], completions=["a"]) == [0.0]


COLUMNS = {
    "datetime": datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC),
    "date": datetime.date(2024, 1, 1),
    "time": datetime.time(1, 2, 3, 4),
    "timedelta": datetime.timedelta(days=1),
    "bytes": b"\x00\xff",
    "Decimal": decimal.Decimal("1.50"),
    "set": {1, 2},
    "tuple": (1, "a"),
    "int": 10**6000,
    "float": -math.inf,
    "float32": np.float32(0.1),
    "datetime64": np.datetime64("2024-01-01T00:00:00.000000001"),
    "dict": {"$type": "datetime", "value": "a text of the row's"},
    "UUID": uuid.UUID(int=3),
}


def test_columns_that_json_cannot_hold(rewards):
    """law: a function that names one gets the value, one with **kwargs all, others need none."""
    stamps = {"stamp": [COLUMNS["datetime"]] * 2}
    np.testing.assert_array_equal(call([rewards("stamped")], **stamps).rewards, [12.0, 12.0])
    np.testing.assert_array_equal(call([rewards("later")], **stamps).rewards, [0.0, 1.0])
    function = rewards("all_columns")
    for name, value in COLUMNS.items():
        extra = call([function], column=[value, value]).extra
        assert extra["type"] == [name] and extra["values"] == [[value, value]]
    call([rewards("later")], column=[object()] * 2)  # stays in this process
    message = "the column 'column' cannot be sent to .*: builtins.object has no JSON form. Convert"
    with pytest.raises(RewardError, match=message):
        call([function], column=[object()] * 2)


def test_arrays_of_values(rewards):
    """law: NumPy arrays arrive as arrays, with dtype and shape."""
    function = rewards("all_columns")
    extra = call([function], column=[np.eye(2, dtype=np.float16), None]).extra
    assert extra["type"] == ["ndarray"] and extra["values"][0][0].dtype == np.float16
    np.testing.assert_array_equal(extra["values"][0][0], np.eye(2))


def test_a_function_of_token_ids_alone(rewards):
    """law: a function need not name the completions."""
    np.testing.assert_array_equal(call([rewards("ids_alone")]).rewards, [1.0, 1.0])


def test_numbers_of_numpy_and_torch(rewards):
    """law: log_metric, log_extra and rewards take numbers and arrays of NumPy and torch."""
    pytest.importorskip("torch")
    for function in (rewards("numbers"), load_function("mine.py:numbers")):
        result = call([function])
        np.testing.assert_array_equal(result.rewards, [1.0, 2.0])
        assert result.logged == {"numpy and torch": 2.0, "bfloat16": 1.5}
        rows = [0, 1, 0.5, [1.0, 1.0], [0, 1], None, "<class 'object'>", b"x"]
        assert result.extra == {"rows": rows}
    message = r"raised TypeError: log_metric\('length', …\) takes one number, not ndarray"
    with pytest.raises(RewardError, match=message):
        call([rewards("array_metric")])
