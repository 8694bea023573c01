"""Commands of a study: several at a time, each on its own cores, none repeated after success."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ntkrl import durable_files
from ntkrl.report import FINISHED_FILE, finished_problems

COMMANDS_FILE = "commands.txt"
TAIL_LINES = 5
"""Lines of a failed command's log in its error message."""


class Job(NamedTuple):
    """One command.

    name: label in the progress bar, and name of its log.
    words: after `ntkrl`.
    done: file that exists once the command has succeeded.
    """

    name: str
    words: tuple[str, ...]
    done: Path


def run_jobs(title: str, jobs: Sequence[Job], parallel: int, root: Path) -> None:
    """Run the commands that have not succeeded before.

    Args:
      title: of the progress bar.
      jobs: in starting order.
      parallel: commands at a time, ≥ 1.
      root: directory of logs, `commands.txt` and the compilation cache.

    Raises:
      ValueError: a command failed; the others are terminated.
    """
    pending = [job for job in jobs if not _is_done(job)]
    cores = _core_shares(parallel)
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    finished = len(jobs) - len(pending)
    with tqdm(total=len(jobs), initial=finished, desc=title, mininterval=1) as bar:
        try:
            while pending or running:
                for slot in range(parallel):
                    if pending and slot not in running:
                        job = pending.pop(0)
                        running[slot] = job, _start(job, root, cores[slot], parallel)
                bar.set_postfix_str(", ".join(j.name for j, _ in running.values()), refresh=False)
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


def environment(parallel: int) -> dict[str, str]:
    """Return the environment of a command, with a share of the GPU's memory."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / parallel:.3f}", **os.environ}


def started_commands(root: Path) -> list[str]:
    """Return the commands that a study has started, without repetition."""
    path = root / COMMANDS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list(dict.fromkeys(lines))


def _start(job: Job, root: Path, cores: Sequence[int], parallel: int) -> subprocess.Popen:
    log = _log(job, root)
    if log.exists() and not (root / COMMANDS_FILE).exists():
        raise ValueError(
            f"{log} exists, but no study has run in {root}; move it, or set another "
            "--config.run_dir."
        )
    durable_files.make_directory(log.parent)
    with (root / COMMANDS_FILE).open("a", encoding="utf-8") as file:
        file.write(" ".join(["ntkrl", *job.words]) + "\n")
        durable_files.sync_file(file)
    command = [sys.executable, "-m", "ntkrl", *job.words]
    with log.open("w", encoding="utf-8") as file:
        variables = environment(parallel)
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables)
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return process


def _is_done(job: Job) -> bool:
    """Return whether a command has succeeded: of a training run, with all its metrics."""
    if job.done.name == FINISHED_FILE:
        return finished_problems(job.done.parent, exports=False) == []
    return job.done.exists()


def _check(job: Job, status: int, root: Path) -> None:
    if status == 0 and job.done.exists():
        return
    lines = _log(job, root).read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(line.rpartition("\r")[2] for line in lines[-TAIL_LINES:])
    raise ValueError(
        f"{job.name} ended with status {status}; run the same command again to resume there. The "
        f"end of its log, {_log(job, root)}:\n{tail}"
    )


def _log(job: Job, root: Path) -> Path:
    return root / "logs" / f"{job.name.replace(' ', '_').replace(',', '')}.txt"


def _core_shares(parallel: int) -> list[list[int]]:
    """Divide this process's cores; empty shares where there are too few or none are known."""
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * parallel
    cores = sorted(os.sched_getaffinity(0))
    return [cores[slot::parallel] if len(cores) >= parallel else [] for slot in range(parallel)]
