"""The run's side of a worker: its start, requests within a time limit, and its end."""

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time

from ntkrl.workers.service import HEADER, IDENTITY_BYTES, TERMINATIONS

CHUNK = 1 << 20
CLOSING_SECONDS = 10.0
"""Seconds that a supervisor gets to end its processes."""
READ_EVENTS = select.POLLIN | select.POLLHUP | select.POLLERR


class WorkerError(RuntimeError):
    """A worker gave no answer and was ended; the message continues a sentence about it."""


class WorkerTimeoutError(WorkerError):
    """It took too long."""


class WorkerEndedError(WorkerError):
    """Its process ended.

    terminated: by a signal that may have been sent to all processes of the job.
    """

    def __init__(self, message: str, terminated: bool = False):
        super().__init__(message)
        self.terminated = terminated


class Worker:
    """A process that answers requests by a service of the package.

    A service is a module with `open_service(arguments)`, which gets the content of the first
    request, and returns its answer and a function from the content of each further request to its
    answer. One request is answered at a time.
    """

    def __init__(self, service: str):
        """Start the process.

        Args:
          service: name of the module.

        Raises:
          WorkerError: the system refuses another process.
        """
        self.lock = threading.Lock()
        self.channel, served = socket.socketpair()
        self.lifeline, watched = socket.socketpair()
        self.channel.setblocking(False)
        command = [sys.executable, "-m", "ntkrl.workers.supervisor", service]
        try:
            self.process = subprocess.Popen(
                [*command, str(served.fileno()), str(watched.fileno())],
                stdin=subprocess.DEVNULL,
                env={"JAX_PLATFORMS": "cpu", **os.environ},  # never the accelerator
                pass_fds=(served.fileno(), watched.fileno()),
                start_new_session=True,
            )
        except OSError as error:
            self.channel.close()
            self.lifeline.close()
            raise WorkerError(f"cannot be started: {error}") from error
        finally:
            served.close()
            watched.close()

    @property
    def running(self) -> bool:
        """Return False once the process has ended or was closed."""
        return self.process.poll() is None

    def request(self, content: bytes, seconds: float) -> bytes:
        """Return the answer to a request; after an error the worker is closed.

        Args:
          content: of the request.
          seconds: time limit.

        Raises:
          WorkerTimeoutError: no answer within the limit.
          WorkerEndedError: the process ended.
          WorkerError: something else was written to the socket, or it was closed.
        """
        with self.lock:
            answer = None
            try:
                answer = self._exchange(content, time.monotonic() + seconds)
            except TimeoutError as error:
                raise WorkerTimeoutError(f"did not answer within {seconds:g} s") from error
            except EOFError as error:
                raise self._end() from error
            finally:
                if answer is None:
                    self.close()
            return answer

    def close(self) -> None:
        """End the process and all that it started."""
        self.channel.close()
        self.lifeline.close()
        try:
            self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the worker ends with its supervisor
            self.process.wait()

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.close()

    def _exchange(self, content: bytes, deadline: float) -> bytes:
        """Send a request and receive its answer; raise TimeoutError or EOFError."""
        identity = secrets.token_bytes(IDENTITY_BYTES)
        outgoing = memoryview(HEADER.pack(identity, len(content)) + content)
        answer, poller = bytearray(), select.poll()
        poller.register(self.lifeline, select.POLLIN)
        while True:
            poller.register(self.channel, select.POLLIN | (select.POLLOUT if outgoing else 0))
            ready = dict(poller.poll(1000 * max(deadline - time.monotonic(), 0)))
            if not ready:
                raise TimeoutError
            events = ready.get(self.channel.fileno(), 0)
            if events & select.POLLOUT and outgoing:
                outgoing = outgoing[self._send(outgoing) :]
            ended = self.lifeline.fileno() in ready and not events & READ_EVENTS
            if events & READ_EVENTS:
                chunk = self._receive()
                answer += chunk or b""
                ended = chunk == b""
            complete = _complete(answer, identity)
            if complete is not None:
                return complete
            if ended:
                raise EOFError

    def _send(self, outgoing: memoryview) -> int:
        try:
            return self.channel.send(outgoing)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise EOFError from error

    def _receive(self) -> bytes | None:
        """Return bytes, b"" at the end, or None where there are none yet."""
        try:
            return self.channel.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _end(self) -> WorkerError:
        """Return the error of a worker whose socket ended."""
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return WorkerError("closed the descriptor of its answers, or all that it had open")
        if status >= 0:
            return WorkerEndedError(f"ended with status {status}")
        names = {number.value: number.name for number in signal.Signals}
        name = names.get(-status, f"signal {-status}")
        return WorkerEndedError(f"was ended by {name}", -status in TERMINATIONS)


def _complete(answer: bytearray, identity: bytes) -> bytes | None:
    """Return the content of a complete answer, None before that; raise WorkerError for another."""
    start = bytes(answer[:IDENTITY_BYTES])
    if start != identity[: len(start)]:
        raise WorkerError(
            f"wrote {bytes(answer[:40])!r} to the descriptor of its answers, which is not one"
        )
    if len(answer) < HEADER.size:
        return None
    _, length = HEADER.unpack_from(answer)
    if len(answer) < HEADER.size + length:
        return None
    return bytes(answer[HEADER.size : HEADER.size + length])
