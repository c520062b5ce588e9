"""
One HTTP exchange, as a client: what `treq` and Twisted's agent leave to their users.

Cancelling at any moment closes the connection at once, and reads as a cancellation; a body is read with a
limit, and an unwanted one is not read at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone
from twisted.web.iweb import IAgent, IBodyProducer
from zope.interface import implementer

from bfaas.http.endpoints import Endpoints
from bfaas.http.strict_agent import StrictAgent

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IConsumer
    from twisted.web.http_headers import Headers
    from twisted.web.iweb import IResponse


class BodyTooLargeError(Exception):
    """An answer's body is larger than we take."""


@implementer(IBodyProducer)
class BytesProducer:
    """A request's body that is in memory, written at once."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write it all."""
        consumer.write(self._data)
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done

    def pauseProducing(self) -> None:
        """Nothing is left to write."""

    def resumeProducing(self) -> None:
        """Nothing is left to write."""

    def stopProducing(self) -> None:
        """Nothing is left to write."""


@implementer(IAgent)
class Towards:
    """
    Sends requests to `base` that are addressed to `ANYWHERE`, for use below treq.

    treq encodes a URL's host with IDNA, and so refuses IPv6 addresses and names with an underscore
    (`http://_api.internal:4280`). It gets `ANYWHERE`, and this puts the server's own URL back.
    """

    ANYWHERE = "http://server"

    def __init__(self, agent: IAgent, base: str) -> None:
        self._agent = agent
        self._base = base.rstrip("/").encode("ascii")

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """Send a request."""
        target = self._base + uri.removeprefix(self.ANYWHERE.encode())
        return self._agent.request(method, target, headers, bodyProducer)


def single_use_agent(reactor: Any) -> IAgent:
    """Make an agent for servers that we do not trust: a connection for each request, strictly read."""
    return StrictAgent(Endpoints(reactor))


def pooled_agent(reactor: Any) -> tuple[IAgent, HTTPConnectionPool]:
    """Make an agent that keeps connections, TLS or not, for a server that we trust; and their pool."""
    pool = HTTPConnectionPool(reactor)
    return Agent.usingEndpointFactory(reactor, Endpoints(reactor), pool=pool), pool


async def wait_for_response(response: Deferred[Any]) -> Any:
    """Wait for an answer's head; a cancellation comes out as one, whatever the agent makes of it."""
    cancelled = False

    def cancel(_: object) -> None:
        nonlocal cancelled
        cancelled = True
        response.cancel()

    outcome: Deferred[Any] = Deferred(cancel)
    response.addBoth(lambda result: None if outcome.called else outcome.callback(result))
    try:
        return await outcome
    except Exception as error:
        if cancelled:
            raise CancelledError from error
        raise


class BodyReceiver(Protocol):
    """
    Receives an answer's body; `done` fires when it has come whole.

    `done` fails with what is wrong with the body, or with what `on_data` raises. Cancelling it closes the
    connection. (`readBody` and treq's collectors leave it open, and reading: Twisted #8227.)
    """

    def __init__(
        self, on_data: Callable[[bytes], None], on_start: Callable[[Any], None] = lambda _: None
    ) -> None:
        self.transport: Any = None
        self._on_data = on_data
        self._on_start = on_start
        self.done: Deferred[None] = Deferred(lambda _: self.close())

    def connectionMade(self) -> None:
        """Begin; the transport is a producer, to be paused and resumed at the receiver's pace."""
        self._on_start(self.transport)

    def dataReceived(self, data: bytes) -> None:
        """Pass a piece on."""
        try:
            self._on_data(data)
        except Exception:  # noqa: BLE001 - whatever it is, it is the outcome
            self._finish(Failure())
            self.close()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Tell how it ended: only a body whose framing is complete has come whole."""
        self._finish(None if reason.check(ResponseDone) else reason)

    def close(self) -> None:
        """Close the connection, whatever is still to come."""
        if self.transport is not None:
            self.transport.stopProducing()

    def _finish(self, outcome: Failure | None) -> None:
        if not self.done.called:
            self.done.callback(outcome)


def abort_body(response: IResponse) -> None:
    """Close an answer's connection without reading its body."""

    def drop(_: bytes) -> None:
        body.close()

    body = BodyReceiver(drop)
    body.done.addErrback(lambda _: None)
    response.deliverBody(body)
    body.close()


async def read_body(response: IResponse, limit: int) -> bytes:
    """Read an answer's body whole. Raises `BodyTooLargeError` past `limit` bytes."""
    pieces: list[bytes] = []
    room = limit

    def take(piece: bytes) -> None:
        nonlocal room
        room -= len(piece)
        if room < 0:
            raise BodyTooLargeError(f"more than {limit} bytes")
        pieces.append(piece)

    body = BodyReceiver(take)
    response.deliverBody(body)
    await body.done
    return b"".join(pieces)
