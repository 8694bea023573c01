"""Attacks of users' functions on their process: later rewards, processes left, reasons."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ntkrl.reward import RewardSet, open_function
from ntkrl.reward.contract import RewardError, RewardUnavailableError

CODE = """
    import os, signal, subprocess, sys, time

    def attacked(completions, attack):
        if attack[0] is not None:
            globals()[attack[0]]()
        return [float(len(text)) for text in completions]

    def hang():
        time.sleep(60)

    def count_in_c():
        7 ** (10**9)

    def end():
        os._exit(3)

    def leave():
        sys.exit(4)

    def crash():
        os.kill(os.getpid(), signal.SIGSEGV)

    def write_everywhere():
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"garbage\\n")
            except OSError:
                pass

    def close_everything():
        os.closerange(3, 64)
        time.sleep(60)

    def fork_and_return():
        if os.fork() == 0:
            time.sleep(0.3)

    def read_input():
        assert sys.stdin.read() == ""
        assert subprocess.run(["cat"], capture_output=True).stdout == b""

    def print_everywhere():
        print("text")
        os.write(1, b"garbage\\n")
        subprocess.run(["echo", "garbage"])

    def start_children():
        command = [sys.executable, "-c", "while True: pass"]
        children = [subprocess.Popen(command, start_new_session=new) for new in (False, True)]
        forked = os.fork()
        if forked == 0:
            os.setsid()
            7 ** (10**9)
        with open("children", "w") as file:
            print(os.getpid(), forked, *(child.pid for child in children), file=file)
        os.rename("children", "started")

    def start_children_and_count():
        start_children()
        count_in_c()

    def stop_children():
        child = subprocess.Popen(["sleep", "60"])
        child.terminate()
        assert child.wait() == -signal.SIGTERM
        forked = os.fork()
        if forked == 0:
            time.sleep(60)
        os.kill(forked, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == -signal.SIGTERM

    def wait_a_second():
        open("waiting", "w").close()
        time.sleep(1)

    def inheritable():
        names = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
        open_files = [fd for fd in names if os.path.exists(f"/proc/self/fd/{fd}")]
        assert not any(os.get_inheritable(fd) for fd in open_files)
"""


@pytest.fixture
def attacked(tmp_path, monkeypatch):
    """Write the file, and return a maker of its function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(CODE))
    return lambda seconds=30.0, **options: open_function("mine.py:attacked", seconds, {}, **options)


def call(function, attack=None, texts=("ab", "c")):
    """Return the rewards of some completions, and the reason of a failed call."""
    columns = {"attack": [attack] * len(texts)}
    result = RewardSet((function,))(["p"] * len(texts), texts, [[1]] * len(texts), columns)
    return result.rewards.tolist(), result.failures.get("attacked")


FAILURES = {
    "hang": "mine.py:attacked did not answer within 1 s; its process was killed. Raise reward.time",
    "count_in_c": "mine.py:attacked did not answer within 1 s; its process was killed",
    "end": "mine.py:attacked ended with status 3 in a call",
    "leave": "mine.py:attacked ended with status 4 in a call",
    "crash": "mine.py:attacked was ended by SIGSEGV in a call",
    "write_everywhere": "wrote b'garbage\\n",
    "close_everything": "closed the descriptor of its answers, or all that it had open; it was",
}


@pytest.mark.parametrize("attack", FAILURES)
def test_one_failure_costs_one_call(attacked, attack):
    """law: the reason is true, and each later call is served by one new process.

    A process that ended with the thread that started it would fail every second call.
    """
    function = attacked(1.0, on_failure=-1.0)
    rewards, reason = call(function, attack)
    assert rewards == [-1.0, -1.0] and FAILURES[attack] in reason
    processes = set()
    for number in range(4):
        texts = ["x" * number, "y"]
        assert call(function, texts=texts) == ([float(number), 1.0], None)
        processes.add(function.call.worker.process.pid)
        time.sleep(0.05)
    assert len(processes) == 1
    with pytest.raises(RewardError, match="mine.py:attacked"):
        call(attacked(1.0), attack)


