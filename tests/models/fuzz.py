"""Load many damaged model directories, each in a process of its own, and report what went wrong.

    python -m tests.models.fuzz --count=500 --seed=0
    python -m tests.models.fuzz --numbers=40,311        # some of them again

Prints JSON: directories refused in a sentence and accepted; and those with another exception, a
message that names no file, more than SECONDS or more memory than MOST_MEMORY.
"""

import argparse
import collections
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

SECONDS = 20
MOST_MEMORY = 2**30  # bytes beyond an intact directory's and twice its files
LONGEST_MESSAGE = 4000


def in_child(call, log):
    """Run a function in a forked process; return its exit status, seconds and peak memory.

    Seconds are those of the processor, whatever else runs; a process that waits is ended.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 3
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (12 * 2**30, 12 * 2**30))
            status = call()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            seconds = usage.ru_utime + usage.ru_stime
            return os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024
        if time.monotonic() - start > 6 * SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, time.monotonic() - start, 0
        time.sleep(0.01)


def load(directory):
    """Load a directory and run it once; return 0, or 2 after printing a sentence, as `ntkrl`."""
    import jax

    from tests.models.damage import read

    try:
        with jax.default_matmul_precision("highest"):
            jax.block_until_ready(jax.jit(read(directory))())
    except (ValueError, OSError) as error:
        print(f"ntkrl: {error}")
        return 2
    return 0


def run(place, numbers, seed):
    """Damage and load directories by number; return a report."""
    import jax  # noqa: F401  (imported once, before the forks; it starts no threads until it is used)
    import transformers  # noqa: F401

    from tests.models import damage

    log, bases = place / "log", []

    def write():
        damage.write_bases(place / "bases")
        return 0

    status, _, _ = in_child(write, log)
    assert status == 0, log.read_text()
    for path in sorted((place / "bases").iterdir()):
        bases.append(damage.Base(path.name, "", path))
    _, _, usual = in_child(lambda: load(bases[0].path), log)
    counts, problems, slowest, largest = collections.Counter(), [], 0.0, 0
    kinds = list(damage.damages())
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        base, kind = bases[number % len(bases)], kinds[number // len(bases) % len(kinds)]
        directory = place / f"case-{number}"
        damage.copy_of(base, directory)
        name = damage.damage(rng, base, directory, kind)
        files = sum(p.lstat().st_size for p in directory.iterdir())
        status, seconds, memory = in_child(lambda: load(directory), log)  # noqa: B023
        text = log.read_text(errors="replace")
        sentence = text.strip().rpartition("ntkrl: ")[2]
        counts["accepted" if status == 0 else "refused" if status == 2 else "other"] += 1
        slowest, largest = max(slowest, seconds), max(largest, memory - usual - 2 * files)
        faults = []
        if status not in (0, 2):
            faults.append(f"status {status}: {text[-1500:]}")
        if "Traceback" in text or "panicked" in text:
            faults.append(f"a trace: {text[-1500:]}")
        if status == 2 and (str(place) not in sentence or len(sentence) > LONGEST_MESSAGE):
            faults.append(f"a message that names no file or is long: {sentence[:500]}")
        if seconds > SECONDS or memory > usual + 2 * files + MOST_MEMORY:
            faults.append(f"{seconds:.0f} s, {(memory - usual) / 2**20:.0f} MiB")
        if faults:
            problems.append({"number": number, "damage": name, "faults": faults})
            print(f"{number}: {name}: {faults}", file=sys.stderr)
        shutil.rmtree(directory)
    figures = {"slowest (s)": round(slowest, 1), "most memory (MiB)": round(largest / 2**20)}
    return {"count": len(numbers), **counts, **figures, "problems": problems}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numbers", default="")
    arguments = parser.parse_args()
    numbers = list(map(int, filter(None, arguments.numbers.split(",")))) or range(arguments.count)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), numbers, arguments.seed), indent=1))
