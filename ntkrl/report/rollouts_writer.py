"""The files `rollouts/steps_*.jsonl.gz` of a run directory: appended, shortened and thinned out.

A file has the rollout steps of a range, each a member of gzip's format with one line of JSON, so
that all standard tools read it, also while the run goes on. Within a limit of bytes every step is
kept; at the limit every second one, then every fourth, and so on, of the steps so far and of those
to come. `every` in `kept.json` says which. Steps to which something refers, such as those with a
ledger, stay longer (see `is_kept`).

Equal runs give equal files, resumed or not: which steps stay depends on the sizes of those before,
and a resumed run that has dropped some already would have dropped them again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ntkrl import durable_files
from ntkrl.json_files import MAX_RECORD_BYTES, read_object

DIRECTORY = "rollouts"
STEPS_PER_FILE = 100
MAX_STEPS = 4000
"""Most steps kept, whatever their sizes: a page or a person looks at no more."""
KEPT_FILE = "kept.json"
FILE_NAME = re.compile(r"steps_\d{6,12}\.jsonl\.gz")
COMPRESSION = 1
"""zlib's fastest level, which takes a third of the time of the usual one."""
GZIP_BITS = 16 + zlib.MAX_WBITS
PIECE = 2**16


class RolloutsWriter:
    """Appends rollout steps to the files of a run directory."""

    def __init__(
        self,
        directory: Path,
        limit_mib: float,
        start: int,
        pinned_every: int | None,
        log: Callable[[str], None],
    ):
        """Open the files for appending; remove the steps after `start`, and a damaged end.

        Args:
          directory: the run directory.
          limit_mib: most MiB that the files take.
          start: rollout steps of the restored state.
          pinned_every: interval in rollout steps of steps that stay longer, or None.
          log: gets a sentence where a step alone exceeds the limit, or earlier ones are damaged.

        Raises:
          OSError: a file cannot be written.
        """
        self._directory, self._limit = directory / DIRECTORY, int(limit_mib * 2**20)
        self._pinned_every, self._log = pinned_every, log
        self._file: IO[bytes] | None = None
        if start == 0:
            shorten_rollouts(directory, 0)
        self._every = read_every(directory)
        self._count = self._bytes = 0
        self._report_lost(start)
        self._rewrite(start)

    def keeps(self, rollout_step: int) -> bool:
        """Return whether a step is among those kept, as far as is known."""
        return is_kept(rollout_step, self._every, self._pinned_every)

    def write(self, rollout_step: int, line: bytes) -> None:
        """Append a rollout step.

        Args:
          rollout_step: larger than those before, and among those kept.
          line: of `rollouts_records.encode_rollouts`.

        Raises:
          OSError: a file cannot be written.
        """
        member = gzip.compress(line, COMPRESSION, mtime=0)
        if len(member) > self._limit or len(line) > MAX_RECORD_BYTES:
            self._log(
                f"the completions of rollout step {rollout_step} take {len(member) / 2**20:.1f} "
                f"MiB, more than logging.rollouts_mib = {self._limit / 2**20:.3g} or "
                f"{MAX_RECORD_BYTES // 2**20} before compression: not kept"
            )
            return
        file = self._open(rollout_step)
        try:
            file.write(member)
            file.flush()
        except OSError as error:
            error.filename = file.name
            raise
        self._count, self._bytes = self._count + 1, self._bytes + len(member)
        while self._bytes > self._limit or self._count > MAX_STEPS:
            self._every *= 2
            text = json.dumps({"every": self._every}) + "\n"
            # first, so that a run killed below goes on with it
            durable_files.save_text(self._directory / KEPT_FILE, text)
            self._rewrite(rollout_step)

    def sync(self) -> None:
        """Flush all steps to the disk."""
        if self._file is not None:
            durable_files.sync_file(self._file)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of the failed write reported before
                self._file.close()
            self._file = None

    def _open(self, rollout_step: int) -> IO[bytes]:
        """Return the file of a step, opened for appending; sync the one before."""
        path = self._directory / file_name(rollout_step)
        if self._file is not None and Path(self._file.name) == path:
            return self._file
        self.sync()
        self.close()
        durable_files.make_directory(self._directory)
        self._file = path.open("ab")
        durable_files.sync_directory(self._directory)
        return self._file

    def _report_lost(self, start: int) -> None:
        """Log which steps up to `start` follow damage, and are lost with the rest of their file."""
        for path in paths(self._directory):
            stored = list(members(path))
            if sum(len(member) for _, _, member in stored) == path.stat().st_size:
                continue
            first = first_step(path)
            begin = stored[-1][0] + 1 if stored else first
            steps = range(begin, min(start, first + STEPS_PER_FILE - 1) + 1)
            lost = [step for step in steps if self.keeps(step)]
            if lost:
                self._log(
                    f"{path} is damaged: its completions of rollout steps {lost[0]} to {lost[-1]} "
                    "are lost"
                )

    def _rewrite(self, last: int) -> None:
        """Drop steps after `last` and those that are not kept any more; count the others."""
        self.sync()
        self.close()
        self._count = self._bytes = 0
        for path in paths(self._directory):
            kept = [
                (step, member)
                for step, _, member in members(path)
                if step <= last and self.keeps(step)
            ]
            _replace(path, [member for _, member in kept])
            self._count += len(kept)
            self._bytes += sum(len(member) for _, member in kept)


