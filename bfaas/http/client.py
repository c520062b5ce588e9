"""
HTTP client: `send_request` sends the requests of the coordinator and the command, with treq.

The emulator's proxy uses an agent directly, with `wait_for_response`: treq would change `Content-Encoding` in
the responses that it forwards.

treq and Twisted's agent leave three things to their callers: closing the connection as soon as a request is
cancelled, bounding how much of a response is read, and dropping a response without reading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hyperlink import EncodedURL
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer
from zope.interface import implementer

from bfaas.http.endpoints import UNIX_HOST, UNIX_SCHEME, Endpoints
from bfaas.http.strict_agent import StrictAgent

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IConsumer
    from twisted.internet.ssl import CertificateOptions
    from twisted.web.iweb import IResponse


MAX_IDLE_CONNECTIONS = 32
"""
Idle connections that a pooled agent keeps to one server. Twisted's default is 2: with more requests at once,
most would make a connection of their own.
"""


class BodyTooLargeError(Exception):
    """The response body is larger than the limit."""


def single_use_agent(reactor: Any) -> IAgent:
    """Return an agent for untrusted servers: one connection per request, strict response parsing."""
    return StrictAgent(Endpoints(reactor))


def pooled_agent(reactor: Any, tls: CertificateOptions | None = None) -> tuple[IAgent, HTTPConnectionPool]:
    """
    Return an agent with persistent connections, for trusted servers, and its connection pool.

    `tls` replaces the system's trust store, and may have a certificate for this client.
    """
    pool = HTTPConnectionPool(reactor)
    pool.maxPersistentPerHost = MAX_IDLE_CONNECTIONS
    return Agent.usingEndpointFactory(reactor, Endpoints(reactor, tls=tls), pool=pool), pool


async def send_request(
    agent: IAgent,
    method: str,
    base_url: str,
    target: str,
    headers: Headers | None = None,
    body: bytes | None = None,
) -> IResponse:
    """
    Send one request and return the response once its head has arrived, with its body unread.

    The URL is `base_url` followed by `target` (a path, possibly with a query), sent exactly as given.
    Redirects are not followed, and no cookie outlives the request. Read the body with `read_body` or a
    `BodyReceiver`, or drop it with `abort_body`. Cancelling closes the connection and raises
    `CancelledError`; failures raise what the agent raises.
    """
    url = (base_url.rstrip("/") + target).encode("ascii")
    client = HTTPClient(_FixedURLAgent(agent, url), _NO_COOKIES, data_to_body_producer=BytesProducer)
    return await wait_for_response(
        client.request(
            method,
            _PLACEHOLDER,
            headers=headers,
            data=body,
            cookies=_NO_COOKIES,
            allow_redirects=False,
            unbuffered=True,
            reactor=_NO_REACTOR,
        )
    )


# treq imports the global reactor if it gets none; it uses it only for its `timeout` argument.
_NO_REACTOR: Any = object()

_UNIX = f"{UNIX_SCHEME}:".encode()


class _Placeholder(EncodedURL):
    """The URL that treq gets: one that is normalized already, which would take half of treq's time."""

    def to_uri(self) -> _Placeholder:
        return self

    def to_text(self, with_password: bool = False) -> str:  # noqa: ARG002 - it has none
        return _PLACEHOLDER_TEXT


_PLACEHOLDER_TEXT = "http://placeholder/"
_PLACEHOLDER = _Placeholder.from_text(_PLACEHOLDER_TEXT)


class _NoCookies(IndexableCookieJar):
    """A jar that neither stores nor sends cookies."""

    def add_cookie_header(self, request: object) -> None:
        """Do nothing."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Do nothing."""


_NO_COOKIES = _NoCookies()


