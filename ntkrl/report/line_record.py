"""Records of the lines of `metrics.jsonl`: their number, their checksum and a compressed copy.

A checkpoint stores the record of the lines that it stands on, so that a resumed run has them all:
lines that the file lost are restored from the copy. The mark of a finished run stores number and
checksum.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkrl import durable_files
from ntkrl.json_files import parse_json

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
FINISHED_FILE = "finished"
COMPRESSION = 1
"""zlib's fastest level; metrics repeat their names in every line."""


@dataclasses.dataclass(frozen=True)
class LineRecord:
    """The lines of a run directory, as a checkpoint stores them.

    lines: number of lines of `metrics.jsonl`. sha256: of these lines. timings: number of lines of
    `timings.jsonl`. packed: the lines of `metrics.jsonl` in zlib's format and base64.
    """

    lines: int
    sha256: str
    timings: int
    packed: str

    def content(self) -> bytes:
        """Return the recorded lines."""
        return zlib.decompress(base64.b64decode(self.packed))


class LineRecorder:
    """The record of lines that are being appended."""

    def __init__(self) -> None:
        """Start without lines."""
        self.lines = self.size = 0
        self._hash = hashlib.sha256()
        self._compressor = zlib.compressobj(COMPRESSION)
        self._packed = bytearray()

    def add(self, line: bytes) -> None:
        """Add a line, which ends in a newline."""
        self.lines, self.size = self.lines + 1, self.size + len(line)
        self._hash.update(line)
        self._packed += self._compressor.compress(line)

    def record(self, timings: int) -> LineRecord:
        """Return the record of the lines so far."""
        packed = bytes(self._packed) + self._compressor.copy().flush()
        text = base64.b64encode(packed).decode("ascii")
        return LineRecord(self.lines, self._hash.hexdigest(), timings, text)


def restore_lines(directory: Path, record: LineRecord) -> list[str]:
    """Reduce `metrics.jsonl` to the recorded lines, restoring them where they are not intact.

    A file that differs from them is first renamed to `metrics.jsonl.damaged`, or `.damaged.2` and
    so on. Lost timings cannot be restored; they affect no result.

    Returns:
      Sentences for the log: what was lost, and what was restored.
    """
    messages, path = [], directory / METRICS_FILE
    problem = line_problem(path, record.lines, record.sha256)
    content = record.content()
    if problem is not None:
        place = ""
        if path.exists():
            names = itertools.chain(["damaged"], (f"damaged.{n}" for n in itertools.count(2)))
            places = (path.with_name(f"{METRICS_FILE}.{name}") for name in names)
            damaged = next(place for place in places if not place.exists())
            path.rename(damaged)
            place = f", and the file as it was is called {damaged.name}"
        messages.append(
            f"{directory}: {problem}; all {record.lines} are restored from the copy in the "
            f"checkpoint{place}"
        )
    if problem is not None or path.stat().st_size != len(content):
        with durable_files.replacing(path) as file:
            file.write(content)
    timings = count_objects(directory / TIMINGS_FILE)
    if timings < record.timings:
        messages.append(
            f"{directory}: {TIMINGS_FILE} has lost {record.timings - timings} of "
            f"{record.timings} lines; going on without them, no result depends on timings"
        )
    return messages


def line_problem(path: Path, lines: int, sha256: str) -> str | None:
    """Return how the first lines of a file differ from recorded ones; None if they are intact."""
    if not path.exists():
        return f"{path.name} is missing"
    present = path.read_bytes().splitlines(keepends=True)[:lines]
    complete = sum(line.endswith(b"\n") for line in present)
    if complete < lines:
        return f"{path.name} has {complete} of {lines} lines"
    if hashlib.sha256(b"".join(present)).hexdigest() != sha256:
        return f"the first {lines} lines of {path.name} have changed since they were written"
    return None


def mark_finished(
    directory: Path, rollout_steps: int, record: LineRecord, exports: Iterable[str]
) -> None:
    """Write the file that marks a run directory as finished, and states what it then contained.

    Args:
      directory: the run directory.
      rollout_steps: number of them.
      record: of the lines of `metrics.jsonl`.
      exports: names of the directories of exported models.
    """
    files = {}
    for path in sorted(path for name in exports for path in (directory / name).rglob("*")):
        if path.is_file():  # others than weights may be edited
            size = path.stat().st_size if path.suffix == ".safetensors" else None
            files[str(path.relative_to(directory))] = size
    mark = {
        "rollout_steps": rollout_steps,
        "metrics": {"lines": record.lines, "sha256": record.sha256},
        "files": files,
    }
    durable_files.save_text(directory / FINISHED_FILE, json.dumps(mark, indent=2) + "\n")


def finished_problems(directory: Path, exports: bool = True) -> list[str] | None:
    """Return how a run directory differs from its mark as finished; None without a mark.

    Args:
      directory: the run directory.
      exports: also check the exported models.
    """
    path = directory / FINISHED_FILE
    if not path.exists():
        return None
    try:
        mark = parse_json(path.read_text(encoding="utf-8"))
        lines, sha256 = int(mark["metrics"]["lines"]), str(mark["metrics"]["sha256"])
        files: Mapping[str, Any] = dict(mark["files"]) if exports else {}
    except (ValueError, LookupError, TypeError):
        return [f"the file {FINISHED_FILE} does not state what it vouches for"]
    problem = line_problem(directory / METRICS_FILE, lines, sha256)
    problems = [] if problem is None else [problem]
    for name, size in files.items():
        if not (directory / name).is_file():
            problems.append(f"{name} is missing")
        elif size is not None and (directory / name).stat().st_size != size:
            actual = (directory / name).stat().st_size
            problems.append(f"{name} has {actual} of {size} bytes")
    return problems


def count_objects(path: Path) -> int:
    """Return the number of JSON objects among the lines of a file; 0 for a missing file."""
    return sum(map(is_object, path.read_bytes().split(b"\n"))) if path.exists() else 0


def is_object(line: bytes) -> bool:
    """Return whether a line is a complete JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def changed_files(directory: Path, sizes: Mapping[str, int]) -> Sequence[str]:
    """Return the recorded files that are missing or have another size."""
    return [
        name
        for name, size in sizes.items()
        if not (directory / name).is_file() or (directory / name).stat().st_size != size
    ]


def file_sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the files of probe readings and ledgers, by name."""
    paths = [path for room in ("probes", "ledger") for path in (directory / room).glob("*.*")]
    names = {str(path.relative_to(directory)): path for path in sorted(paths) if path.is_file()}
    return {name: path.stat().st_size for name, path in names.items() if path.name[0] != "."}
