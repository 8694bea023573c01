"""Runs of several processes on this machine, connected over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"START": "60", "SILENCE": "6", "STALL": "60"}


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(devices: int, **changes: str) -> dict[str, str]:
    """Return a process's environment: its devices, conftest's settings, and short timeouts."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    limits = {
        f"NTKRL_{name}_TIMEOUT": changes.pop(name, seconds) for name, seconds in LIMITS.items()
    }
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, "XLA_FLAGS": flags, **limits, **settings, **changes}


def start(count: int, arguments: list[str], devices: int = 1, **changes: str) -> list:
    """Start the processes of a run, `python ARGUMENTS` each.

    Args:
      count: of processes; one is started as a user starts one.
      arguments: after python's name.
      devices: of each.
      changes: of the environment variables.
    """
    address, processes = f"127.0.0.1:{free_port()}", []
    for number in range(count):
        several = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**(several if count > 1 else {}), **environment(devices, **changes)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def ends(processes: list, seconds: float = 120) -> list[tuple[int, str]]:
    """Wait for all processes; return status and output of each."""
    try:
        return [
            (process.communicate(timeout=seconds)[0], process.returncode)[::-1]
            for process in processes
        ]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
