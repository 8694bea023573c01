"""Locks of directories: of 20 overlapping starts one holds it, whatever `flock` does."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ntkrl import lease, run_lock
from ntkrl.main import main

ROOT = Path(__file__).resolve().parent.parent

# enters the lock, says so, and waits for its stdin to end; in other forms than "flock", that call
# is missing ("absent"), or locks nothing ("granted")
HOLDER = """
import errno, fcntl, os, socket, sys
directory, form, host = sys.argv[1:4]
def absent(descriptor, how):
    raise OSError(errno.ENOSYS, "not implemented")
if form != "flock":
    fcntl.flock = absent if form == "absent" else lambda descriptor, how: None
from ntkrl import lease, run_lock
from ntkrl.main import main
assert "jax" not in sys.modules and "numpy" not in sys.modules
if host != "here":
    socket.gethostname = lease.machine = lambda: host
try:
    with run_lock.DirectoryLock(directory, "train", log=lambda line: print(line, flush=True)):
        print("entered", os.getpid(), flush=True)
        sys.stdin.read()
except run_lock.InUseError as error:
    print(error, flush=True)
"""
# takes the lock again and again; two inside at once are seen by the exclusive file
CHURN = """
import errno, fcntl, os, random, sys, time
from pathlib import Path
directory, form = Path(sys.argv[1]), sys.argv[2]
if form != "flock":
    fcntl.flock = lambda descriptor, how: None
