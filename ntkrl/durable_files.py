"""Files that survive a power cut: written beside their place, synced, then renamed into it.

A reader sees the former content or the new one, never a part of either. Each function returns once
the content and its name are on the disk, so that what is written next may vouch for it.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

EXCHANGE = 2  # renameat2's RENAME_EXCHANGE
WORKING_DIRECTORY = -100  # AT_FDCWD
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES}
"""Errors of file systems that cannot sync a directory."""


def save_text(path: Path, text: str) -> None:
    """Write a text file; create its directory."""
    with replacing(path) as file:
        file.write(text.encode())


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file of numeric arrays; create its directory."""
    with replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new binary file that replaces `path` when the context ends without an error."""
    make_directory(path.parent)
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def temporary_path(path: Path) -> Path:
    """Return a hidden name beside `path` that no other file has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def make_directory(directory: Path) -> None:
    """Create a directory and its parents, each entered durably in the directory above it."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


@contextlib.contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """Create a directory that replaces `directory`, and all it contains, without a gap.

    An error inside the context removes the new directory and leaves the former one as it was. The
    caller decides beforehand whether the former content may be lost.
    """
    make_directory(directory.parent)
    fresh = temporary_path(directory)
    fresh.mkdir()
    try:
        yield fresh
        sync_tree(fresh)
        if directory.exists():
            _exchange(fresh, directory)
        else:
            fresh.rename(directory)
        sync_directory(directory.parent)
    finally:  # after the exchange, the former content
        shutil.rmtree(fresh, ignore_errors=True)


def sync_file(file: IO[Any]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_tree(directory: Path) -> None:
    """Flush all files and directories below a directory, and itself, to the disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(parent))


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk, where its file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _exchange(fresh: Path, directory: Path) -> None:
    """Exchange two directories atomically; by three renames where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    places = os.fsencode(fresh), os.fsencode(directory)
    if rename is not None and not rename(
        WORKING_DIRECTORY, places[0], WORKING_DIRECTORY, places[1], EXCHANGE
    ):
        return
    former = temporary_path(directory)
    directory.rename(former)
    fresh.rename(directory)
    former.rename(fresh)
