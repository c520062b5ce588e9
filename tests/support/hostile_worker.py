"""Clients and servers on loopback that send arbitrary bytes and close connections in any way."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.trial.unittest import TestCase

from bfaas.deadline import ignore_cancellation
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from twisted.internet.interfaces import IProtocolFactory
    from twisted.python.failure import Failure

reactor: Any = _reactor

LAST_CHUNK = b"0\r\n\r\n"


class End(enum.Enum):
    """How a connection ends."""

    CLOSE = enum.auto()
    RESET = enum.auto()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """Return a complete request with `Connection: close`."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Peer(Protocol):
    """One end of a connection."""

    transport: Any

    def __init__(self) -> None:
        self.received = bytearray()
        self.end: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.end = reason

    async def send(self, data: bytes) -> None:
        """Write data, and wait until the kernel has all of it."""
        transport = self.transport
        transport.write(data)
        await wait_until(lambda: self.end or not (transport.dataBuffer or transport._tempDataBuffer))

    @property
    def closed_cleanly(self) -> bool:
        return self.end is not None and self.end.check(ConnectionDone) is not None

    async def receive_until(self, mark: bytes) -> bytes:
        """Wait until the received data contains `mark`, and return it all."""
        await wait_until(lambda: mark in self.received or self.end)
        assert mark in self.received, f"the connection ended after {bytes(self.received)!r}"
        return bytes(self.received)

    async def receive_all(self) -> bytes:
        """Wait for the end of the connection, and return the received data."""
        await wait_until(lambda: self.end)
        return bytes(self.received)

    def request(self) -> tuple[list[str], bytes] | None:
        """Return the lines of the request's head, and its body; None while incomplete."""
        head, blank, body = bytes(self.received).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        length = next((line.split(":")[1] for line in lines if line.startswith("Content-Length:")), "0")
        return (lines, body) if blank and len(body) == int(length) else None


class ScriptedServer(ServerFactory):
    """
    A server that responds to each request with the next of its scripts; the last script is repeated.

    A script consists of bytes to send, Deferreds to wait for, and optionally an `End`; without one, the
    connection stays open. `requested` yields each peer once its request is complete.
    """

    noisy = False

    def __init__(self, *scripts: Iterable[bytes | Deferred[None] | End]) -> None:
        self._scripts = list(scripts)
        self.peers: list[Peer] = []
        self.playing: list[Deferred[None]] = []
        self.requested: DeferredQueue[Peer] = DeferredQueue()

    def buildProtocol(self, _: object) -> Peer:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        peer = Peer()
        self.peers.append(peer)
        playing = Deferred.fromCoroutine(self._play(peer, script))
        self.playing.append(playing.addErrback(ignore_cancellation))
        return peer

    def cancel_scripts(self) -> None:
        for playing in self.playing:
            playing.cancel()

    async def _play(self, peer: Peer, script: Iterable[bytes | Deferred[None] | End]) -> None:
        await wait_until(lambda: peer.request() or peer.end)
        self.requested.put(peer)
        for step in script:
            if isinstance(step, bytes):
                await peer.send(step)
            elif step is End.CLOSE:
                peer.transport.loseConnection()
            elif step is End.RESET:
                peer.transport.abortConnection()
            else:
                await step


class LoopbackTestCase(TestCase):
    """Closes all connections and ports at the end of a test."""

    timeout = 30

    def listen(self, factory: IProtocolFactory) -> int:
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    def serve_script(self, *scripts: Iterable[bytes | Deferred[None] | End]) -> tuple[ScriptedServer, str]:
        """Start a scripted server; return it and its URL."""
        server = ScriptedServer(*scripts)
        port = self.listen(server)
        self.addCleanup(lambda: Deferred.fromCoroutine(self._close(server.peers)))
        # A script may still wait for the kernel to take what a test writes to its connection.
        self.addCleanup(server.cancel_scripts)
        return server, f"http://127.0.0.1:{port}"

    async def call(self, port: int, data: bytes = b"") -> Peer:
        """Connect and send data."""
        peer: Peer = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Peer())
        self.addCleanup(lambda: Deferred.fromCoroutine(self._close([peer])))
        await peer.send(data)
        return peer

    async def _close(self, peers: list[Peer]) -> None:
        for peer in peers:
            if peer.end is None:
                peer.transport.abortConnection()
            await peer.receive_all()
