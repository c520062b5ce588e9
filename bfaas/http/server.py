"""
The edges of an HTTP server: bounded request bodies, one-line errors, and an orderly end.

Both roles stand on this; it knows nothing of runs or machines.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any
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
from bfaas.http.client_address import address_key
from bfaas.http.errors import HTTPError
from bfaas.http.proxy_protocol import HeaderReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from klein import Klein
    from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
    from twisted.python.failure import Failure
    from twisted.web.resource import IResource

    RequestFilter = Callable[[Request], str | None]

_log = Logger()

MAX_CONNECTIONS = 4096
"""Connections that a site has at the same time, unless it is told otherwise."""

FLUSH_TIMEOUT = 5.0
"""Seconds that connections get to deliver their output when a site is drained."""

_TEXT = "text/plain; charset=utf-8"


def error_response(request: Request, code: int, line: str) -> bytes:
    """Make the request's answer a one-line error; returns its body. A 503 has a `Retry-After`."""
    request.setResponseCode(code)
    if code == SERVICE_UNAVAILABLE and not request.responseHeaders.hasHeader("Retry-After"):
        request.setHeader("Retry-After", RETRY_AFTER)
    return _text(request, line, _TEXT)


def text_response(request: Request, text: str, kind: str = _TEXT) -> bytes:
    """Make the request's answer something small that is true now; returns its body."""
    request.setHeader("Cache-Control", "no-store")
    request.setHeader("X-Content-Type-Options", "nosniff")
    return _text(request, text, kind)


def _text(request: Request, text: str, kind: str) -> bytes:
    data = text.encode() + b"\n"
    request.setHeader("Content-Type", kind)
    request.setHeader("Content-Length", str(len(data)))
    return data


def read_body(request: Request) -> bytes:
    """Give the request's body, all of which has come."""
    assert request.content is not None  # noqa: S101 - it is made before a request is dispatched
    content: bytes = request.content.read()
    return content


