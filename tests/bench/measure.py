"""Measure time and memory of a call, in a separate process if needed, and print tables.

`run_isolated` runs `python -m tests.bench.measure module:function result.json` with the arguments
as JSON on its standard input.
"""

import ctypes
import dataclasses
import gc
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = re.compile(
    r"MemoryError|RESOURCE_EXHAUSTED|out of memory|can't allocate memory", re.I
)
ROOT = Path(__file__).resolve().parents[2]


def run_isolated(
    function_path: str, kwargs: Mapping[str, Any], timeout_seconds: float
) -> dict[str, Any]:
    """Run `module:function` in a new process; arguments and the resulting dict pass as JSON.

    Returns:
      The function's result, or `{"failed": reason}` if time or memory ran out.

    Raises:
      RuntimeError: the process failed for any other reason; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as directory:
        result, log = Path(directory) / "result.json", Path(directory) / "log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.measure", function_path, str(result)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                text=True,
            )
            try:
                process.communicate(json.dumps(dict(kwargs)), timeout_seconds)
            except subprocess.TimeoutExpired:
                return {"failed": f"did not finish in {timeout_seconds:g} s"}
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode == 0:
            return json.loads(result.read_text(encoding="utf-8"))
        tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    if process.returncode == -signal.SIGKILL or OUT_OF_MEMORY.search(tail):
        return {"failed": "out of memory"}
    raise RuntimeError(f"{function_path} ended with {process.returncode}:\n{tail}")


@dataclasses.dataclass
class Peak:
    """The result of `peak_memory`: `mib`, set at the end of the block."""

    mib: float = float("nan")


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure how far the process's memory grows inside a block, in MiB (Linux only).

    Freed memory is first returned to the system and the kernel's high-water mark (VmHWM) reset.
    The result is the mark at the end less the resident memory (VmRSS) at the start: inputs made
    before do not count, results and scratch memory do, and compiled code and the compiler's memory
    do only if compiled inside; call once before to exclude them.
    """
    gc.collect()
    time.sleep(0.2)  # runtimes free dropped arrays a moment later, in other threads
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, peak = status_mib("VmRSS"), Peak()
    try:
        yield peak
    finally:
        peak.mib = status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    """Return the process's memory in MiB: VmRSS, resident, or VmHWM, its peak (Linux only).

    Unlike `getrusage`'s maximum, VmHWM does not inherit the peak of the parent process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M)[1]) / 1024


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median wall time of a call, which must block until its result is ready."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def medians_in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, wait: Callable[[Any], Any]
) -> dict[str, float]:
    """Return the median wall time of each of several interleaved calls, after a warm-up round.

    Args:
      calls: by name.
      repeats: rounds.
      wait: blocks until the result of a call is ready.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            wait(call())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Format rows as plain text: a header, one line per row, columns as wide as needed.

    Numbers are right-aligned, floats have four digits, missing values are blank.
    """
    cells = [[_shown(row.get(column, "")) for column in columns] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    right = [all(isinstance(row.get(column, 0), int | float) for row in rows) for column in columns]
    lines.insert(1, ["-" * width for width in widths])
    pad = lambda cell, i: cell.rjust(widths[i]) if right[i] else cell.ljust(widths[i])  # noqa: E731
    return "\n".join("  ".join(pad(c, i) for i, c in enumerate(line)).rstrip() for line in lines)


def write_json(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a JSON list, one row per line."""
    lines = ",\n".join(json.dumps(dict(row)) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _main(function_path: str, result: str) -> None:
    # if memory runs out, this process is the one to be killed
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    module, function = function_path.split(":")
    actual = getattr(importlib.import_module(module), function)(**json.load(sys.stdin))
    Path(result).write_text(json.dumps(actual), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
