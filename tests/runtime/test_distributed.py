"""Story: processes that die, hang, fail or never join; the others end in time and name them."""

import os
import signal
import socket
import sys
import threading
import time

import pytest

from ntkrl import runtime
from ntkrl.runtime import health
from tests.hosts import ends, start

# each step meets the others twice: on the devices, and in an agreement
CHILD = """
import os, signal, sys, time
import jax, numpy as np
from ntkrl import runtime

own, deed, by = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1], int(sys.argv[2])

def run():
    mesh = runtime.make_mesh(-1, 1, 1)
    runtime.record_resume_step(0)
    for step in range(1, 4):
        runtime.heartbeat(f"rollout step {step}")
        if step == 2 and own == by:
            act()
        rows = runtime.place_rows(np.arange(8.0), mesh)
        assert float(jax.numpy.sum(rows)) == 28.0
        if deed == "astray" and own == by:
            runtime.allgather_object("another thing")
        found = runtime.allgather_object("rewards", [own * step])
        assert found == [[number * step] for number in range(jax.process_count())], found
        runtime.record_resume_step(step)
    runtime.log("well done")
    print("listens on", *sorted(listening()))

def listening():
    # addresses of this process's listening sockets, as the kernel writes them
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    mine = {os.readlink(link)[8:-1] for link in links if os.path.exists(link)}
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:
                yield fields[1].partition(":")[0]

def act():
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if deed == "stall":
        time.sleep(100)
    if deed == "mistake":
        raise ValueError("reward function score returned 3 rewards for 4 completions")
    if deed == "bug":
        raise RuntimeError("something else")
    if deed == "abort":
        os.abort()

try:
    with runtime.distributed_session():
        run()
except ValueError as error:  # what main does
    sys.exit(f"main: {error}")
"""
HOST = socket.gethostname()
RESUMES = "Run the same command again: it resumes after rollout step 1."


def run(deed, by, count=3, **settings):
    """Run CHILD in some processes; return how each ended, and the seconds it took."""
    before = time.monotonic()
    settings = {"SILENCE": "3", **settings}
    result = ends(start(count, ["-c", CHILD, deed, str(by)], **settings), seconds=60)
    return result, time.monotonic() - before


def test_three_processes_agree_and_end():
    """story: values of all in all, one writer, status 0."""
    result, _ = run("nothing", 0)
    assert [status for status, _ in result] == [0, 0, 0], result
    assert ["well done" in text for _, text in result] == [True, False, False]
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    for number, (_, text) in enumerate(result):
        (line,) = [line for line in text.splitlines() if line.startswith("listens on")]
        addresses = line.split()[2:]
        assert set(addresses) <= loopback, line  # 0s: every interface
        assert addresses or number > 0


WAITED = "made no progress after rollout step 2 for 4 s"
LOST = {  # deed, by which of how many, limits, its own status, what the others say
    "a worker is killed": ("kill", 1, 3, {}, -signal.SIGKILL, "sent no heartbeat for 3 s"),
    "a worker stalls": ("stall", 1, 2, {"STALL": "4"}, health.OTHERS_FAILED, WAITED),
    "a worker's mistake": ("mistake", 1, 2, {}, health.MISTAKE, "failed: reward function score"),
    "the first one's": ("mistake", 0, 3, {}, health.MISTAKE, "failed: reward function score"),
    "SLOW the first stalls": ("stall", 0, 3, {"STALL": "4"}, health.OTHERS_FAILED, WAITED),
    "SLOW abort": ("abort", 1, 2, {}, 128 + signal.SIGABRT, "was aborted by a fatal error of XLA"),
    "SLOW another error": ("bug", 1, 2, {}, health.FAILED, "failed: RuntimeError: something else"),
}
CASES = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if name.startswith("SLOW") else [])
    for name, case in LOST.items()
]


@pytest.mark.parametrize("case", CASES)
def test_the_others_end_and_say_why(case):
    """story: status 70 and one sentence with process, host and cause, wherever they wait."""
    deed, by, count, settings, status, message = case
    result, seconds = run(deed, by, count, **settings)
    assert seconds < 45
    for number, (ended, text) in enumerate(result):
        if number == by:
            assert ended == status, text
            continue
        assert ended == health.OTHERS_FAILED, text
        message_text = text[text.rindex("\nntkrl: ") :]
        assert message_text.startswith(f"\nntkrl: process {by} ({HOST}) {message}"), text
        assert RESUMES in message_text
        assert "Traceback" not in text
    output = result[by][1]
    if deed == "mistake":
        assert "ntkrl: reward function score returned 3" in output and RESUMES in output
        assert "Traceback" not in output
    if deed == "bug":
        assert "Traceback" in output


def test_the_coordinator_is_killed():
    """story: JAX aborts the others at once; they still name the lost process, and end with 70."""
    result, seconds = run("kill", 0, count=2)
    assert result[0][0] == -signal.SIGKILL and seconds < 45
    for ended, text in result[1:]:
        assert ended == health.OTHERS_FAILED, text
        assert f"\nntkrl: process 0 ({HOST})" in text
        assert "\nRun the same command again: it" in text


@pytest.mark.slow
def test_a_frozen_process():
    """story: SIGSTOP is silence; the others end, and so does it once it goes on."""
    processes = start(2, ["-c", CHILD, "freeze", "1"], SILENCE="3")
    ((ended, text),) = ends(processes[:1], seconds=60)
    assert ended == health.OTHERS_FAILED and f"process 1 ({HOST}) sent no heartbeat" in text
    processes[1].send_signal(signal.SIGCONT)
    ((ended, text),) = ends(processes[1:], seconds=60)
    assert ended == health.OTHERS_FAILED and f"process 0 ({HOST})" in text