def register_error_handlers(app: Klein) -> None:
    """Let the routes of an app raise `HTTPError`, and make its 404 and 405 one line of text."""
    # Not at the top: a worker listens before it loads klein, which has loaded this.
    from werkzeug.exceptions import HTTPException  # noqa: PLC0415

    @app.handle_errors(HTTPError)
    def refused(self: object, request: Any, failure: Failure) -> bytes:  # noqa: ARG001 - a method
        error = failure.value
        assert isinstance(error, HTTPError)  # noqa: S101 - what klein dispatched on
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
    A request whose body has a limit: past it, the answer is 413 and the connection ends.

    Such a request is never dispatched, so that nobody acts on the first half of a body. Nor is one that
    `request_filter` has something against, which is answered 403.
    """

    channel: Channel
    defaultContentType = None

    def __init__(self, *args: Any, request_filter: RequestFilter | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_filter = request_filter
        self._received = 0

    def handleContentChunk(self, data: bytes) -> None:
        """Keep a piece of the body, or refuse it all."""
        self._received += len(data)
        if self._received > self.channel.max_body:
            self.channel.too_large()
            return
        try:
            super().handleContentChunk(data)
        except OSError:
            self.channel.refuse(503, "no room for the body")

    def process(self) -> None:
        """Dispatch the request, unless it was refused meanwhile, or is refused now."""
        transport: Any = self.transport
        if transport.disconnecting:
            return
        if self._is_ambiguous():
            self.channel.malformed()
            return
        # Methods are case-sensitive; the router's are not.
        if self.method == b"CONNECT" or not self.method.isupper():
            self.channel.refuse(501, "the method is not supported")
            return
        if not self._take_target():
            self.channel.refuse(400, "the request target is not a path, or a URL of the Host that is asked")
            return
        self.setHeader("Date", datetimeToString())
        objection = self._request_filter(self) if self._request_filter else None
        if objection is not None:
            error = error_response(self, 403, objection)
        elif not _is_routable(self.path):
            error = error_response(self, 404, "not found")
        else:
            super().process()
            return
        self.write(error)
        self.finish()

    def _take_target(self) -> bool:
        """
        Reduce the absolute form of the request target to a path. Return whether the target is valid.

        RFC 9112, 3.2.2: the authority of such a target counts, and not `Host`. Others may read it the other
        way round, so the two must be the same.
        """
        if self.uri.startswith(b"/") or (self.uri == b"*" and self.method == b"OPTIONS"):
            return True
        match = _ABSOLUTE.fullmatch(self.uri)
        if match is None:
            return False
        scheme, authority = match[1].lower(), match[2]
        hosts = self.requestHeaders.getRawHeaders(b"Host", [authority])
        is_ours = _without_default_port(hosts[0], scheme) == _without_default_port(authority, scheme)
        if not is_ours or (scheme == b"https" and not self.isSecure()):
            return False
        self.requestHeaders.setRawHeaders(b"Host", hosts)  # HTTP/1.0 may leave it out
        self.uri = match[3] if match[3].startswith(b"/") else b"/" + match[3]
        self.path = self.uri.partition(b"?")[0]
        return True

    def _is_ambiguous(self) -> bool:
        """Tell whether others could read this request as one to another host, or of another length."""
        hosts = self.requestHeaders.getRawHeaders("Host", [])
        if self.clientproto == b"HTTP/1.1":
            return len(hosts) != 1
        return len(hosts) > 1 or self.requestHeaders.hasHeader("Transfer-Encoding")

    def getRequestHostname(self) -> bytes:
        """Tell klein a host that it can read, whatever the client calls us; no route looks at it."""
        return b"localhost"


_ABSOLUTE = re.compile(rb"(https?)://([^/?#@\s]+)((?:[/?][^#]*)?)", re.IGNORECASE)


def _without_default_port(authority: bytes, scheme: bytes) -> bytes:
    """Normalize `host` or `host:port` (RFC 3986, 6.2.3)."""
    host, colon, port = authority.lower().rpartition(b":")
    return host if colon and port in (b"", b"443" if scheme == b"https" else b"80") else authority.lower()


def _is_routable(path: bytes) -> bool:
    """Tell what klein can be given: it finds `/run` for `//run`, and logs an error without UTF-8."""
    try:
        return "//" not in unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return False


@implementer(IHalfCloseableProtocol)
class _Connection(ProtocolWrapper):
    """
    A connection that closes as TCP wants it: it ends its own side, then waits for the peer to end its.

    Until then the peer may not have everything: closing at once, or ending the machine, would lose it.
    Under TLS the end of our side is a close_notify alert, which the peer answers with its own.

    A peer that does not take what was written, and end its side, within `LINGER` seconds is cut off. (Sent
    is not taken: the kernel may hold megabytes for a peer that reads slowly, and an abort drops them.) So is
    one that sends more than `MAX_IGNORED` bytes meanwhile.
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
        self._header = HeaderReader() if self.factory.proxied else None
        self._peer: IAddress | None = None
        self._host: IAddress | None = None
        self.counted_as: str | None = None
        """The address that the site counts this connection under, if any."""

    def getPeer(self) -> Any:
        """Return the client's address: the one that its proxy tells, where there is one."""
        return self._peer or super().getPeer()

    def getHost(self) -> Any:
        """Return the address that the client connected to, in the same way."""
        return self._host or super().getHost()

    def loseConnection(self) -> None:
        """End our side, once what was written is sent."""
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
        """Pass it on, unless nobody could be answered any more."""
        if not self.disconnecting:
            if self._header is not None:
                data = self._without_header(self._header, data)
            if data:
                super().dataReceived(data)
            return
        self._ignored += len(data)
        if self._ignored > self.MAX_IGNORED:
            self.transport.abortConnection()

    def _without_header(self, header: HeaderReader, data: bytes) -> bytes:
        """Read the proxy's header; return what follows it. Abort a connection that is not to be served."""
        try:
            read = header.feed(data)
        except ValueError as error:
            self.factory.report_header(error)
            self._abort()
            return b""
        if read is None:
            return b""
        self._header, self._peer, self._host = None, read.source, read.destination
        if not self.factory.count(self):
            self._abort()
            return b""
        return read.rest

    def _abort(self) -> None:
        self.disconnecting = 1
        self.transport.abortConnection()

    def writeConnectionLost(self) -> None:
        """Our side has ended; what was written may still be on its way."""

    def readConnectionLost(self) -> None:
        """Close, as the peer has; one that does so in the middle of an exchange has gone away."""
        if self.disconnecting:
            self.transport.loseConnection()
        else:
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Both sides have ended."""
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        super().connectionLost(reason)
        self.closed.callback(None)


class _Site(Site):
    """A site that leaves the log to the application."""

    noisy = False
    displayTracebacks = False
    _IN_MEMORY = 16 << 10

    def log(self, request: object) -> None:
        """Log nothing: the one line that tells of a run is ours."""

    def getContentFile(self, _: int | None) -> SpooledTemporaryFile[bytes]:
        """Keep a body while it comes: many may come slowly, so that only the short ones are in memory."""
        return SpooledTemporaryFile(self._IN_MEMORY)


class _Refused(Protocol):
    """A connection that is closed as it comes: wrappers of a site, such as TLS, take no None for it."""

    transport: Any

    def connectionMade(self) -> None:
        """Close it."""
        self.transport.loseConnection()


@implementer(IProtocolNegotiationFactory)
class BoundedSite(WrappingFactory):
    """
    Serves a resource with bounded bodies, and can wait until what it has written is delivered.

    Connections past `max_connections`, or past `max_per_address` from one address, are closed as they come.
    An address is counted as a client's is: an IPv6 one with its /64; peers without one, on a UNIX socket, are
    not limited by it. (Behind a proxy all clients have the proxy's few addresses, unless it names theirs, see
    `proxied`.) `request_filter` tells what there is against a request, if anything.
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
        """Whether connections begin with a header of the PROXY protocol, by which they are then counted."""
        self._header_reported = False
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._from: Counter[str] = Counter()
        site = _Site(
            resource,
            requestFactory=partial(BoundedRequest, request_filter=request_filter),
            parsePOSTFormSubmission=False,
            timeout=Channel.IDLE_TIMEOUT,
            reactor=clock,
        )
        make_channel: Any = partial(Channel, max_body)
        site.protocol = make_channel  # type: ignore[method-assign]  # it is no method
        super().__init__(site)

    def acceptableProtocols(self) -> list[bytes]:
        """Return what may be agreed on by ALPN, under TLS."""
        return [b"http/1.1", b"http/1.0"]

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Take a connection, or have it closed."""
        full = len(self.protocols) >= self._max_connections
        if full or not (self.proxied or self._has_room(_name(addr))):
            return _Refused()
        return super().buildProtocol(addr)

    def registerProtocol(self, connection: _Connection) -> None:
        """Note a connection that has begun; one from a proxy is counted once its client is known."""
        super().registerProtocol(connection)
        if not self.proxied:
            self.count(connection)

    def count(self, connection: _Connection) -> bool:
        """Count a connection under its peer's address; return False if that has as many as it may."""
        name = _name(connection.getPeer())
        if not self._has_room(name):
            return False
        connection.counted_as = name
        self._from[name] += 1
        return True

    def unregisterProtocol(self, connection: _Connection) -> None:
        """Count it no more."""
        super().unregisterProtocol(connection)
        name = connection.counted_as
        if name is not None:
            self._from[name] -= 1
            if not self._from[name]:
                del self._from[name]

    def _has_room(self, name: str) -> bool:
        return not name or self._from[name] < self._max_per_address

    def report_header(self, error: ValueError) -> None:
        """Log the first connection that does not begin as it has to; anyone could make many."""
        if not self._header_reported:
            self._header_reported = True
            _log.warn(
                "closed a connection that does not begin with a PROXY header: {error}; others are not logged",
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


def _name(address: IAddress | None) -> str:
    """Name what an address counts as; sockets of files have no name."""
    host = getattr(address, "host", "")
    try:
        return address_key(host)
    except ValueError:
        return str(host)
