"""Rendezvous: the processes of a run meet at a port of process 0, which JAX uses afterwards.

`jax.distributed.initialize` alone listens on every interface, admits whoever connects, and aborts
on a timeout without naming the missing processes. Here process 0 listens on the coordinator's
addresses only, and every other process introduces itself by one line of JSON. Connections that send
anything else, or nothing, or are of another run are closed and not counted.
"""

import contextlib
import dataclasses
import errno
import ipaddress
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

BIND_VARIABLE = "NTKRL_BIND_ADDRESS"
HELLO_SECONDS = 5.0
"""Time for a connection to introduce itself."""
HELLO_BYTES = 4096
ANSWER_BYTES = 2**24
VISITORS = 256
"""Connections at a time that have not introduced themselves; beyond, the oldest is closed."""
ELSEWHERE = ("192.0.2.1", 9)
"""An address of no host (RFC 5737): the interface of the route to it is the machine's main one."""


class StartupTimeoutError(RuntimeError):
    """Some processes did not connect in time; the message lists them."""


class Meeting(NamedTuple):
    """The outcome of a rendezvous, the same in every process.

    hosts: of the processes, by index. address: "host:port" where JAX's coordinator is reached.
    bind_address: where it listens. session: random, of this start of the run.
    """

    hosts: list[str]
    address: str
    bind_address: str
    session: str


@dataclasses.dataclass(frozen=True)
class Hello:
    """Introduction of a process: its index, the number of processes, its host and its run."""

    process: int
    count: int
    host: str
    run: str


