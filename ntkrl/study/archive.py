"""An archive of the small files of a study's runs, from which its page can be written again."""

import fnmatch
import io
import json
import lzma
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ntkrl import durable_files
from ntkrl.json_files import read_object
from ntkrl.study.jobs import COMMANDS_FILE

LEFT_OUT = ("checkpoints", "export", "model", "rollouts", "logs", "report")
"""Directories of which nothing is archived."""
MOST_BYTES = 2**18
"""Size of the largest file that is archived."""
MOST_ENTRIES = 1024
"""Of an array."""


def save_archive(root: Path, path: Path, left_out: Sequence[str] = ()) -> list[str]:
    """Write the metrics, probes and evaluations of a study's runs; equal files give equal bytes.

    Args:
      root: directory of the study.
      path: of the archive, a tar file compressed by xz, whose names are relative to `root`.
      left_out: patterns of further names, such as "*/probes/*".

    Returns:
      Names of files that are too large and were left out.
    """
    buffer, large = io.BytesIO(), []
    with tarfile.TarFile(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in _files(root):
            name = member.relative_to(root).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in left_out):
                continue
            if member.stat().st_size > MOST_BYTES:
                large.append(name)
                continue
            entry, content = tarfile.TarInfo(name), _content(member)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    with durable_files.replacing(path) as file:
        file.write(lzma.compress(buffer.getvalue(), preset=9))
    return large


def _content(file: Path) -> bytes:
    """Return what is archived of a file.

    Of a run's config the name and the seed: other values, which the run's command states, may be
    paths of the machine. Of arrays those of at most MOST_ENTRIES, such as numbers per probe token.
    """
    if file.name == "config.json":
        config = read_object(file)
        return json.dumps({key: config.get(key) for key in ("name", "seed")}).encode()
    if file.suffix != ".npz":
        return file.read_bytes()
    with np.load(file, allow_pickle=False) as arrays:
        kept = {n: arrays[n] for n in arrays.files if arrays[n].size <= MOST_ENTRIES}
    return durable_files.array_bytes(kept)


def _files(root: Path) -> Iterator[Path]:
    for file in sorted(root.glob("**/*")):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        made_by_page = len(parts) == 1 and file.name != COMMANDS_FILE
        if made_by_page or hidden or set(parts) & set(LEFT_OUT) or file.is_symlink():
            continue
        if file.is_file():
            yield file
