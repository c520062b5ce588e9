"""Both ends of a connection on loopback, in a test's hands: they say what they like, and end as they like."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.trial.unittest import TestCase

from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from twisted.internet.interfaces import IProtocolFactory
    from twisted.python.failure import Failure

reactor: Any = _reactor

LAST_CHUNK = b"0\r\n\r\n"


class End(enum.Enum):
    """How a connection is ended."""

    CLOSE = enum.auto()
    RESET = enum.auto()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A whole request, the last on its connection."""
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
        self.heard = bytearray()
        self.end: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.heard += data

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.end = reason

    async def say(self, data: bytes) -> None:
        """Write, and wait until the kernel has it."""
        transport = self.transport
        transport.write(data)
        await wait_until(lambda: self.end or not (transport.dataBuffer or transport._tempDataBuffer))

    @property
    def ended_in_order(self) -> bool:
        return self.end is not None and self.end.check(ConnectionDone) is not None

    async def hear(self, mark: bytes) -> bytes:
        """Wait for what the other end says, up to some words."""
        await wait_until(lambda: mark in self.heard or self.end)
        assert mark in self.heard, f"it ended after {bytes(self.heard)!r}"
        return bytes(self.heard)

    async def hear_out(self) -> bytes:
        """Wait for the other end's end."""
        await wait_until(lambda: self.end)
        return bytes(self.heard)

    def request(self) -> tuple[list[str], bytes] | None:
        """The lines of the request's head, and its body, once they have come."""
        head, blank, body = bytes(self.heard).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        length = next((line.split(":")[1] for line in lines if line.startswith("Content-Length:")), "0")
        return (lines, body) if blank and len(body) == int(length) else None


class Liar(ServerFactory):
    """
    Takes a worker's place: answers each request with the next of its scripts, the last for ever.

    A script is bytes to say, Deferreds to wait for, and perhaps an end; without one the connection stays.
    """

    noisy = False

    def __init__(self, *scripts: Iterable[bytes | Deferred[None] | End]) -> None:
        self._scripts = list(scripts)
        self.peers: list[Peer] = []
        self.asked: DeferredQueue[Peer] = DeferredQueue()

    def buildProtocol(self, _: object) -> Peer:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        peer = Peer()
        self.peers.append(peer)
        Deferred.fromCoroutine(self._lie(peer, script))
        return peer

    async def _lie(self, peer: Peer, script: Iterable[bytes | Deferred[None] | End]) -> None:
        await wait_until(lambda: peer.request() or peer.end)
        self.asked.put(peer)
        for step in script:
            if isinstance(step, bytes):
                await peer.say(step)
            elif step is End.CLOSE:
                peer.transport.loseConnection()
            elif step is End.RESET:
                peer.transport.abortConnection()
            else:
                await step


class LoopbackTestCase(TestCase):
    """Leaves no connection and no port behind."""

    timeout = 30

    def listen(self, factory: IProtocolFactory) -> int:
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    def lie(self, *scripts: Iterable[bytes | Deferred[None] | End]) -> tuple[Liar, str]:
        """Start a liar, and tell its URL."""
        liar = Liar(*scripts)
        port = self.listen(liar)
        self.addCleanup(lambda: Deferred.fromCoroutine(self._hang_up(liar.peers)))
        return liar, f"http://127.0.0.1:{port}"

    async def call(self, port: int, said: bytes = b"") -> Peer:
        """Connect, and say something."""
        peer: Peer = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Peer())
        self.addCleanup(lambda: Deferred.fromCoroutine(self._hang_up([peer])))
        await peer.say(said)
        return peer

    async def _hang_up(self, peers: list[Peer]) -> None:
        for peer in peers:
            if peer.end is None:
                peer.transport.abortConnection()
            await peer.hear_out()
