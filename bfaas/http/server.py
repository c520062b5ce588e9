"""HTTP server: bounded request bodies and connections, one-line errors, graceful connection shutdown."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IHalfCloseableProtocol, INegotiated, IProtocolNegotiationFactory
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.web.http import SERVICE_UNAVAILABLE, datetimeToString
from twisted.web.server import Request, Site
from zope.interface import implementer

from bfaas.http.channel import RETRY_AFTER, Channel
from bfaas.http.client_address import peer_key
from bfaas.http.errors import HTTPError
from bfaas.http.proxy_protocol import ProxyHeaderReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from klein import Klein
    from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
    from twisted.python.failure import Failure
    from twisted.web.resource import IResource

    RequestFilter = Callable[[Request], str | None]

_log = Logger()

MAX_CONNECTIONS = 4096
"""Default limit of concurrent connections of a site."""

FLUSH_TIMEOUT = 5.0
"""Seconds that connections get to deliver their output when a site is drained."""

_TEXT = "text/plain; charset=utf-8"


def error_response(request: Request, code: int, message: str) -> bytes:
    """Set the status and headers of a one-line error and return its body. A 503 gets a `Retry-After`."""
    request.setResponseCode(code)
    if code == SERVICE_UNAVAILABLE and not request.responseHeaders.hasHeader("Retry-After"):
        request.setHeader("Retry-After", RETRY_AFTER)
    return _text(request, message, _TEXT)


def text_response(request: Request, text: str, content_type: str = _TEXT) -> bytes:
    """Set the headers of a short response that must not be cached, and return its body."""
    request.setHeader("Cache-Control", "no-store")
    request.setHeader("X-Content-Type-Options", "nosniff")
    return _text(request, text, content_type)


def _text(request: Request, text: str, content_type: str) -> bytes:
    data = text.encode() + b"\n"
    request.setHeader("Content-Type", content_type)
    request.setHeader("Content-Length", str(len(data)))
    return data


def read_body(request: Request) -> bytes:
    """Return the complete body of a dispatched request."""
    assert request.content is not None  # noqa: S101 - set before a request is dispatched
    content: bytes = request.content.read()
    return content


def register_error_handlers(app: Klein) -> None:
    """Register handlers that turn `HTTPError`, and klein's 404 and 405, into one-line responses."""
    # Not at module level: a worker listens before it loads klein, which loads werkzeug.
    from werkzeug.exceptions import HTTPException  # noqa: PLC0415

    @app.handle_errors(HTTPError)
    def http_error(self: object, request: Any, failure: Failure) -> bytes:  # noqa: ARG001 - a method
        error = failure.value
        assert isinstance(error, HTTPError)  # noqa: S101 - klein dispatches on the type
        for name, value in error.headers.items():
            request.setHeader(name, value)
        return error_response(request, error.code, error.message)

    @app.handle_errors(HTTPException)
    def no_route(self: object, request: Any, failure: Failure) -> bytes:  # noqa: ARG001 - a method
        methods = getattr(failure.value, "valid_methods", None)
        if methods:
            request.setHeader("Allow", ", ".join(sorted(methods)))
            return error_response(request, 405, "method not allowed")
        return error_response(request, 404, "not found")


