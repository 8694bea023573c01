"""Rendezvous of processes, in threads: who is admitted, who is ignored, and where it listens."""

import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ntkrl.runtime import rendezvous as module
from ntkrl.runtime import start_watch
from ntkrl.runtime.rendezvous import Hello, StartupTimeoutError, rendezvous
from tests.hosts import free_port

HOST = socket.gethostname()


def meet(*arguments):
    """Return the meeting of a rendezvous; close its links."""
    meeting, links = rendezvous(*arguments)
    for link in links.values():
        link.close()
    return meeting


def meetings(numbers, counts, seconds=20.0, runs=None):
    """Run a rendezvous in threads; return each one's result or error."""
    port = free_port()
    runs = ["train runs/rl"] * len(numbers) if runs is None else runs

    def attempt(number, count, run):
        try:
            return meet(f"127.0.0.1:{port}", Hello(number, count, HOST, run), seconds)
        except (StartupTimeoutError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(attempt, numbers, counts, runs))


def test_all_come():
    """law: every process hears every host's name, the coordinator's interface and one session."""
    results = meetings([2, 1, 0], [3, 3, 3])
    assert results[0] == results[1] == results[2] and results[0].hosts == [HOST] * 3
    assert results[0].address == results[0].bind_address
    assert results[0].address.startswith("127.0.0.1:")
    assert meetings([1, 0], [2, 2])[0].session != results[0].session


