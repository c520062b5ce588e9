"""
A coordinator process for tests with hostile clients and workers, and its use of memory and log lines.

The coordinator is configured as on Fly. This process emulates the Machines API, and is the worker on
every machine: tests choose its response to each script.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import IPullProducer
from zope.interface import implementer

from bfaas.deadline import Deadline
from bfaas.http.server import BoundedSite
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines
from bfaas.tokens import genkey
from tests.e2e.coordinator import PATIENCE, reactor, start_coordinator, stop
from tests.support.hostile_worker import LAST_CHUNK, End, Peer, ScriptedServer, chunk
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from tests.e2e.coordinator import Running

    Script = Iterable[bytes | Deferred[None] | End]
    ScriptFactory = Callable[[], Script]

MAX_MEMORY = 8192
"""Limit of the coordinator's peak memory for a case, in KiB."""

MAX_LINES = 10
"""Limit of the coordinator's log lines for a case."""

TOKEN = "token"

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EXIT = b'event: exit\ndata: {"code": 0}\n\n'
HONEST: Script = (HEAD + chunk(b'event: stdout\ndata: "honest\\n"\n\n' + EXIT) + LAST_CHUNK, End.CLOSE)


@implementer(IPullProducer)
class _Endless:
    """Output that never ends."""

    _MORE = chunk(b'event: stdout\ndata: "' + b"x" * 8192 + b'"\n\n')

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        peer.transport.write(HEAD)

    def resumeProducing(self) -> None:
        self._peer.transport.write(self._MORE)

    def stopProducing(self) -> None:
        """The connection is closed: there is nothing to release."""


class Worker(ScriptedServer):
    """
    The worker of every machine: `responses` maps scripts to responses, `ready` is that to health checks.

    The response to a script in `endless` never ends, and is sent as fast as it is read. `runs` contains the
    requests for runs: the lines of the head, and the body.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.ready: Script = (
            b"HTTP/1.1 200 OK\r\nWorker: any\r\nContent-Length: 3\r\n\r\nok\n",
            End.CLOSE,
        )
        self.responses: dict[bytes, ScriptFactory] = {}
        self.endless: set[bytes] = set()
        self.runs: list[tuple[list[str], bytes]] = []

    async def _play(self, peer: Peer, script: Script) -> None:
        await wait_until(lambda: peer.request() or peer.end)
        lines, body = peer.request() or ([""], b"")
        if lines[0].startswith("POST"):
            self.runs.append((lines, body))
            if body in self.endless:
                peer.transport.registerProducer(_Endless(peer), False)
                return
            script = self.responses[body]() if body in self.responses else HONEST
        else:
            script = self.ready
        await super()._play(peer, takewhile(lambda _: peer.end is None, script))


class Spent:
    """Peak memory and log lines of a coordinator since the creation of this object."""

    def __init__(self, coordinator: Running) -> None:
        self._coordinator = coordinator
        # Reset the peak in VmHWM (proc(5)).
        Path(f"/proc/{coordinator.pid}/clear_refs").write_text("5")
        self._memory = self._read("VmRSS")
        self._lines = self._count()

    @property
    def memory(self) -> int:
        """The peak increase of resident memory, in KiB."""
        return self._read("VmHWM") - self._memory

    @property
    def lines(self) -> int:
        return self._count() - self._lines

    def _read(self, name: str) -> int:
        status = Path(f"/proc/{self._coordinator.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
        return int(line.split()[1])

    def _count(self) -> int:
        return self._coordinator.program.output.count(b"\n")


@dataclass
class Harness:
    """A coordinator that accepts requests, and the worker that runs them."""

    coordinator: Running
    worker: Worker
    _clients: list[Peer] = field(default_factory=list)

    async def call(self, data: bytes) -> Peer:
        """Connect to the coordinator, and send data."""
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", self.coordinator.port)
        peer: Peer = await connectProtocol(endpoint, Peer())
        self._clients.append(peer)
        await peer.send(data)
        return peer

    async def request(self, data: bytes) -> tuple[bytes, float]:
        """Send data; return all data until the connection is closed, and the seconds until then."""
        started = time.monotonic()
        peer = await self.call(data)
        received = await Deadline(reactor, PATIENCE).run(Deferred.fromCoroutine(peer.receive_all()))
        return received, time.monotonic() - started

    async def close(self) -> None:
        """Close all connections."""
        for peer in [*self._clients, *self.worker.peers]:
            if peer.end is None:
                peer.transport.abortConnection()
            await peer.receive_all()


@asynccontextmanager
async def start_harness(**settings: str) -> AsyncIterator[Harness]:
    """Start the coordinator, the emulator and the worker; stop them on exit."""
    machines = EmulatedMachines(reactor, time.time)
    api = BoundedSite(reactor, MachinesServer(machines, "workers", TOKEN).app.resource(), 1 << 20)
    worker = Worker()
    ports = [reactor.listenTCP(0, factory, interface="127.0.0.1") for factory in (api, worker)]
    api_url, worker_url = (f"http://127.0.0.1:{port.getHost().port}" for port in ports)
    fly = {
        "WORKER_APP": "workers",
        "WORKER_IMAGE": "basher:1",
        "WORKER_URL": worker_url,
        "FLY_TOKEN": TOKEN,
        "FLY_REGION": "ams",
        "FLY_MACHINE_ID": "p",
        "FLY_FLAPS_BASE_URL": api_url,
        "PRIVATE": genkey().private,
    }
    coordinator = await start_coordinator(**{**fly, **settings})
    try:
        harness = Harness(coordinator, worker)
        yield harness
        await harness.close()
        assert await stop(coordinator) == 0, coordinator.program.output.decode()
    finally:
        for port in ports:
            await port.stopListening()
        await api.drain(1.0)