class BoundedRequest(Request):
    """
    A request whose body has a limit: over it, the response is 413 and the connection ends.

    Such a request is not dispatched, so that no application acts on half a body. Requests that
    `request_filter` rejects are answered with 403.
    """

    channel: Channel
    defaultContentType = None

    def __init__(self, *args: Any, request_filter: RequestFilter | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_filter = request_filter
        self._received = 0

    def handleContentChunk(self, data: bytes) -> None:
        """Store body data; reject the request over the limit."""
        self._received += len(data)
        if self._received > self.channel.max_body:
            self.channel.reject_too_large()
            return
        try:
            super().handleContentChunk(data)
        except OSError:
            self.channel.send_error(503, "cannot store the request body")

    def process(self) -> None:
        """Dispatch the request unless it was rejected earlier or is invalid."""
        transport: Any = self.transport
        if transport.disconnecting:
            return
        if self._is_ambiguous():
            self.channel.reject_malformed()
            return
        # Methods are case-sensitive, but the router ignores case.
        if self.method == b"CONNECT" or not self.method.isupper():
            self.channel.send_error(501, "method not supported")
            return
        if not self._normalize_target():
            self.channel.send_error(400, "the request target is neither a path nor a URL that matches Host")
            return
        self.setHeader("Date", datetimeToString())
        rejection = self._request_filter(self) if self._request_filter else None
        if rejection is not None:
            error = error_response(self, 403, rejection)
        elif not _is_routable(self.path):
            error = error_response(self, 404, "not found")
        else:
            super().process()
            return
        self.write(error)
        self.finish()

    def _normalize_target(self) -> bool:
        """
        Reduce the absolute form of the request target to a path. Return whether the target is valid.

        By RFC 9112, 3.2.2, the authority of such a target overrides `Host`. Other software may prefer `Host`,
        so the two must be the same.
        """
        if self.uri.startswith(b"/") or (self.uri == b"*" and self.method == b"OPTIONS"):
            return True
        match = _ABSOLUTE.fullmatch(self.uri)
        if match is None:
            return False
        scheme, authority = match[1].lower(), match[2]
        hosts = self.requestHeaders.getRawHeaders(b"Host", [authority])
        same_host = _without_default_port(hosts[0], scheme) == _without_default_port(authority, scheme)
        if not same_host or (scheme == b"https" and not self.isSecure()):
            return False
        self.requestHeaders.setRawHeaders(b"Host", hosts)  # HTTP/1.0 requests may lack it
        self.uri = match[3] if match[3].startswith(b"/") else b"/" + match[3]
        self.path = self.uri.partition(b"?")[0]
        return True

    def _is_ambiguous(self) -> bool:
        """Return whether other software could read another host or body length from this request."""
        hosts = self.requestHeaders.getRawHeaders("Host", [])
        if self.clientproto == b"HTTP/1.1":
            return len(hosts) != 1
        return len(hosts) > 1 or self.requestHeaders.hasHeader("Transfer-Encoding")

    def getRequestHostname(self) -> bytes:
        """Return a fixed host: Klein fails on invalid Host headers, and no route depends on it."""
        return b"localhost"


_ABSOLUTE = re.compile(rb"(https?)://([^/?#@\s]+)((?:[/?][^#]*)?)", re.IGNORECASE)


def _without_default_port(authority: bytes, scheme: bytes) -> bytes:
    """Normalize `host` or `host:port` (RFC 3986, 6.2.3)."""
    host, colon, port = authority.lower().rpartition(b":")
    return host if colon and port in (b"", b"443" if scheme == b"https" else b"80") else authority.lower()


def _is_routable(path: bytes) -> bool:
    """Return whether Klein can route this path: it routes `//run` to `/run`, and fails on invalid UTF-8."""
    try:
        return "//" not in unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return False


@implementer(IHalfCloseableProtocol)
class _Connection(ProtocolWrapper):
    """
    A connection that closes gracefully: it closes its own side, then waits until the peer closes.

    Until then the peer may not have received all output: closing at once, or stopping the machine, would
    lose it. With TLS, our side ends with a close_notify alert, which the peer answers with its own.

    The connection is aborted if the peer does not receive all output and close its side within `LINGER`
    seconds, or sends more than `MAX_IGNORED` bytes meanwhile. (Output that is sent may still be in the
    kernel, megabytes of it for a slow reader; an abort drops it.)
    """

    LINGER = 60.0
    MAX_IGNORED = 16 << 20
    factory: BoundedSite
    transport: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.closed: Deferred[None] = Deferred()
        self._lingering: IDelayedCall | None = None
        self._ignored = 0
        self._header = ProxyHeaderReader() if self.factory.proxied else None
        self._peer: IAddress | None = None
        self._host: IAddress | None = None
        self.counted_as: str | None = None
        """The address under which the site counts this connection; None if it is not counted."""

    def getPeer(self) -> Any:
        """Return the client's address, from the PROXY header if there is one."""
        return self._peer or super().getPeer()

    def getHost(self) -> Any:
        """Return the address that the client connected to, from the PROXY header if there is one."""
        return self._host or super().getHost()

    def loseConnection(self) -> None:
        """Close our side once all output is sent."""
        if self.disconnecting:
            return
        self.disconnecting = 1
        self._lingering = self.factory.clock.callLater(self.LINGER, self.transport.abortConnection)
        self.transport.unregisterProducer()
        if INegotiated.providedBy(self.transport):
            self.transport.loseConnection()
        else:
            self.transport.loseWriteConnection()

    def dataReceived(self, data: bytes) -> None:
        """Pass data to the channel; discard it once our side is closed."""
        if not self.disconnecting:
            if self._header is not None:
                data = self._without_header(self._header, data)
            if data:
                super().dataReceived(data)
            return
        self._ignored += len(data)
        if self._ignored > self.MAX_IGNORED:
            self.transport.abortConnection()

    def _without_header(self, header: ProxyHeaderReader, data: bytes) -> bytes:
        """Parse the PROXY header and return the data after it. Abort if it is invalid, or over the limit."""
        try:
            parsed = header.feed(data)
        except ValueError as error:
            self.factory.report_invalid_header(error)
            self._abort()
            return b""
        if parsed is None:
            return b""
        self._header, self._peer, self._host = None, parsed.source, parsed.destination
        if not self.factory.count(self):
            self._abort()
            return b""
        return parsed.rest

    def _abort(self) -> None:
        self.disconnecting = 1
        self.transport.abortConnection()

    def writeConnectionLost(self) -> None:
        """Do nothing: our side is closed, but the peer may still be reading."""

    def readConnectionLost(self) -> None:
        """Close after the peer. A peer that closes during a request or response has disconnected: abort."""
        if self.disconnecting:
            self.transport.loseConnection()
        else:
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Fire `closed`."""
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        super().connectionLost(reason)
        self.closed.callback(None)


class _Site(Site):
    """A site that writes no access log."""

    noisy = False
    displayTracebacks = False
    _IN_MEMORY = 16 << 10

    def log(self, request: object) -> None:
        """Do nothing: the application logs one line per run."""

    def getContentFile(self, length: int | None) -> IO[bytes]:
        """Return a file for a request body, in memory while small: many slow uploads may be in progress."""
        if length is not None and length <= self._IN_MEMORY:
            return BytesIO()
        from tempfile import SpooledTemporaryFile  # noqa: PLC0415 - workers rarely need it

        return SpooledTemporaryFile(self._IN_MEMORY)


class _Rejected(Protocol):
    """Closes a connection at once. Wrappers of a site, such as TLS, do not support None as a protocol."""

    transport: Any

    def connectionMade(self) -> None:
        """Close the connection."""
        self.transport.loseConnection()


@implementer(IProtocolNegotiationFactory)
class BoundedSite(WrappingFactory):
    """
    Serves a resource with bounded request bodies and connections; `drain` waits until output is delivered.

    Connections over `max_connections`, or over `max_per_address` from one address, are closed at once. IPv6
    addresses of one /64 count as one; peers on a UNIX socket have no address and no such limit. (Behind a
    proxy all clients share the proxy's few addresses, unless it sends theirs, see `proxied`.)
    `request_filter` returns why a request is rejected, or None.
    """

    protocol = _Connection
    noisy = False

    def __init__(
        self,
        clock: IReactorTime,
        resource: IResource,
        max_body: int,
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_per_address: int = MAX_CONNECTIONS,
        request_filter: RequestFilter | None = None,
    ) -> None:
        self.clock = clock
        self.proxied = False
        """Whether connections start with a PROXY protocol header, and are counted under its address."""
        self._header_reported = False
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._connections_from: Counter[str] = Counter()
        site = _Site(
            resource,
            requestFactory=partial(BoundedRequest, request_filter=request_filter),
            parsePOSTFormSubmission=False,
            timeout=Channel.IDLE_TIMEOUT,
            reactor=clock,
        )
        make_channel: Any = partial(Channel, max_body)
        site.protocol = make_channel  # type: ignore[method-assign]  # it is not a method
        super().__init__(site)

    def acceptableProtocols(self) -> list[bytes]:
        """Return the protocols to negotiate by ALPN."""
        return [b"http/1.1", b"http/1.0"]

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Return the protocol for a connection; one that closes it if a limit is reached."""
        full = len(self.protocols) >= self._max_connections
        if full or not (self.proxied or self._has_room(peer_key(addr))):
            return _Rejected()
        return super().buildProtocol(addr)

    def registerProtocol(self, connection: _Connection) -> None:
        """Count a connection; one from a proxy is counted once its PROXY header has arrived."""
        super().registerProtocol(connection)
        if not self.proxied:
            self.count(connection)

    def count(self, connection: _Connection) -> bool:
        """Count a connection under its peer's address; return False if that is at its limit."""
        key = peer_key(connection.getPeer())
        if not self._has_room(key):
            return False
        connection.counted_as = key
        self._connections_from[key] += 1
        return True

    def unregisterProtocol(self, connection: _Connection) -> None:
        """Stop counting a connection."""
        super().unregisterProtocol(connection)
        key = connection.counted_as
        if key is not None:
            self._connections_from[key] -= 1
            if not self._connections_from[key]:
                del self._connections_from[key]

    def _has_room(self, key: str) -> bool:
        return not key or self._connections_from[key] < self._max_per_address

    def report_invalid_header(self, error: ValueError) -> None:
        """Log the first invalid PROXY header only: any client could cause many."""
        if not self._header_reported:
            self._header_reported = True
            _log.warn(
                "closed a connection without a valid PROXY header: {error}; further ones are not logged",
                error=error,
            )

    async def drain(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Close every connection once its output is delivered; abort those left after `timeout` seconds."""
        connections = list(self.protocols)
        timer = self.clock.callLater(timeout, self._abort)
        for connection in connections:
            connection.loseConnection()
        await DeferredList([connection.closed for connection in connections])
        if timer.active():
            timer.cancel()

    def _abort(self) -> None:
        for connection in list(self.protocols):
            connection.abortConnection()
