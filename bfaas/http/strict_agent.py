"""HTTP client for untrusted servers: one connection per request, strict response parsing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from twisted.web.client import URI, ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IAgentEndpointFactory, IBodyProducer, IResponse
from zope.interface import implementer

from bfaas.http.endpoints import UNIX_HOST, UNIX_SCHEME
from bfaas.http.response_parser import ResponseHead, ResponseParser

if TYPE_CHECKING:
    from twisted.internet.interfaces import IProtocol

_UNIX = UNIX_SCHEME.encode()
_REQUEST = re.compile(rb"[A-Z]+ /[!-~]*")


class IncompleteResponseError(Exception):
    """The connection was lost before the end of the response, or the response has no explicit end."""


@implementer(IPushProducer)
class _ClientProtocol(Protocol):
    """
    One request and its response. It is the producer of the response's body.

    Every outcome resets the connection: no further request follows, and unsent data is of no use. So a worker
    that does not read cannot keep a connection open.
    """

    transport: Any

    def __init__(self, method: bytes) -> None:
        self._parser = ResponseParser(method)
        self._receiver: IProtocol | None = None
        self._buffer = b""
        self._outcome: Failure | None = None
        self._response: Deferred[IResponse] = Deferred(lambda _: self._end(CancelledError()))

    def send(self, head: bytes, body: IBodyProducer | None) -> Deferred[IResponse]:
        """Send the request; the result fires with the head of the response."""
        self.transport.write(head)
        if body is not None:
            body.startProducing(self.transport)
        return self._response

    def dataReceived(self, data: bytes) -> None:
        """Parse data. Body data that arrives before `deliver` is buffered, and reading pauses."""
        if self._outcome is not None:
            return
        parser = self._parser
        body = parser.feed(data)
        if self._receiver is not None:
            if body:
                self._receiver.dataReceived(body)
        elif parser.head is not None:
            self._buffer += body
            self.transport.pauseProducing()
        if parser.complete:
            self._end(ResponseDone())
        elif parser.error is not None:
            self._end(parser.error)
        if parser.head is not None and not self._response.called:
            self._response.callback(_Response(parser.head, self))

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Fail unless the response is complete: no response ends with its connection."""
        self._end(IncompleteResponseError(reason.getErrorMessage()))

    def deliver(self, receiver: IProtocol) -> None:
        """Deliver the buffered body data to `receiver`, then further data as it arrives."""
        outcome = self._outcome
        self._receiver = receiver
        self.transport.resumeProducing()
        receiver.makeConnection(self)  # type: ignore[arg-type]  # as IResponse.deliverBody specifies
        if self._buffer:
            receiver.dataReceived(self._buffer)
            self._buffer = b""
        if outcome is not None:
            receiver.connectionLost(outcome)

    def pauseProducing(self) -> None:
        """Stop reading; TCP flow control then stops the worker."""
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Resume reading."""
        self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Abort the connection; the receiver gets an `IncompleteResponseError`."""
        self.transport.abortConnection()

    def _end(self, outcome: Exception) -> None:
        """Close the connection and report the first outcome: to the receiver, or to the caller of `send`."""
        if self._outcome is not None:
            return
        self._outcome = Failure(outcome)
        self.transport.abortConnection()
        if self._receiver is not None:
            self._receiver.connectionLost(self._outcome)
        elif self._parser.head is None:
            self._response.errback(self._outcome)


@implementer(IResponse)
class _Response:
    """A response whose head has arrived. The reason phrase is dropped."""

    version = (b"HTTP", 1, 1)
    phrase = b""
    request = None
    previousResponse = None

    def __init__(self, head: ResponseHead, connection: _ClientProtocol) -> None:
        self.code = head.code
        self.headers = head.headers
        self.length = UNKNOWN_LENGTH if head.length is None else head.length
        self._connection = connection

    def deliverBody(self, protocol: IProtocol) -> None:
        """Deliver the body to a protocol, whose transport is a push producer."""
        self._connection.deliver(protocol)

    def setPreviousResponse(self, response: IResponse) -> None:
        """Store the redirect that led here; this agent follows none."""
        self.previousResponse = response


@implementer(IAgent)
class StrictAgent:
    """
    Sends each request once, on its own connection, and accepts only strictly valid responses.

    Requests and bodies fail with `MalformedResponseError`, `IncompleteResponseError` or a connection error.
    """

    def __init__(self, endpoints: IAgentEndpointFactory) -> None:
        self._endpoints = endpoints

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """
        Send a request.

        Raises `ValueError` for an invalid method or path, and for a body of unknown length.
        """
        parsed = URI.fromBytes(uri)
        head = _request_head(method, parsed, headers or Headers(), bodyProducer)
        connecting = self._endpoints.endpointForURI(parsed).connect(
            Factory.forProtocol(lambda: _ClientProtocol(method))
        )
        response: Deferred[IResponse] = connecting.addCallback(
            lambda connection: connection.send(head, bodyProducer)
        )
        return response


def _request_head(method: bytes, uri: URI, headers: Headers, body: IBodyProducer | None) -> bytes:
    request_line = b"%b %b" % (method, uri.originForm)
    if not _REQUEST.fullmatch(request_line):
        raise ValueError("invalid method or path")
    if body is not None and body.length is UNKNOWN_LENGTH:
        raise ValueError("the length of the body is unknown")
    headers = headers.copy()
    headers.removeHeader(b"transfer-encoding")
    headers.setRawHeaders(b"host", [UNIX_HOST if uri.scheme == _UNIX else uri.netloc])
    headers.setRawHeaders(b"connection", [b"close"])
    headers.setRawHeaders(b"accept-encoding", [b"identity"])
    headers.setRawHeaders(b"content-length", [b"%d" % (body.length if body else 0)])
    fields = [b"%b: %b" % (name, value) for name, values in headers.getAllRawHeaders() for value in values]
    return b"\r\n".join([request_line + b" HTTP/1.1", *fields, b"", b""])
