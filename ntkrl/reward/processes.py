"""Reward functions in processes of their own, so that one that hangs or dies stops nothing else."""

from __future__ import annotations

import inspect
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from ntkrl.reward.checks import RewardError

LOADING_SECONDS = 300.0  # a module may import a lot


class ProcessFunction:
    """A reward function served by `ntkrl.reward.worker`; called like the function itself.

    The process starts with the object, is killed when a call runs out of time, and starts again
    with the next call.
    """

    def __init__(self, spec: str, seconds: float):
        """Start the process and ask what the function takes.

        Args:
          spec: "path/to/file.py:function" or a built-in name.
          seconds: that a call may take.

        Raises:
          ValueError: the file or function cannot be loaded.
        """
        self.spec, self.seconds = spec, seconds
        self.process: subprocess.Popen | None = None
        self.rest = b""
        told = self._start()
        self.name = told["name"]
        self.__signature__ = inspect.Signature(
            inspect.Parameter(
                name,
                inspect._ParameterKind(kind),
                default=inspect.Parameter.empty if required else None,
            )
            for name, kind, required in told["parameters"]
        )

    def __call__(
        self,
        log_extra: Callable[[str, Iterable[Any]], None] = lambda column, values: None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        **arguments: Any,
    ) -> list[float | None]:
        """Call the function.

        Raises:
          RewardError: what the function did wrong, that it took too long, or that it died.
        """
        if self.process is None:
            self._start()
        arguments.pop("trainer_state", None)
        answer = self._ask(json.dumps(arguments).encode() + b"\n", self.seconds)
        if "error" in answer:
            raise RewardError(answer["error"])
        for name, value in answer["metrics"]:
            log_metric(name, value)
        for column, values in answer["extra"]:
            log_extra(column, values)
        return answer["values"]

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.close()
            self.process = None

    def __del__(self) -> None:
        if getattr(self, "process", None) is not None:
            self.close()

    def _start(self) -> dict[str, Any]:
        self.rest = b""
        # rewards are computed beside the accelerator, never on it
        environment = {"JAX_PLATFORMS": "cpu", **os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ntkrl.reward.worker", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        told = self._ask(b"", LOADING_SECONDS)
        if "error" in told:
            self.close()
            raise ValueError(told["error"])
        return told

    def _ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Send a request and wait for the answer, both in time."""
        deadline = time.monotonic() + seconds
        to, back = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(to, False)
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            ready, writable, _ = select.select([back], [to] if request else [], [], max(left, 0))
            if not ready and not writable:
                self.close()
                raise RewardError(
                    f"reward function {self.spec} did not answer within {seconds:g} s; its "
                    "process was ended. Raise reward.timeout, or set reward.on_failure to the "
                    "reward that counts then."
                )
            try:
                if writable:
                    request = request[os.write(to, request) :]
                got = os.read(back, 1 << 20) if ready else None
            except BrokenPipeError:
                got = b""
            if got == b"":
                status = self.process.wait()
                self.close()
                raise RewardError(
                    f"the process of reward function {self.spec} ended with status {status} "
                    "(killed for memory, or an exit inside the function); see above for what it "
                    "printed."
                )
            self.rest += got or b""
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)
