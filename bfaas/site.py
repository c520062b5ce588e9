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
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.web.http import SERVICE_UNAVAILABLE, datetimeToString
from twisted.web.server import Request, Site
from zope.interface import implementer

from bfaas.channel import RETRY_AFTER, Channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from klein import Klein
    from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
    from twisted.python.failure import Failure
    from twisted.web.resource import IResource

    Guard = Callable[[Request], str | None]

MAX_CONNECTIONS = 4096
"""Connections that a site has at the same time, unless it is told otherwise."""


_TEXT = "text/plain; charset=utf-8"


class RefusalError(Exception):
    """A request is answered with this status and this line; `reason` is a word for who counts refusals."""

    def __init__(
        self, code: int, line: str, headers: dict[str, str] | None = None, reason: str = "malformed"
    ) -> None:
        super().__init__(line)
        self.code = code
        self.line = line
        self.headers = headers or {}
        self.reason = reason


def refuse(request: Request, code: int, line: str) -> bytes:
    """Make the request's answer a one-line error; returns its body. A 503 has a `Retry-After`."""
    request.setResponseCode(code)
    if code == SERVICE_UNAVAILABLE and not request.responseHeaders.hasHeader("Retry-After"):
        request.setHeader("Retry-After", RETRY_AFTER)
    return _text(request, line, _TEXT)


def tell(request: Request, text: str, kind: str = _TEXT) -> bytes:
    """Make the request's answer something small that is true now; returns its body."""
    request.setHeader("Cache-Control", "no-store")
    request.setHeader("X-Content-Type-Options", "nosniff")
    return _text(request, text, kind)


def _text(request: Request, text: str, kind: str) -> bytes:
    data = text.encode() + b"\n"
    request.setHeader("Content-Type", kind)
    request.setHeader("Content-Length", str(len(data)))
    return data


def body(request: Request) -> bytes:
    """Give the request's body, all of which has come."""
    assert request.content is not None  # noqa: S101 - it is made before a request is dispatched
    content: bytes = request.content.read()
    return content


def answer_errors_in_text(app: Klein) -> None:
    """Let the routes of an app raise `RefusalError`, and make its 404 and 405 one line of text."""
    # Not at the top: a worker listens before it loads klein, which has loaded this.
    from werkzeug.exceptions import HTTPException  # noqa: PLC0415

    @app.handle_errors(RefusalError)
    def refused(self: object, request: Any, failure: Failure) -> bytes:  # noqa: ARG001 - a method
        error = failure.value
        assert isinstance(error, RefusalError)  # noqa: S101 - what klein dispatched on
        for name, value in error.headers.items():
            request.setHeader(name, value)
        return refuse(request, error.code, error.line)

    @app.handle_errors(HTTPException)
    def no_route(self: object, request: Any, failure: Failure) -> bytes:  # noqa: ARG001 - a method
        methods = getattr(failure.value, "valid_methods", None)
        if methods:
            request.setHeader("Allow", ", ".join(sorted(methods)))
            return refuse(request, 405, "method not allowed")
        return refuse(request, 404, "not found")


class BoundedRequest(Request):
    """
    A request whose body has a limit: past it, the answer is 413 and the connection ends.

    Such a request is never dispatched, so that nobody acts on the first half of a body. Nor is one that
    `guard` has something against, which is answered 403.
    """

    channel: Channel
    defaultContentType = None

    def __init__(self, *args: Any, guard: Guard | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
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
        objection = self._guard(self) if self._guard else None
        if objection is not None:
            error = refuse(self, 403, objection)
        elif not _is_routable(self.path):
            error = refuse(self, 404, "not found")
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
        self.gone: Deferred[None] = Deferred()
        self._lingering: IDelayedCall | None = None
        self._ignored = 0

    def loseConnection(self) -> None:
        """End our side, once what was written is sent."""
        if self.disconnecting:
            return
        self.disconnecting = 1
        self._lingering = self.factory.clock.callLater(self.LINGER, self.transport.abortConnection)
        self.transport.unregisterProducer()
        self.transport.loseWriteConnection()

    def dataReceived(self, data: bytes) -> None:
        """Pass it on, unless nobody could be answered any more."""
        if not self.disconnecting:
            super().dataReceived(data)
            return
        self._ignored += len(data)
        if self._ignored > self.MAX_IGNORED:
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
        self.gone.callback(None)


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


class BoundedSite(WrappingFactory):
    """
    Serves a resource with bounded bodies, and can wait until what it has written is delivered.

    Connections past `max_connections`, or past `max_per_address` from one address, are closed as they come.
    (Behind a proxy all clients have the proxy's few addresses.) `guard` tells what there is against a
    request, if anything.
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
        guard: Guard | None = None,
    ) -> None:
        self.clock = clock
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._from: Counter[str] = Counter()
        site = _Site(
            resource,
            requestFactory=partial(BoundedRequest, guard=guard),
            parsePOSTFormSubmission=False,
            timeout=Channel.IDLE,
            reactor=clock,
        )
        make_channel: Any = partial(Channel, max_body)
        site.protocol = make_channel  # type: ignore[method-assign]  # it is no method
        super().__init__(site)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Take a connection, or answer None, at which it is closed."""
        full = len(self.protocols) >= self._max_connections
        if full or self._from[_name(addr)] >= self._max_per_address:
            return None
        return super().buildProtocol(addr)

    def registerProtocol(self, connection: _Connection) -> None:
        """Count a connection that has begun."""
        super().registerProtocol(connection)
        self._from[_name(connection.getPeer())] += 1

    def unregisterProtocol(self, connection: _Connection) -> None:
        """Count it no more."""
        super().unregisterProtocol(connection)
        self._from -= Counter([_name(connection.getPeer())])

    async def drain(self, limit: float) -> None:
        """Close every connection once what was written is delivered; abort what takes over `limit` s."""
        connections = list(self.protocols)
        timer = self.clock.callLater(limit, self._abort)
        for connection in connections:
            connection.loseConnection()
        await DeferredList([connection.gone for connection in connections])
        if timer.active():
            timer.cancel()

    def _abort(self) -> None:
        for connection in list(self.protocols):
            connection.abortConnection()


def _name(address: IAddress | None) -> str:
    """Name an address without its port; sockets of files have no name."""
    return getattr(address, "host", "")
