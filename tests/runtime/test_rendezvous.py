"""Law: processes find each other at a port, whoever is first, and hear of what does not fit."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ntkrl.runtime.distributed import StartupTimeoutError, rendezvous
from tests.hosts import free_port


def meetings(numbers, counts, seconds=20.0, before=None):
    """Let threads meet as processes do; return what each found or was told."""
    address = f"127.0.0.1:{free_port()}"

    def one(number, count):
        try:
            return rendezvous(address, count, number, seconds)
        except (StartupTimeoutError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(len(numbers) + 1) as pool:
        if before is not None:
            pool.submit(before, address)
        return list(pool.map(one, numbers, counts))


def test_all_come():
    """law: every process hears every host's name."""
    assert meetings([2, 1, 0], [3, 3, 3]) == [[socket.gethostname()] * 3] * 3


def test_a_stranger_comes_too():
    """law: what is no process of ours is not counted, and keeps nobody out."""

    def stranger(address):
        host, port = address.split(":")
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port)), timeout=5) as connection:
                    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return
            except ConnectionRefusedError:
                pass

    assert meetings([0, 1], [2, 2], before=stranger) == [[socket.gethostname()] * 2] * 2


WRONG = {
    "counts": (
        [0, 1],
        [2, 3],
        "ValueError: process 1 (%s) expects 3 processes, process 0 expects 2",
    ),
    "numbers": ([0, 1, 1], [3, 3, 3], "ValueError: two processes have the index 1, on %s and"),
    "missing": ([0, 2], [3, 3], "StartupTimeoutError: process 1 of 3 did not connect to"),
    "no first": ([1, 2], [3, 3], "StartupTimeoutError: process 0 of 3 did not connect to"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_told_to_all(case):
    """law: the same sentence everywhere, with numbers and hosts."""
    numbers, counts, message = case
    message = message.replace("%s", socket.gethostname())
    for told in meetings(numbers, counts, seconds=2.0):
        assert told.startswith(message), told
