"""Running a study's commands, several at a time, each on cores of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ntkrl.study.plan import Job

TAIL = 5
"""Lines of a failed command's log that are shown."""


def run_jobs(title: str, jobs: Sequence[Job], together: int, root: Path) -> None:
    """Run the commands that have not ended well before.

    Args:
      title: of the bar.
      jobs: in the order they are started.
      together: how many at a time, ≥ 1.
      root: directory of logs and compiled programs.

    Raises:
      ValueError: a command failed; the others were told to end.
    """
    todo = [job for job in jobs if not job.done.exists()]
    cores = _shares(together)
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, mininterval=1) as bar:
        try:
            while todo or running:
                for slot in range(together):
                    if todo and slot not in running:
                        job = todo.pop(0)
                        running[slot] = job, _start(job, root, cores[slot], together)
                names = ", ".join(job.name for job, _ in running.values())
                bar.set_postfix_str(names, refresh=False)
                for slot, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        _check(job, process.returncode, root)
                        bar.update()
                time.sleep(0.1)
        finally:
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
            for _, process in running.values():
                process.wait()


def environment(root: Path, together: int) -> dict[str, str]:
    """Return what runs find in their environment: compiled programs, and a share of a GPU."""
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / together:.3f}",
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str((root / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _start(job: Job, root: Path, cores: Sequence[int], together: int) -> subprocess.Popen:
    log = _log(job, root)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ntkrl", *job.words]
    with (root / "commands.txt").open("a", encoding="utf-8") as file:
        file.write(" ".join(["ntkrl", *job.words]) + "\n")
    given = environment(root, together)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=given)
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return process


def _check(job: Job, status: int, root: Path) -> None:
    if status == 0 and job.done.exists():
        return
    lines = _log(job, root).read_text(encoding="utf-8", errors="replace").splitlines()
    told = "\n".join(line.rpartition("\r")[2] for line in lines[-TAIL:])
    raise ValueError(
        f"{job.name} ended with status {status}; the same command goes on there. It said, in "
        f"{_log(job, root)}:\n{told}"
    )


def _log(job: Job, root: Path) -> Path:
    return root / "logs" / f"{job.name.replace(' ', '_').replace(',', '')}.txt"


def _shares(together: int) -> list[list[int]]:
    """Deal this process's cores out; no shares where the system knows no affinity."""
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * together
    cores = sorted(os.sched_getaffinity(0))
    return [cores[slot::together] if len(cores) >= together else [] for slot in range(together)]
