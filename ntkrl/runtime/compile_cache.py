"""The persistent compilation cache of the command line: JAX's own, on by default.

A restored program is the machine code that was compiled before, so its results have the same bits.
"""

import hashlib
import os
import platform
import secrets
import time
from pathlib import Path
from typing import Any

import filelock
import jax

from ntkrl import durable_files
from ntkrl.runtime.distributed import allgather_object, log

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MOST_BYTES = 4 << 30
"""Size of the cache, past which JAX removes the entries that were not used for longest."""
LEAST_SECONDS = 0.1
"""Programs that compile faster are not stored."""
LOCK_SECONDS = 10.0
SHARED_SECONDS = 5.0
"""Time for a file of process 0 to become visible to the others."""


def enable_compile_cache() -> None:
    """Turn the cache on, unless JAX's variables name another directory or turn it off.

    Called once per process, in a `distributed_session`. A directory that cannot be used is logged
    and the run goes on without a cache. Processes use it only if all see the same one: one that
    compiles may wait for the others to compile the same program.
    """
    config: Any = jax.config  # declares no attributes
    if VARIABLE in os.environ or not config.jax_enable_compilation_cache:
        return
    problem, token = None, f".shared-{secrets.token_hex(8)}"
    directory = cache_directory()
    try:
        open_cache(directory)
        (directory / token).mkdir()
    except OSError as error:
        problem = f"{directory} cannot be used ({error})"
    tokens = allgather_object("the compilation cache", None if problem else token)
    if problem is None and not _appears(directory, tokens[0]):
        problem = f"{directory} is not the one of process 0"
    problems = [text for text in allgather_object("use of the cache", problem) if text is not None]
    if (directory / token).exists():
        (directory / token).rmdir()
    if problems:
        log(
            f"compiled programs are not cached: {problems[0]}; {VARIABLE} names a directory that "
            "every process can write to."
        )
        return
    config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        config.update("jax_compilation_cache_max_size", MOST_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def cache_directory() -> Path:
    """Return the user's directory of programs compiled for this kind of processor.

    Programs for a processor use its instruction set, and a home directory may be shared by
    machines with others.
    """
    return durable_files.user_cache() / f"compiled-{_processor()}"


def open_cache(directory: Path) -> None:
    """Create the cache's directory, and remove what killed processes left half written.

    Raises:
      OSError: it cannot be created, written or locked, or another user can write into it: code
        from it is executed.
    """
    if not directory.exists():
        durable_files.make_directory(directory)
        directory.chmod(0o700)
    status = directory.stat()
    if status.st_mode & 0o022 or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
        raise PermissionError("other users can write into it")
    with filelock.FileLock(directory / ".lockfile", timeout=LOCK_SECONDS):
        # JAX writes an entry's time of use last, under this lock
        for entry in directory.glob("*-cache"):
            used = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
            if not used.exists() or used.stat().st_size != 8:
                entry.unlink(missing_ok=True)
                used.unlink(missing_ok=True)


def _processor() -> str:
    """Return a digest of the processor's architecture and instruction set."""
    parts = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        parts.append(platform.processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _appears(directory: Path, token: str | None) -> bool:
    """Return whether a file of process 0 is in this process's directory, or becomes so."""
    if token is None:
        return False
    deadline = time.monotonic() + SHARED_SECONDS
    while not (directory / token).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