def rendezvous(
    address: str, hello: Hello, seconds: float
) -> tuple[Meeting, dict[int, socket.socket]]:
    """Wait for every process.

    Args:
      address: "host:port" of process 0, the same in every process.
      hello: of this process; `run` must be the same in every process.
      seconds: time limit.

    Returns:
      The outcome, and open connections: of process 0 to all others by index, of the others to it.

    Raises:
      StartupTimeoutError: some processes did not connect; reported to every process.
      ValueError: an address that process 0 does not have, a port in use, duplicate indices,
        different counts, or another run's process 0 at the address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT.")
    links: dict[int, socket.socket] = {}
    if hello.process == 0:
        answer = _serve(address, hello, seconds, links)
    else:
        answer = _connect((host.strip("[]"), int(port)), hello, seconds, links)
    if "missing" in answer:
        listed = ", ".join(map(str, answer["missing"]))
        raise StartupTimeoutError(
            f"process {listed} of {hello.count} did not connect to {address} within {seconds:g} s "
            "(not started, or the address is unreachable); restart all of them, or allow more time "
            f"with NTKRL_START_TIMEOUT=SECONDS.{answer.get('note', '')}"
        )
    if "problem" in answer:
        raise ValueError(answer["problem"])
    return Meeting(*(answer[name] for name in Meeting._fields)), links


class _Server:
    """Process 0's side: `hosts` of the processes that have come, with their connections."""

    def __init__(self, hello: Hello, address: str):
        self.hello, self.address = hello, address
        self.hosts = {0: hello.host}
        self.connections: dict[int, socket.socket] = {}
        self.visitors: dict[socket.socket, tuple[bytes, float]] = {}
        self.problem: str | None = None
        self.refused: set[str] = set()
        self.selector = selectors.DefaultSelector()

    def run(self, listeners: list[socket.socket], deadline: float) -> None:
        """Admit processes until all have come, there is a problem, or the time is over."""
        for listener in listeners:
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ)
        while len(self.hosts) < self.hello.count and self.problem is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            for key, _ in self.selector.select(min(remaining, 0.5)):
                if not isinstance(key.fileobj, socket.socket):
                    continue
                if key.fileobj in listeners:
                    self._accept(key.fileobj)
                else:
                    self._read(key.fileobj)
            for visitor, (_, limit) in list(self.visitors.items()):
                if time.monotonic() > limit:
                    self._close(visitor)

    def _accept(self, listener: socket.socket) -> None:
        try:
            visitor, _ = listener.accept()
        except OSError:  # it is gone, or there are too many
            return
        visitor.setblocking(False)
        if len(self.visitors) >= VISITORS:
            self._close(next(iter(self.visitors)))
        self.visitors[visitor] = b"", time.monotonic() + HELLO_SECONDS
        self.selector.register(visitor, selectors.EVENT_READ)

    def _close(self, visitor: socket.socket) -> None:
        self.visitors.pop(visitor, None)
        self.selector.unregister(visitor)
        visitor.close()

    def _read(self, visitor: socket.socket) -> None:
        """Read from a connection; close it unless it is of this run."""
        try:
            chunk = visitor.recv(HELLO_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if visitor not in self.visitors:  # admitted: lost if it ends, has nothing more to say
            for index, connection in list(self.connections.items()):
                if connection is visitor and not chunk:
                    del self.connections[index], self.hosts[index]
                    self._close(visitor)
            return
        text, limit = self.visitors[visitor]
        text += chunk
        self.visitors[visitor] = text, limit
        if b"\n" in text:
            hello = _parse_hello(text.partition(b"\n")[0])
            if hello is None or not self._admit(visitor, hello):
                self._close(visitor)
        elif not chunk or len(text) > HELLO_BYTES:
            self._close(visitor)

    def _admit(self, visitor: socket.socket, hello: Hello) -> bool:
        """Admit a process of this run; tell a process of another run that it is refused."""
        other = f"process {hello.process} ({hello.host})"
        if hello.run != self.hello.run:
            self.refused.add(f"{other} of {hello.run!r}")
            problem = (
                f"{other} of {hello.run!r} reached process 0 ({self.hello.host}) of another run, "
                f"{self.hello.run!r}, at {self.address}; give each run a JAX_COORDINATOR_ADDRESS "
                "of its own."
            )
            _send(visitor, {"problem": problem})
            return False
        if hello.count != self.hello.count:
            self.problem = f"{other} expects {hello.count} processes, process 0 expects "
            self.problem += str(self.hello.count)
        elif hello.process >= self.hello.count:
            self.problem = f"{other} is beyond the {hello.count} processes"
        elif hello.process in self.hosts:
            hosts = f"{self.hosts[hello.process]} and {hello.host}"
            self.problem = f"two processes have the index {hello.process}, on {hosts}"
        del self.visitors[visitor]
        if self.problem is None:
            self.hosts[hello.process] = hello.host
            self.connections[hello.process] = visitor
        else:
            self.connections[-1] = visitor  # to be told as well
        return True

    def answer(self, listeners: list[socket.socket]) -> dict[str, Any]:
        """Return the outcome."""
        if self.problem is not None:
            return {"problem": f"{self.problem}; see JAX_NUM_PROCESSES and JAX_PROCESS_ID."}
        missing = sorted(set(range(self.hello.count)) - set(self.hosts))
        if missing:
            refused = "; ".join(sorted(self.refused))
            note = f" Refused, as of another run than {self.hello.run!r}: {refused}."
            return {"missing": missing, "note": note if refused else ""}
        bind_address = _bound(listeners, list(self.connections.values()))
        routed = self.address if BIND_VARIABLE in os.environ else bind_address
        hosts = [self.hosts[index] for index in sorted(self.hosts)]
        return Meeting(hosts, routed, bind_address, secrets.token_hex(8))._asdict()


def _serve(
    address: str, hello: Hello, seconds: float, links: dict[int, socket.socket]
) -> dict[str, Any]:
    """Accept the other processes at process 0, send the outcome to each, and add the links."""
    server, deadline = _Server(hello, address), time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        stack.callback(server.selector.close)
        listeners = [stack.enter_context(listener) for listener in _listen(address)]
        server.run(listeners, deadline)
        answer = server.answer(listeners)
        for connection in server.connections.values():
            _send(connection, answer)
        for visitor in server.visitors:
            visitor.close()
        if "hosts" in answer:
            links |= server.connections
        else:
            for connection in server.connections.values():
                connection.close()
    return answer


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # lost since; the health monitor will report it
        connection.settimeout(HELLO_SECONDS)
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _bound(listeners: list[socket.socket], connections: list[socket.socket]) -> str:
    """Return "host:port" of the interface that the processes have reached."""
    names = [connection.getsockname() for connection in connections]
    names = names or [listener.getsockname() for listener in listeners]
    # a process of this machine that came by loopback reaches the other interface too
    distant = [name for name in names if not ipaddress.ip_address(name[0]).is_loopback]
    host, port = (distant or names)[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(address: str) -> Iterator[socket.socket]:
    """Yield sockets that listen on the addresses of process 0.

    Raises:
      ValueError: it has none of them, or the port is in use.
    """
    host, _, port = address.rpartition(":")
    machine, listeners, absent = socket.gethostname(), 0, None
    for family, name in _interfaces(host.strip("[]"), address):
        try:
            yield socket.create_server((name, int(port)), family=family, backlog=1024)
            listeners += 1
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                absent = error
                continue
            raise ValueError(
                f"process 0 ({machine}) cannot use the port of {address} ({error}); stop the "
                "program that uses it, or set another JAX_COORDINATOR_ADDRESS in all processes."
            ) from error
    if not listeners:
        raise ValueError(
            f"process 0 ({machine}) does not have the address {host} of JAX_COORDINATOR_ADDRESS; "
            f"name one of its own, or set {BIND_VARIABLE} there to its own address behind that one."
        ) from absent


def _interfaces(host: str, address: str) -> list[tuple[int, str]]:
    """Return family and address of each interface to listen on.

    Many machines resolve their own name to loopback, while the others resolve it to the network:
    then the machine's main interface is added.
    """
    bound = os.environ.get(BIND_VARIABLE, host)
    try:
        infos = socket.getaddrinfo(bound, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"process 0 ({socket.gethostname()}) cannot resolve {bound} of "
            f"{BIND_VARIABLE if bound != host else 'JAX_COORDINATOR_ADDRESS'} ({error}); name an "
            "address of its own."
        ) from error
    pairs = {(int(info[0]), str(info[4][0]).partition("%")[0]): None for info in infos}
    ips = [ipaddress.ip_address(name) for _, name in pairs]
    if any(ip.is_unspecified for ip in ips):
        raise ValueError(
            f"{address} is every interface of process 0; name the address that the others reach."
        )
    if all(ip.is_loopback for ip in ips) and not _is_local_name(bound):
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect(ELSEWHERE)  # sends nothing
            pairs[int(socket.AF_INET), probe.getsockname()[0]] = None
    return list(pairs)


def _is_local_name(host: str) -> bool:
    """Return whether a host means this machine's loopback in every process."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _parse_hello(text: bytes) -> Hello | None:
    """Return an introduction, None for anything else."""
    try:
        values = json.loads(text)
        hello = Hello(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers, texts = (hello.process, hello.count), (hello.host, hello.run)
    if all(type(number) is int and number > 0 for number in numbers):
        if all(type(text) is str for text in texts):
            return hello
    return None


def _connect(
    address: tuple[str, int], hello: Hello, seconds: float, links: dict[int, socket.socket]
) -> dict[str, Any]:
    """Connect to process 0, with retries, return its answer, and add the link."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        timeout = min(remaining, HELLO_SECONDS)
        try:
            with contextlib.ExitStack() as stack:
                connection = socket.create_connection(address, timeout=timeout)
                stack.enter_context(connection)
                connection.sendall(json.dumps(dataclasses.asdict(hello)).encode() + b"\n")
                # process 0 may have started later, and waits just as long
                connection.settimeout(seconds + HELLO_SECONDS)
                with connection.makefile("rb", buffering=0) as lines:  # no byte beyond the line
                    answer = json.loads(lines.readline(ANSWER_BYTES))
                if isinstance(answer, dict) and _is_answer(answer):
                    if "hosts" in answer:
                        links[0] = connection
                        stack.pop_all()
                    return answer
        except (OSError, ValueError, RecursionError):
            pass  # not listening yet, or another program's port
        time.sleep(min(max(remaining, 0), 0.2))
    return {"missing": [0]}


def _is_answer(answer: dict[str, Any]) -> bool:
    return bool(answer.keys() & {"missing", "problem"}) or answer.keys() == set(Meeting._fields)