from ntkrl import run_lock
end, entered = time.monotonic() + float(sys.argv[3]), 0
while time.monotonic() < end:
    try:
        with run_lock.DirectoryLock(directory / "run", "train", log=lambda line: None):
            os.close(os.open(directory / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(random.uniform(0, 0.003))
            os.unlink(directory / "inside")
            entered += 1
    except run_lock.InUseError:
        time.sleep(random.uniform(0, 0.002))
print(entered)
"""


class Starts:
    """Processes that take a lock; all are ended."""

    def __init__(self):
        self.processes = []

    def start(self, directory, form="flock", host="here", **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(directory), form, host],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def starts():
    result = Starts()
    yield result
    result.end()


@pytest.mark.parametrize(
    "form", ["flock", "granted", pytest.param("absent", marks=pytest.mark.slow)]
)
def test_one_of_twenty_overlapping_starts(form, starts, tmp_path):
    """law: one enters, 19 are refused and name it; after SIGKILL the next takes over, and says so.

    Without the lease the starts of the last two forms would all enter.
    """
    run = tmp_path / "run"
    processes = [starts.start(run, form) for _ in range(20)]
    lines = [process.stdout.readline() for process in processes]
    entered = [
        process
        for process, line in zip(processes, lines, strict=True)
        if line.startswith("entered")
    ]
    assert len(entered) == 1, lines
    (holder,) = entered
    for line in lines:
        if not line.startswith("entered"):
            assert line.startswith(f"{run} is in use by `train` on "), line
            assert f"process {holder.pid}, since 20" in line and "UTC, last heartbeat" in line
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    after = starts.start(run, form)
    assert "the process of `train` on " in after.stdout.readline()
    assert after.stdout.readline() == f"entered {after.pid}\n"
    assert after.communicate("")[0] == "" and list(run.iterdir()) == []


@pytest.mark.parametrize("form", [pytest.param("flock", marks=pytest.mark.slow), "granted"])
def test_never_two_at_once(form, tmp_path):
    """law: processes that take and release as fast as they can never overlap."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHURN, str(tmp_path), form, "1.0"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    results = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in results] == [""] * 6
    assert sum(int(text) for text, _ in results) > 20
    assert list((tmp_path / "run").glob("*")) == []


def test_another_host_is_watched(starts, tmp_path):
    """story: a start on another host is refused within the limit while the first one beats."""
    limit = {"NTKRL_LEASE_TIMEOUT": "2"}
    holder = starts.start(tmp_path, "granted", "first", **limit)
    assert holder.stdout.readline().startswith("entered")
    begun = time.monotonic()
    other = starts.start(tmp_path, "granted", "second", **limit)
    watching = other.stdout.readline()
    assert "was in use by `train` on first" in watching and "watching for up to 2 s" in watching
    assert "is in use by `train` on first" in other.stdout.readline()
    assert time.monotonic() - begun < 1.9


def test_a_silent_lease_of_another_host_is_taken_over(starts, tmp_path):
    """story: a host that froze loses its lease after the limit, and ends once it goes on."""
    limit = {"NTKRL_LEASE_TIMEOUT": "1"}
    frozen = starts.start(tmp_path, "granted", "first", **limit)
    assert frozen.stdout.readline().startswith("entered")
    frozen.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    other = starts.start(tmp_path, "granted", "second", **limit)
    assert "was in use" in other.stdout.readline()
    assert "taking over" in (line := other.stdout.readline()) and "is silent" in line
    assert other.stdout.readline() == f"entered {other.pid}\n"
    assert 0.9 < time.monotonic() - begun < 5
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(20) == run_lock.LOST
    assert "another start took it over" in frozen.stdout.read()


def test_an_unreadable_lease_is_watched(tmp_path, monkeypatch):
    """law: of a start that wrote nothing, or whose content is lost: said, and taken over."""
    monkeypatch.setenv("NTKRL_LEASE_TIMEOUT", "0.2")
    monkeypatch.setattr(run_lock, "NAME_SECONDS", 0.05)
    (tmp_path / ".run.lease.1").touch()
    lines = []
    with run_lock.DirectoryLock(tmp_path, "train", log=lines.append):
        assert "in use by a command that left no name; watching for up to 0.2 s" in lines[0]
        assert "taking over" in lines[1] and "an unreadable lease, is silent" in lines[1]


def test_a_lease_is_synced(tmp_path, monkeypatch):
    """law: after a power cut a lease names its process, which is then known to be gone."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    with run_lock.DirectoryLock(tmp_path, "train"):
        (path,) = tmp_path.glob(".run.lease.*")
        assert path.stat().st_ino in {status.st_ino for status in synced if status.st_size}


def test_process_numbers_are_reused(tmp_path):
    """law: a lease whose number now belongs to a younger process, or a zombie, has ended."""
    lock = run_lock.DirectoryLock(tmp_path, "train")
    assert lock.lease.is_here() and lock.lease.is_alive()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while lease.birth(zombie.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lease.birth(zombie.pid) == ""  # "?" or a time would keep its lock for ever
    zombie.wait()
    older = dataclasses.replace(lock.lease, birth="1")
    assert not older.is_alive()


def test_a_lock_is_given_back(tmp_path, capsys):
    """law: released after an error too; a second one in the process is refused, other names not."""
    run = tmp_path / "deep" / "run"
    with pytest.raises(KeyError), run_lock.DirectoryLock(run, "train"):
        with run_lock.DirectoryLock(run, "evaluate", name="test"):
            pass
        with pytest.raises(run_lock.InUseError, match=f"process {os.getpid()}"):
            run_lock.DirectoryLock(run, "train").__enter__()
        raise KeyError
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""
    run.mkdir(parents=True)
    (run / "mine").touch()
    with run_lock.DirectoryLock(run, "train"):
        assert len(list(run.iterdir())) == 3
        run_lock.release_all()
        assert [path.name for path in run.iterdir()] == ["mine"]
    assert [path.name for path in run.iterdir()] == ["mine"]


def test_the_limit_is_checked(tmp_path, monkeypatch):
    """law: a limit that is no positive number is a mistake, before anything is written."""
    monkeypatch.setenv("NTKRL_LEASE_TIMEOUT", "-3")
    with pytest.raises(ValueError, match="NTKRL_LEASE_TIMEOUT=-3 must be a positive number"):
        run_lock.DirectoryLock(tmp_path / "run", "train").__enter__()
    assert not (tmp_path / "run").exists()


def test_a_lock_on_a_full_disk(small_disk):
    """law: the lock is not taken without a lease that others can read, and nothing stays behind."""
    disk = small_disk("16k")
    (disk / "full").write_bytes(bytes(16 * 1024))
    with pytest.raises(OSError, match="No space left"):
        run_lock.DirectoryLock(disk, "train").__enter__()
    assert [path.name for path in disk.iterdir()] == ["full"]


IN_USE = {
    "train": ("", "run", ["train", "--config=configs/sft.py"]),
    "prepare": ("", "run", ["prepare", "--config=configs/paper/miniature.py:data"]),
    "evaluate": ("evaluations", "mine", ["evaluate", "--config=configs/rl.py"]),
}


@pytest.mark.parametrize("case", IN_USE.values(), ids=IN_USE.keys())
def test_a_second_command_is_refused(case, tmp_path, monkeypatch, capsys):
    """story: status 2 and a sentence with the holder, before any work; the first one's is kept."""
    monkeypatch.chdir(ROOT)
    place, name, words = case
    words = [*words, f"--config.run_dir={tmp_path}"]
    if words[0] == "evaluate":
        words += ["--config.eval.name=mine", "--config.model.path=none"]
        words.append("--config.reward.function=exact_match")
    with run_lock.DirectoryLock(tmp_path / place, "ntkrl first", name=name) as lock:
        assert main(words) == 2
        assert f"is in use by `ntkrl first` on {lock.lease.host}" in capsys.readouterr().err
        assert lock.path.exists() and len(list(lock.directory.iterdir())) == 2