@pytest.mark.parametrize("seed", range(2))
def test_rewards_are_those_without_failures(attacked, seed):
    """law: calls between failures get the rewards of a run without any."""
    function, attacks = attacked(0.5, on_failure=-1.0), ["hang", "end", "crash", None, None]
    for number in range(10):
        texts = ["x" * (number + seed), "y" * seed]
        attack = attacks[(number * (seed + 2)) % len(attacks)]
        expected = [-1.0, -1.0] if attack else [float(number + seed), float(seed)]
        assert call(function, attack, texts)[0] == expected


@pytest.mark.parametrize(
    "attack", ["read_input", "print_everywhere", "stop_children", "inheritable", "start_children"]
)
def test_what_a_function_may_do(attacked, attack):
    """law: input is empty, output is no answer, children end by signals and inherit nothing."""
    function = attacked(5.0)
    for texts in (("a", "bc"), ("def", "g")):
        assert call(function, attack, texts) == ([float(len(text)) for text in texts], None)
    function.call.close()


def test_a_function_that_returns_twice(attacked):
    """law: the answer of a fork is dropped; it would be that of the next call."""
    function = attacked(5.0)
    assert call(function, "fork_and_return", ["a"]) == ([1.0], None)
    time.sleep(0.5)
    for text in ("ab", "abc"):
        assert call(function, None, [text]) == ([float(len(text))], None)


def test_it_ends_between_two_calls(attacked):
    """law: a process killed while idle is replaced, and no call fails."""
    function = attacked(5.0, on_failure=-1.0)
    assert call(function, "start_children") == ([2.0, 1.0], None)
    worker = int(open("started").read().split()[0])
    os.kill(worker, signal.SIGKILL)
    function.call.worker.process.wait(10)
    assert call(function) == ([2.0, 1.0], None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_all_processes_of_a_job(attacked, tmp_path, number):
    """law: a call is answered while a scheduler ends the job: the run decides, and saves."""
    function = attacked(10.0, on_failure=-1.0)
    results = []
    thread = threading.Thread(target=lambda: results.append(call(function, "wait_a_second")))
    thread.start()
    while not (tmp_path / "waiting").exists():
        time.sleep(0.02)
    supervisor = function.call.worker.process.pid
    children = open(f"/proc/{supervisor}/task/{supervisor}/children").read().split()
    for process in (supervisor, *map(int, children)):
        os.kill(process, number)
    thread.join()
    assert results == [([2.0, 1.0], None)]


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_another_function_after_a_failure(attacked, tmp_path, change):
    """law: the run stops, whatever a failed call counts: its rewards would be other ones."""
    function = attacked(5.0, on_failure=-1.0)
    if change == "edited":
        (tmp_path / "mine.py").write_text(textwrap.dedent(CODE).replace("len(text)", "0"))
    else:
        (tmp_path / "mine.py").unlink()
    assert call(function, "end")[0] == [-1.0, -1.0]
    message = {"edited": "was changed since the run began", "removed": "mine.py does not exist"}
    with pytest.raises(RewardUnavailableError, match=message[change]):
        call(function)


RUN = """
import sys
from ntkrl.reward import RewardSet, open_function
functions = RewardSet((open_function("mine.py:attacked", 60.0, {}, on_failure=-1.0),))
for attack in sys.argv[1:]:
    functions(["p"], ["c"], [[1]], {"attack": [attack]})
print("called", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("attacks", [["start_children_and_count"], ["end", "start_children"]])
def test_all_processes_end_with_a_killed_run(attacked, tmp_path, attacks):
    """law: none is left of the worker and its children, in other sessions and in C too."""
    run = subprocess.Popen([sys.executable, "-c", RUN, *attacks], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = [int(word) for word in (tmp_path / "started").read_text().split()]
    assert len(processes) == 4 and all(map(runs, processes))
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdin.close()
    while any(map(runs, processes)):
        assert time.monotonic() < deadline, [process for process in processes if runs(process)]
        time.sleep(0.02)


def runs(process):
    """Return False for a process that has ended, collected or not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
