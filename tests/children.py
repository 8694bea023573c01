"""Runs in child processes that tests kill, forked from a server that has imported everything."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import FLAGS

ROOT = Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count="


class Children:
    """A server that runs `ntkrl` commands, one at a time, with output to a file in `directory`."""

    def __init__(self, directory: Path):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.children"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.output = directory / "output"

    def start(self, arguments, devices=1, dies_in_save=None) -> int:
        """Start a command; return its process id.

        Args:
          arguments: after the program's name; or several lists of them, for one process.
          devices: virtual devices.
          dies_in_save: kills itself when this many checkpoints are written but for their renaming.
        """
        self.output.unlink(missing_ok=True)
        flags = " ".join([*(flag for flag in FLAGS if DEVICES not in flag), f"{DEVICES}{devices}"])
        request = {"arguments": arguments, "flags": flags, "dies_in_save": dies_in_save}
        self.server.stdin.write(json.dumps(request | {"output": str(self.output)}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Return exit status (negative: the signal) and output of the command that was started."""
        return int(self.server.stdout.readline()), self.output.read_text()

    def run(self, arguments, **settings) -> tuple[int, str]:
        """Run a command to its end."""
        self.start(arguments, **settings)
        return self.wait()

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()


def die_in_save(number: int) -> None:
    """Make Orbax kill the process when it is about to rename a checkpoint it has written."""
    from orbax.checkpoint._src.path import atomicity

    rename, counted = atomicity.on_commit_callback, []

    async def rename_or_die(path, **options):
        counted.append(path)
        if len(counted) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        await rename(path, **options)

    atomicity.on_commit_callback = rename_or_die


def serve() -> None:
    """Fork a child for every request; answer its process id, then its exit status."""
    from transformers import AutoTokenizer  # noqa: F401

    from ntkrl import evaluation, training  # noqa: F401
    from ntkrl.main import main

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            # under nohup the server ignores them
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ["XLA_FLAGS"] = request["flags"]  # read when the first device is asked for
            if request["dies_in_save"] is not None:
                die_in_save(request["dies_in_save"])
            arguments = request["arguments"]
            several = arguments if isinstance(arguments[0], list) else [arguments]
            sys.exit(next((status for words in several if (status := main(words))), 0))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