@implementer(IAgent)
class _FixedURLAgent:
    """
    Sends requests to one URL, whatever URL treq passes.

    treq normalizes URLs and encodes hosts with IDNA, which rejects IPv6 addresses and names with an
    underscore, such as Fly's `http://_api.internal:4280`.
    """

    def __init__(self, agent: IAgent, url: bytes) -> None:
        self._agent = agent
        self._url = url

    def request(
        self,
        method: bytes,
        uri: bytes,  # noqa: ARG002 - treq's placeholder
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """Send a request."""
        if self._url.startswith(_UNIX):
            headers = headers.copy() if headers else Headers()
            headers.setRawHeaders("host", [UNIX_HOST])
        return self._agent.request(method, self._url, headers, bodyProducer)


@implementer(IBodyProducer)
class BytesProducer:
    """A request body in memory, written at once."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write the whole body."""
        consumer.write(self._data)
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done

    def pauseProducing(self) -> None:
        """Do nothing: the body is written already."""

    def resumeProducing(self) -> None:
        """Do nothing: the body is written already."""

    def stopProducing(self) -> None:
        """Do nothing: the body is written already."""


async def wait_for_response(response: Deferred[Any]) -> IResponse:
    """Wait for a response; turn any error that a cancellation causes in the agent into `CancelledError`."""
    cancelled = False

    def cancel(_: object) -> None:
        nonlocal cancelled
        cancelled = True
        response.cancel()

    outcome: Deferred[IResponse] = Deferred(cancel)
    response.addBoth(lambda result: None if outcome.called else outcome.callback(result))
    try:
        return await outcome
    except Exception as error:
        if cancelled:
            raise CancelledError from error
        raise


class BodyReceiver(Protocol):
    """
    Receives a response body; `done` fires when the body is complete.

    `done` fails if the body is malformed or incomplete, or with the exception that `on_data` raises.
    Cancelling `done` closes the connection. (`readBody` and treq's collectors would leave the connection
    open, and go on reading from it: Twisted #8227.)
    """

    def __init__(
        self, on_data: Callable[[bytes], None], on_start: Callable[[Any], None] = lambda _: None
    ) -> None:
        self.transport: Any = None
        self._on_data = on_data
        self._on_start = on_start
        self.done: Deferred[None] = Deferred(lambda _: self.close())

    def connectionMade(self) -> None:
        """Pass the transport, a push producer, to `on_start`."""
        self._on_start(self.transport)

    def dataReceived(self, data: bytes) -> None:
        """Pass data to `on_data`; close the connection if that raises."""
        try:
            self._on_data(data)
        except Exception:  # noqa: BLE001 - any exception becomes the outcome
            self._finish(Failure())
            self.close()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Fire `done`. Only `ResponseDone` means that the body is complete."""
        self.transport = None  # which refers to this object: a cycle would need the garbage collector
        self._finish(None if reason.check(ResponseDone) else reason)

    def pause(self) -> None:
        """Read no more for now. Like the other calls, this does nothing after the end of the body."""
        if self.transport is not None:
            self.transport.pauseProducing()

    def resume(self) -> None:
        """Read again."""
        if self.transport is not None:
            self.transport.resumeProducing()

    def close(self) -> None:
        """Close the connection without reading the rest of the body."""
        if self.transport is not None:
            self.transport.stopProducing()

    def _finish(self, outcome: Failure | None) -> None:
        if not self.done.called:
            self.done.callback(outcome)


def abort_body(response: IResponse) -> None:
    """Close a response's connection without reading the body."""
    body = BodyReceiver(lambda _: None, on_start=lambda transport: transport.stopProducing())
    body.done.addErrback(lambda _: None)
    response.deliverBody(body)


async def read_body(response: IResponse, limit: int) -> bytes:
    """Read a response body. Raises `BodyTooLargeError` if it has more than `limit` bytes."""
    pieces: list[bytes] = []
    remaining = limit

    def append(piece: bytes) -> None:
        nonlocal remaining
        remaining -= len(piece)
        if remaining < 0:
            raise BodyTooLargeError(f"more than {limit} bytes")
        pieces.append(piece)

    body = BodyReceiver(append)
    response.deliverBody(body)
    await body.done
    return b"".join(pieces)