def connection(port):
    """Connect as soon as process 0 listens."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise TimeoutError


def hello(**changes):
    values = {"process": 1, "count": 2, "host": "h", "run": "train runs/rl"} | changes
    return json.dumps(values).encode() + b"\n"


SENT = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes": bytes(range(256)) * 8 + b"\n",
    "much": b"x" * 10**6,
    "nothing": b"",
    "another type": b"[1, 2]\n",
    "a part": hello()[:10],
    "fields missing": b'{"process": 1}\n',
    "fields more": hello(more=1),
    "no number": hello(process="1"),
    "a list": hello(process=[1]),
    "a truth": hello(process=True),
    "negative": hello(process=-1),
    "zero": hello(process=0),
    "no text": hello(host=3),
    "nested": b"[" * 4000 + b"\n",
    "not a number": hello(process=float("nan")),
}


def test_strangers_come_first():
    """law: of connections that send anything else none is counted, and none delays the start.

    Some used to be admitted, to end process 0 by a TypeError or RecursionError, or to hold it up
    for five seconds each; 400 that send nothing, for half an hour.
    """
    port, visitors = free_port(), []
    address, run = f"127.0.0.1:{port}", "train runs/rl"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, address, Hello(0, 2, HOST, run), 20.0)
        visitors += [connection(port) for _ in range(400)]
        for text in SENT.values():
            visitors.append(connection(port))
            with contextlib.suppress(OSError):  # closed in the middle of "much"
                visitors[-1].sendall(text)
        visitors[0].close()
        begun = time.monotonic()
        second = pool.submit(meet, address, Hello(1, 2, HOST, run), 20.0)
        assert first.result() == second.result() and first.result().hosts == [HOST] * 2
    assert time.monotonic() - begun < 3
    for visitor in visitors:
        visitor.close()


def test_a_process_of_another_run_is_not_admitted():
    """law: it is told which run is there; process 0 waits for its own, and both then meet."""
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, address, Hello(0, 2, HOST, "train runs/a"), 20.0)
        with pytest.raises(ValueError) as refusal:
            meet(address, Hello(1, 2, HOST, "train runs/b"), 20.0)
        message = str(refusal.value)
        assert message.startswith(f"process 1 ({HOST}) of 'train runs/b' reached process 0")
        assert "of another run, 'train runs/a'" in message
        second = meet(address, Hello(1, 2, HOST, "train runs/a"), 20.0)
        assert first.result() == second and second.hosts == [HOST] * 2
    alone, refused = meetings([0, 1], [2, 2], 1.0, runs=["train runs/a", "train runs/b"])
    assert alone.startswith("StartupTimeoutError: process 1 of 2 did not connect")
    assert f"Refused, as of another run than 'train runs/a': process 1 ({HOST})" in alone
    assert refused.startswith("ValueError: process 1")


def test_a_process_that_starts_twice():
    """law: one that connects, dies and is started again has its place."""
    port = free_port()
    address, run = f"127.0.0.1:{port}", "train runs/rl"
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, address, Hello(0, 3, HOST, run), 20.0)
        with connection(port) as visitor:
            visitor.sendall(hello(count=3))
            time.sleep(0.2)
        time.sleep(0.2)
        others = [pool.submit(meet, address, Hello(n, 3, HOST, run), 20.0) for n in (1, 2)]
        assert first.result() == others[0].result() == others[1].result()
        assert first.result().hosts == [HOST] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_is_lost_before_jax_connects(capfd, monkeypatch):
    """law: the others end with 70 and name it; one that has connected may go.

    JAX used to abort them after its time limit, with a native stack trace.
    """
    statuses = []

    def leave(status):
        statuses.append(status)
        raise SystemExit  # of the watching thread

    monkeypatch.setattr(start_watch.os, "_exit", leave)
    for farewell, ended in ((b"", True), (start_watch.CONNECTED, False)):
        (mine, theirs), statuses[:] = socket.socketpair(), []
        with start_watch.StartWatch({1: mine}, ["a", "b"], 20.0) as watch:
            theirs.sendall(farewell)
            theirs.close()
            watch.thread.join(0.5)
        assert statuses == ([70] if ended else [])
        message = "process 1 (b) ended while the processes connected; see its output."
        assert (message in capfd.readouterr().err) == ended


MISMATCHES = {
    "counts": (
        [0, 1],
        [2, 3],
        "ValueError: process 1 (%s) expects 3 processes, process 0 expects 2",
    ),
    "numbers": ([0, 1, 1], [3, 3, 3], "ValueError: two processes have the index 1, on %s and"),
    "beyond": ([0, 2], [2, 2], "ValueError: process 2 (%s) is beyond the 2 processes"),
    "missing": ([0, 2], [3, 3], "StartupTimeoutError: process 1 of 3 did not connect to"),
    "no first": ([1, 2], [3, 3], "StartupTimeoutError: process 0 of 3 did not connect to"),
}


@pytest.mark.parametrize("case", MISMATCHES.values(), ids=MISMATCHES.keys())
def test_what_does_not_fit_is_told_to_all(case):
    """law: the same sentence everywhere, with numbers and hosts."""
    numbers, counts, message = case
    message = message.replace("%s", HOST)
    for answer in meetings(numbers, counts, seconds=2.0):
        assert answer.startswith(message), answer


def listening(address):
    return [entry.getsockname()[0] for entry in module._listen(address)]


def test_process_0_listens_on_the_coordinators_interface_alone(monkeypatch):
    """law: loopback for loopback; a name that means loopback here gets the main interface too."""
    port = free_port()
    assert listening(f"127.0.0.1:{port}") == ["127.0.0.1"]
    assert set(listening(f"localhost:{port}")) <= {"127.0.0.1", "::1"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 0))]
    )
    addresses = [name for _, name in module._interfaces("node-1", f"node-1:{port}")]
    assert addresses[0] == "127.0.1.1" and not {"0.0.0.0", "::"} & set(addresses)


ADDRESSES = {
    "every interface": ("0.0.0.0", "is every interface of process 0"),
    "every one of IPv6": ("[::]", "is every interface of process 0"),
    "not its own": ("192.0.2.7", "does not have the address 192.0.2.7"),
}


@pytest.mark.parametrize("case", ADDRESSES.values(), ids=ADDRESSES.keys())
def test_addresses_that_process_0_cannot_listen_on(case):
    """law: they are refused with the way out; nothing listens on all interfaces instead."""
    host, message = case
    with pytest.raises(ValueError, match=message):
        meet(f"{host}:{free_port()}", Hello(0, 2, HOST, ""), 1.0)


def test_an_address_behind_another(monkeypatch):
    """law: with NTKRL_BIND_ADDRESS it listens there, while the others use the other address."""
    monkeypatch.setenv(module.BIND_VARIABLE, "127.0.0.1")
    monkeypatch.setattr(module, "_connect", None)
    address = f"198.51.100.1:{free_port()}"
    meeting = meet(address, Hello(0, 1, HOST, ""), 1.0)
    assert meeting.address == address and meeting.bind_address.startswith("127.0.0.1:")
    assert os.environ[module.BIND_VARIABLE] == "127.0.0.1"