def test_ways_that_part():
    """story: a process at a different collective is detected, not waited for."""
    result, _ = run("astray", 1, count=2)
    assert any("the processes diverged" in text for _, text in result)
    assert 0 not in [status for status, _ in result]


def test_a_process_that_never_comes():
    """story: those that came end after the time to start, and name it."""
    processes = start(3, ["-c", CHILD, "nothing", "0"], START="6")
    processes[1].kill()
    for number, (status, text) in enumerate(ends(processes, seconds=60)):
        if number != 1:
            assert status == health.OTHERS_FAILED, text
            assert "process 1 of 3 did not connect" in text and "NTKRL_START_TIMEOUT" in text


def test_a_process_that_comes_late():
    """story: process 0 comes seconds after the other, which waits for it."""
    processes = start(2, ["-c", CHILD, "nothing", "0"])
    processes[0].send_signal(signal.SIGSTOP)
    time.sleep(4)
    processes[0].send_signal(signal.SIGCONT)
    assert [status for status, _ in ends(processes, seconds=60)] == [0, 0]


def test_a_port_that_is_taken():
    """story: process 0 reports it with the fix; the others report that it did not join."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result, _ = run("nothing", 0, count=2, START="6", JAX_COORDINATOR_ADDRESS=address)
    assert result[0][0] == 1 and "cannot use the port" in result[0][1]
    assert "another JAX_COORDINATOR_ADDRESS" in result[0][1]
    assert result[1][0] == health.OTHERS_FAILED and "process 0 of 2 did not connect" in result[1][1]


WRONG = {
    "one variable": ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "all three must be set"),
    "number too high": (
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        "JAX_PROCESS_ID=2",
    ),
    "no port": (
        {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
        "must be HOST:PORT",
    ),
    "no time": ({"JAX_NUM_PROCESSES": "2", "NTKRL_STALL_TIMEOUT": "soon"}, "STALL_TIMEOUT=soon"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_descriptions_that_make_no_sense(case, monkeypatch):
    """law: they are refused before anything is waited for."""
    description, message = case
    for name, value in description.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), runtime.distributed_session():
        pass


def test_one_process_has_neither_service_nor_threads():
    """law: a single process is left alone, and agrees with itself."""
    import threading

    before = threading.active_count()
    with runtime.distributed_session():
        runtime.heartbeat("something")
        assert runtime.allgather_object("x", 3) == [3] and runtime.is_writer()
        assert runtime.local_slice(7) == slice(0, 7)
        assert threading.active_count() == before


class ClosedPipe:
    """Standard error of a process whose terminal is gone."""

    def write(self, text=""):
        raise BrokenPipeError("Broken pipe")

    flush = write


def test_a_process_ends_without_a_terminal(monkeypatch):
    """law: an error whose message nobody can read ends the process all the same.

    The thread that found a lost process used to end in BrokenPipeError, and the others waited for
    it to end the process: for ever.
    """
    monitor = health.HealthMonitor.__new__(health.HealthMonitor)
    monitor.limits = health.Limits(1.0, 0.1, 1.0)
    monitor.ending, monitor.stopped = threading.Lock(), threading.Event()
    monitor.index, monitor.hosts, monitor.resume_step = 0, ["here"], None
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(sys, "stderr", ClosedPipe())
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    monkeypatch.setattr(monitor, "_publish_exit", lambda verdict: None, raising=False)
    monitor.fail(RuntimeError("a fault"))
    assert statuses == [health.FAILED]


class Service:
    """The part of JAX's client that a monitor reads."""

    def __init__(self, entries):
        self.entries = entries

    def key_value_dir_get(self, directory):
        return [entry for entry in self.entries.items() if entry[0].startswith(directory)]


def test_strange_messages_are_ignored():
    """law: malformed heartbeats, of unknown processes or of another session change nothing."""
    monitor = health.HealthMonitor.__new__(health.HealthMonitor)
    monitor.keys, monitor.verdict = "ntkrl/a", None
    monitor.records = {number: health.ProgressRecord(0.0, 0.0) for number in range(2)}
    texts = ["", "{", "7", "[1, 2]", '{"a": 1}', "[" * 5000, "[null, null, null, null]"]
    entries = {f"ntkrl/a/beat/{number}": text for number, text in enumerate(texts, start=5)}
    entries |= {f"ntkrl/a/beat/0{'/x' * n}": text for n, text in enumerate(texts, start=1)}
    entries |= {"ntkrl/a/beat/": "[1, 1, 1]", "ntkrl/a/beat/1": '[3, 2, "a"]'}
    entries |= {"ntkrl/b/beat/0": '[9, 9, "b"]', "ntkrl/b/verdict/0": "stop"}
    entries |= {"ntkrl/a/exited/1": "", "ntkrl/a/exited/": "", "ntkrl/a/exited/x": ""}
    monitor.client = Service(entries)
    for text in texts:
        monitor._update([("ntkrl/a/beat/0", text)], [])
    read = monitor.client.key_value_dir_get
    monitor._update(read("ntkrl/a/beat/"), read("ntkrl/a/verdict/"))
    assert monitor.verdict is None and monitor.records[0].beat == -1
    assert (monitor.records[1].beat, monitor.records[1].activity) == (3, "a")
    assert monitor._indices("ntkrl/a/exited/") == {1}
