"""Command, versions and machine of each start of a run, in `starts.jsonl` of its directory."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import ntkrl
from ntkrl.durable_files import save_text

STARTS_FILE = "starts.jsonl"
PACKAGES = ("jax", "flax", "optax", "numpy", "transformers")
"""Packages whose versions are recorded."""


def record_start(directory: Path, facts: Mapping[str, Any]) -> None:
    """Add a line to `starts.jsonl`.

    Args:
      directory: the run directory.
      facts: further entries of the line, as JSON values.
    """
    path = directory / STARTS_FILE
    earlier = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    line = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line(sys.argv),
        "machine": machine(),
        "versions": versions(),
        **facts,
    }
    save_text(path, earlier + json.dumps(line) + "\n")


def command_line(argv: list[str]) -> str:
    """Return the command of this process, or "Python" where a notebook or a prompt runs it."""
    program = Path(argv[0])
    if program.name == "ntkrl" or program.parts[-2:] == ("ntkrl", "__main__.py"):
        return shlex.join(["ntkrl", *argv[1:]])
    interactive = not program.is_file() or program.name == "ipykernel_launcher.py"
    return "Python" if interactive else shlex.join(["python", *argv])


def machine() -> str:
    """Return devices, processes and system in words."""
    devices = jax.devices()
    kind = f"{len(devices)} × {devices[0].device_kind}"
    processes = jax.process_count()
    parts = [kind, f"{os.cpu_count()} CPU cores", f"{platform.system()} {platform.machine()}"]
    if processes > 1:
        parts.insert(1, f"{processes} processes")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the PACKAGES."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"ntkrl": ntkrl.__version__, "python": platform.python_version(), **packages}
