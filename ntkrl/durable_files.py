"""Files that survive a power cut: written beside their place, synced, then renamed into it.

A reader sees the former content or the new one, never a part of either. Each function returns once
the content and its name are on the disk, so that what is written next may vouch for it.
"""

import contextlib
import ctypes
import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ntkrl.messages import PLACE_ERRORS, unwritable

if TYPE_CHECKING:
    import numpy as np


EXCHANGE = 2  # renameat2's RENAME_EXCHANGE
WORKING_DIRECTORY = -100  # AT_FDCWD
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES}
"""Errors of file systems that cannot sync a directory."""
FULL = {errno.ENOSPC, errno.EDQUOT}
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
"""A full disk, in the words of libraries that do not raise OSError."""


def user_cache() -> Path:
    """Return the directory of this package's files that can be made again: XDG_CACHE_HOME/ntkrl."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~"), ".cache")
    return base / "ntkrl"


def save_text(path: Path, text: str) -> None:
    """Write a text file; create its directory."""
    with replacing(path) as file:
        file.write(text.encode())


def save_arrays(path: Path, arrays: Mapping[str, "np.ndarray"]) -> None:
    """Write an .npz file of numeric arrays; create its directory."""
    import numpy as np  # not needed by the command line before a command runs

    with replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def array_bytes(arrays: Mapping[str, "np.ndarray"]) -> bytes:
    """Return the content of an npz file; equal arrays give equal bytes."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new binary file that replaces `path` when the context ends without an error."""
    make_directory(path.parent)
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            yield file
            sync_file(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # writing names no file, and the temporary one is gone
        raise
    sync_directory(path.parent)


def check_replaceable(path: Path, is_ours: Callable[[bytes], bool], kind: str) -> None:
    """Refuse to replace a file that this package has not written.

    Args:
      path: of the file to write; nothing is checked if it does not exist.
      is_ours: whether content is that of an earlier such file; it may raise ValueError for no.
      kind: of such files, in words.

    Raises:
      ValueError: it is another file, or no file.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        if path.is_file() and is_ours(path.read_bytes()):
            return
    raise ValueError(
        f"{path} exists and is not {kind}, so it is not replaced; move it, or write elsewhere."
    )


def check_place(directory: Path, option: str) -> None:
    """Refuse a directory in which no file can be made, before any work; nothing is left there.

    Args:
      directory: that will be written, made if needed.
      option: that names another one, in words.

    Raises:
      ValueError: it is a file, below one, or cannot be written.
      OSError: another failure, such as a full disk.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    probe = temporary_path(directory / "probe")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        raise ValueError(unwritable(directory, error, option)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
        with contextlib.suppress(OSError):  # not made, or written by another in the meantime
            for path in made:
                path.rmdir()


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
    fresh, replaces = temporary_path(directory), directory.exists()
    fresh.mkdir()
    try:
        yield fresh
        sync_tree(fresh)
        if replaces:
            _exchange(fresh, directory)
        else:
            fresh.rename(directory)  # fails if another process has filled it meanwhile
        sync_directory(directory.parent)
    except OSError as error:
        name = error.filename2 or error.filename  # of a copy, the file written
        if name is not None and Path(os.fsdecode(name)).is_relative_to(fresh):
            error.filename = str(directory / Path(os.fsdecode(name)).relative_to(fresh))
        raise
    finally:  # after the exchange, the former content
        shutil.rmtree(fresh, ignore_errors=True)


def full_disk(error: BaseException) -> str | None:
    """Return a sentence if an exception comes from a full disk, else None.

    Libraries raise errors of their own after the system's, or in its place. An OSError without a
    number is a sentence already.
    """
    if isinstance(error, OSError) and error.errno is None:
        return None
    chain, name = [error], None
    while (after := chain[-1].__cause__ or chain[-1].__context__) and after not in chain:
        chain.append(after)
    for cause in chain:
        full = any(text in str(cause) for text in FULL_TEXTS)
        if isinstance(cause, OSError):
            full, name = full or cause.errno in FULL, name or cause.filename
        if full:
            place = "" if name is None else f" for {name}"
            return f"no space left on the device{place}; make room, and run the same command again."
    return None


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
