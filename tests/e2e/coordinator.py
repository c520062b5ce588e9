"""A real coordinator process, and a client that talks to it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from treq.client import HTTPClient
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers

from bfaas.deadline import Deadline
from bfaas.http.client import BodyReceiver, BytesProducer, single_use_agent
from bfaas.system import process_tree
from bfaas.worker.fork_server import PROCESS_NAME
from tests.support.network import free_port
from tests.support.responses import Response
from tests.support.waiting import TIMEOUT
from tests.support.workers import is_fork_server

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from twisted.python.failure import Failure

T = TypeVar("T")

reactor: Any = installed_reactor

PATIENCE = TIMEOUT
"""Seconds before a test gives up: far more than anything takes on a busy machine."""

TWISTD = ["-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile="]


class Program(ProcessProtocol):
    """One of our programs, and its output."""

    def __init__(self) -> None:
        self.output = b""
        self.ended: Deferred[int | None] = Deferred()
        self.status: int | None = None
        self.signal: int | None = None

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output += data

    def processEnded(self, reason: Failure) -> None:
        self.status = getattr(reason.value, "exitCode", None)
        self.signal = getattr(reason.value, "signal", None)
        self.ended.callback(self.status)


class Exchange:
    """A request that was sent, and its response, which may be incomplete."""

    def __init__(self, status: int, headers: dict[str, str], body: BodyReceiver) -> None:
        self.status = status
        self.headers = headers
        self.reader = body

    async def end(self, patience: float = PATIENCE) -> None:
        await Deadline(reactor, patience).run(self.reader.done)

    def leave(self) -> None:
        """Close the connection before the end of the response."""
        self.reader.done.addErrback(lambda _: None)
        self.reader.close()


@dataclass
class Running:
    """A program that accepts requests, such as a coordinator."""

    program: Program
    port: int
    pid: int
    agent: Any = field(default_factory=lambda: single_use_agent(reactor))

    async def request(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        take: Callable[[bytes], None] = lambda _: None,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        """Send a request; `take` is called with each part of the response's body."""
        client = HTTPClient(self.agent, data_to_body_producer=BytesProducer)
        url = f"http://127.0.0.1:{self.port}{path}"
        named = Headers({name: [value] for name, value in (headers or {}).items()})
        sent = client.request(
            method, url, headers=named, data=data, unbuffered=True, reactor=reactor, allow_redirects=False,
        )  # fmt: skip
        response: Any = await Deadline(reactor, PATIENCE).run(sent)
        names_and_values = {
            name.decode().lower(): values[0].decode() for name, values in response.headers.getAllRawHeaders()
        }
        body = BodyReceiver(take)
        response.deliverBody(body)
        return Exchange(response.code, names_and_values, body)

    async def begin(
        self,
        script: str | bytes,
        query: str = "",
        take: Callable[[bytes], None] = lambda _: None,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        """Send a script, and return when its response begins."""
        data = script.encode() if isinstance(script, str) else script
        return await self.request("POST", f"/run{query}", data, take, headers)

    async def run(
        self, script: str | bytes, query: str = "", headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a script, and read its complete response."""
        pieces: list[bytes] = []
        exchange = await self.begin(script, query, pieces.append, headers)
        await exchange.end()
        return Response(exchange.status, exchange.headers, b"".join(pieces))

    async def get(self, path: str) -> Response:
        pieces: list[bytes] = []
        exchange = await self.request("GET", path, None, pieces.append)
        await exchange.end()
        return Response(exchange.status, exchange.headers, b"".join(pieces))

    def processes(self) -> list[process_tree.Process]:
        """Return all processes below the coordinator but its fork server: workers and scripts."""
        processes = process_tree.descendants(self.pid)
        return [each for each in processes if not each.dead and not is_fork_server(each.pid)]

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        return [process.pid for process in self.processes() if name(process.pid) == PROCESS_NAME]

    async def settle(self) -> None:
        """Wait until no process is below the coordinator: every machine is stopped."""
        for _ in range(int(PATIENCE / 0.05)):
            if not self.processes():
                return
            await deferLater(reactor, 0.05)
        raise AssertionError(f"still there: {self.processes()}")

    def memory_mb(self, pid: int | None = None) -> float:
        """Return the peak memory of a process in MB; 0 if it has ended."""
        try:
            status = Path(f"/proc/{pid or self.pid}/status").read_text()
        except OSError:
            return 0.0
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        return int(peaks[0]) / 1024 if peaks else 0.0

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.pid, number)


def name(pid: int) -> bytes:
    """Return the name of a process; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().strip()
    except OSError:
        return b""


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


async def pause(pid: int, seconds: float) -> None:
    """Stop a process for a while."""
    paused = process_tree.process_and_descendants(pid)[:1]
    send(pid, signal.SIGSTOP)
    await deferLater(reactor, seconds)
    if any(map(process_tree.is_running, paused)):
        send(pid, signal.SIGCONT)


def marked(mark: str) -> set[int]:
    """Return the processes of this host with NAME=VALUE in their environment."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in environment:
            found.add(int(entry.name))
    return found


async def together(works: Iterable[Coroutine[Deferred[Any], Any, object]]) -> None:
    """Run coroutines concurrently; wait until all are done, or one has failed."""
    try:
        await gatherResults([Deferred.fromCoroutine(work) for work in works], consumeErrors=True)
    except FirstError as error:
        error.subFailure.raiseException()


def start(
    arguments: list[str], settings: dict[str, str], leaders: Sequence[str] = (sys.executable,)
) -> tuple[Program, int]:
    """Start one of our programs behind `leaders`, with only these settings in its environment."""
    program = Program()
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/", **settings}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    process = reactor.spawnProcess(program, leaders[0], [*leaders, *arguments], env=environment)
    return program, process.pid


async def start_listening(
    role: str,
    port: int,
    options: list[str],
    settings: dict[str, str],
    leaders: Sequence[str] = (sys.executable,),
) -> Running:
    """Start one of our roles with twistd, and wait until it accepts connections."""
    return await start_program([*TWISTD, role, *options], port, settings, leaders)


async def start_program(
    arguments: list[str], port: int, settings: dict[str, str], leaders: Sequence[str] = (sys.executable,)
) -> Running:
    """Start a program with a `--listen` option, and wait until it accepts connections."""
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    program, pid = start([*arguments, "--listen", endpoint], settings, leaders)
    for _ in range(int(PATIENCE / 0.05)):
        assert program.status is None, program.output.decode()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Running(program, port, pid)
        await deferLater(reactor, 0.05)
    raise AssertionError(program.output.decode())


async def start_coordinator(*leaders: str, **settings: str) -> Running:
    """Start a coordinator, with local machines unless the settings configure others."""
    defaults = {"WORKER_APP": "mock", "MAXREQTIME": "20s", "MAXWAIT": "60s"}
    return await start_listening(
        "bfaas-coord", free_port(), [], {**defaults, **settings}, leaders or (sys.executable,)
    )


async def stop(running: Running) -> int | None:
    """Stop a program with SIGTERM; return its exit status."""
    if running.program.status is None:
        running.kill()
        await Deadline(reactor, PATIENCE).run(running.program.ended)
    return running.program.status