def is_kept(rollout_step: int, every: int, pinned_every: int | None) -> bool:
    """Return whether a step is among those kept.

    Args:
      rollout_step: from 1.
      every: interval of the steps kept, a power of two.
      pinned_every: interval of steps that stay until `every` is twice that, then every second of
        them, and so on; or None.
    """
    if rollout_step % every == 0 or pinned_every is None:
        return rollout_step % every == 0
    doublings = max(1, every // pinned_every).bit_length() - 1
    return rollout_step % (pinned_every << doublings) == 0


def file_name(rollout_step: int) -> str:
    """Return the name of the file that has a step: that of its first step."""
    first = (rollout_step - 1) // STEPS_PER_FILE * STEPS_PER_FILE + 1
    return f"steps_{first:06d}.jsonl.gz"


def paths(directory: Path) -> list[Path]:
    """Return the files of steps in a directory, by step."""
    named = [path for path in directory.glob("steps_*.jsonl.gz") if FILE_NAME.fullmatch(path.name)]
    return sorted(named, key=first_step)


def first_step(path: Path) -> int:
    """Return the first step of the range that a file of steps has."""
    return int(path.name.removeprefix("steps_").partition(".")[0])


def members(path: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the rollout step, the line and the compressed member of each complete step of a file.

    What follows a damaged member, or one that is being written, is left out.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        rest = b""
        while True:
            stream, compressed, line = zlib.decompressobj(GZIP_BITS), bytearray(), bytearray()
            while not stream.eof:
                piece = rest if rest else file.read(PIECE)
                rest = b""
                try:
                    line += stream.decompress(piece, MAX_RECORD_BYTES + 1 - len(line))
                except zlib.error:
                    return
                if not piece or len(line) > MAX_RECORD_BYTES:
                    return
                compressed += piece
            rest = stream.unused_data
            member = bytes(compressed[: len(compressed) - len(rest)])
            step = _step(line)
            if step is None:
                return
            yield step, bytes(line), member


def read_every(run: Path) -> int:
    """Return the interval of the steps that a run directory keeps; 1 where nothing says another."""
    try:
        every = read_object(run / DIRECTORY / KEPT_FILE)["every"]
    except (LookupError, ValueError):
        return 1
    return every if isinstance(every, int) and 1 <= every <= 2**40 else 1


def shorten_rollouts(run: Path, start: int) -> None:
    """Remove the rollout steps after `start` from a run directory, all of them for 0."""
    directory = run / DIRECTORY
    for path in paths(directory):
        kept = [] if start == 0 else [m for step, _, m in members(path) if step <= start]
        _replace(path, kept)
    if start == 0 and (directory / KEPT_FILE).exists():
        (directory / KEPT_FILE).unlink()
        durable_files.sync_directory(directory)


def _replace(path: Path, kept: list[bytes]) -> None:
    """Reduce a file to some members, durably; remove it where there is none."""
    if not kept:
        path.unlink(missing_ok=True)
        durable_files.sync_directory(path.parent)
    elif sum(map(len, kept)) != path.stat().st_size:
        with durable_files.replacing(path) as file:
            file.writelines(kept)


def _step(line: bytes | bytearray) -> int | None:
    match = re.match(rb'\{"format":\d+,"rollout_step":(\d{1,12}),', line)
    return None if match is None or not line.endswith(b"\n") else int(match[1])
