"""
The edges of an HTTP server: bounded request bodies, one-line errors, and an orderly end.

Both roles stand on this; it knows nothing of runs or machines.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.web.server import Request, Site
from werkzeug.exceptions import HTTPException
from zope.interface import implementer

if TYPE_CHECKING:
    from klein import Klein
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure
    from twisted.web.resource import IResource


class RefusalError(Exception):
    """A request is answered with this status and this line, as text."""

    def __init__(self, code: int, line: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(line)
        self.code = code
        self.line = line
        self.headers = headers or {}


def refuse(request: Request, code: int, line: str) -> bytes:
    """Make the request's answer a one-line error; returns its body."""
    request.setResponseCode(code)
    request.setHeader("Content-Type", "text/plain; charset=utf-8")
    return line.encode() + b"\n"


def body(request: Request) -> bytes:
    """Give the request's body, all of which has come."""
    assert request.content is not None  # noqa: S101 - it is made before a request is dispatched
    content: bytes = request.content.read()
    return content


def answer_errors_in_text(app: Klein) -> None:
    """Let the routes of an app raise `RefusalError`, and make its 404 and 405 one line of text."""

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
    A request whose body has a limit: past it, the rest is thrown away and the answer is 413.

    Such a request is never dispatched, so that nobody acts on the first half of a body. One that sends
    far more than the limit is cut off.
    """

    _PATIENCE = 4

    def __init__(self, *args: Any, max_body: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_body = max_body
        self._received = 0
        self.defaultContentType = None

    def gotLength(self, length: int | None) -> None:
        """Note what is announced; no room is made for what will not be kept."""
        if length is not None and length > self._max_body:
            self._received = self._max_body + 1
            length = 0
        super().gotLength(length)

    def handleContentChunk(self, data: bytes) -> None:
        """Keep a piece of the body, or throw it away."""
        self._received += len(data)
        if self._received <= self._max_body:
            super().handleContentChunk(data)
        elif self._received > self._max_body * self._PATIENCE:
            transport: Any = self.transport
            transport.abortConnection()

    def process(self) -> None:
        """Dispatch the request, unless its body was too large or its path is not one."""
        if self._received > self._max_body:
            error = refuse(self, 413, f"the body is larger than {self._max_body} bytes")
        elif not _is_routable(self.path):
            error = refuse(self, 404, "not found")
        else:
            super().process()
            return
        self.write(error)
        self.finish()

    def getRequestHostname(self) -> bytes:
        """Tell klein a host that it can read, whatever the client calls us; no route looks at it."""
        return b"localhost"


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
    A peer that does not end its side within `LINGER` seconds is cut off.
    """

    LINGER = 5.0
    factory: BoundedSite
    transport: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gone: Deferred[None] = Deferred()
        self._lingering: IDelayedCall | None = None

    def loseConnection(self) -> None:
        """End our side, once what was written is sent."""
        self.disconnecting = 1
        self.transport.unregisterProducer()
        self.transport.loseWriteConnection()

    def dataReceived(self, data: bytes) -> None:
        """Pass it on, unless nobody could be answered any more."""
        if not self.disconnecting:
            super().dataReceived(data)

    def writeConnectionLost(self) -> None:
        """Our side has ended."""
        self._lingering = self.factory.clock.callLater(self.LINGER, self.transport.abortConnection)

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

    def log(self, request: object) -> None:
        """Log nothing: the one line that tells of a run is ours."""


class BoundedSite(WrappingFactory):
    """Serves a resource with bounded bodies, and can wait until what it has written is delivered."""

    protocol = _Connection
    noisy = False

    def __init__(self, clock: IReactorTime, resource: IResource, max_body: int) -> None:
        self.clock = clock
        site = _Site(
            resource,
            requestFactory=partial(BoundedRequest, max_body=max_body),
            parsePOSTFormSubmission=False,
            reactor=clock,
        )
        super().__init__(site)

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
