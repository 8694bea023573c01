"""Signals are heard while the main thread is in a library's call, and end commands in order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# a command that is interrupted in Python, or in a library's call that runs no Python code
COMMAND = """
import hashlib, sys, time
from ntkrl import main, run_lock, signals
assert "jax" not in sys.modules
kind, directory = sys.argv[1:]
if kind == "ignored":
    import signal
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
signals.GRACE_SECONDS = 1.0
def presets(words):
    with run_lock.DirectoryLock(directory, "presets"):
        try:
            print("started", flush=True)
            if kind == "library":
                hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
            time.sleep(2 if kind == "ignored" else 60)
        finally:
            print("left in order", flush=True)
main.RUNNERS.update(presets=presets, study=presets)
sys.exit(main.main(["study" if kind == "study" else "presets"]))
"""


def start(kind, directory):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, kind, str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    if kind == "library":
        time.sleep(0.3)  # until it is in the call
    return process


@pytest.mark.parametrize(
    ("kind", "sent", "status", "message"),
    [
        ("python", signal.SIGINT, 130, "interrupted; the same command goes on from what is saved"),
        ("python", signal.SIGTERM, 143, "ntkrl presets: stopped by SIGTERM"),
        ("python", signal.SIGHUP, 129, "ntkrl presets: stopped by SIGHUP"),
        ("study", signal.SIGTERM, 75, "ntkrl study: stopped by SIGTERM"),
    ],
)
def test_a_command_ends_in_order(kind, sent, status, message, tmp_path):
    """story: contexts are left, the lock given back, the signal named; the status says which."""
    process = start(kind, tmp_path / "run")
    process.send_signal(sent)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == status, output
    assert "left in order" in output and message in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_second_interrupt_ends_a_librarys_call(tmp_path):
    """story: SIGINT in a long call is answered within seconds; the next one ends the process.

    Python's own handlers would run after the call, in minutes.
    """
    process, begun = start("library", tmp_path / "run"), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "\n"
    assert "press Ctrl-C again to end at once" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and "ended at once" in output
    assert time.monotonic() - begun < 10 and not (tmp_path / "run").exists()


def test_sigterm_ends_a_librarys_call(tmp_path):
    """story: a call that does not return is ended after the grace, by the signal."""
    process, begun = start("library", tmp_path / "run"), time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - begun < 10
    assert not (tmp_path / "run").exists()


def test_ignored_signals_stay_ignored(tmp_path):
    """law: under nohup SIGHUP ends nothing, nor SIGINT in a script's background job."""
    process = start("ignored", tmp_path / "run")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "left in order\n" and process.returncode == 0
