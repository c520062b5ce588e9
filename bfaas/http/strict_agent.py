"""HTTP towards servers that we do not trust: each request on its own connection, its answer fenced in."""

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

from bfaas.http.response_parser import ResponseHead, ResponseParser

if TYPE_CHECKING:
    from twisted.internet.interfaces import IProtocol

_REQUEST = re.compile(rb"[A-Z]+ /[!-~]*")


class IncompleteResponseError(Exception):
    """The connection ended before the answer did, or nothing tells whether it did."""


@implementer(IPushProducer)
class _ClientProtocol(Protocol):
    """
    One request and its answer. To who receives the answer's body, this is the producer.

    Whatever ends it resets the connection: nothing more is to be said on it, nor is what was not yet sent of
    any use. So a worker that reads nothing holds nothing.
    """

    transport: Any

    def __init__(self, method: bytes) -> None:
        self._parser = ResponseParser(method)
        self._receiver: IProtocol | None = None
        self._kept = b""
        self._outcome: Failure | None = None
        self._answer: Deferred[IResponse] = Deferred(lambda _: self._end(CancelledError()))

    def send(self, head: bytes, body: IBodyProducer | None) -> Deferred[IResponse]:
        """Send the request, and wait for the head of its answer."""
        self.transport.write(head)
        if body is not None:
            body.startProducing(self.transport)
        return self._answer

    def dataReceived(self, data: bytes) -> None:
        """Read on; what comes of a body before it is asked for is kept, and no more is read."""
        if self._outcome is not None:
            return
        parser = self._parser
        body = parser.feed(data)
        if self._receiver is not None:
            if body:
                self._receiver.dataReceived(body)
        elif parser.head is not None:
            self._kept += body
            self.transport.pauseProducing()
        if parser.complete:
            self._end(ResponseDone())
        elif parser.error is not None:
            self._end(parser.error)
        if parser.head is not None and not self._answer.called:
            self._answer.callback(_Response(parser.head, self))

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Whatever it was that ended the connection, the answer is not whole."""
        self._end(IncompleteResponseError(reason.getErrorMessage()))

    def deliver(self, receiver: IProtocol) -> None:
        """Give the body to its receiver, from now on as it comes."""
        outcome = self._outcome
        self._receiver = receiver
        self.transport.resumeProducing()
        receiver.makeConnection(self)  # type: ignore[arg-type]  # what IResponse.deliverBody promises
        if self._kept:
            receiver.dataReceived(self._kept)
            self._kept = b""
        if outcome is not None:
            receiver.connectionLost(outcome)

    def pauseProducing(self) -> None:
        """Stop reading, and so, in time, the worker."""
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Read on."""
        self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """End it; the receiver is told that it was cut short."""
        self.transport.abortConnection()

    def _end(self, outcome: Exception) -> None:
        """Close the connection, and tell the outcome, once, to whoever waits for it."""
        if self._outcome is not None:
            return
        self._outcome = Failure(outcome)
        self.transport.abortConnection()
        if self._receiver is not None:
            self._receiver.connectionLost(self._outcome)
        elif self._parser.head is None:
            self._answer.errback(self._outcome)


@implementer(IResponse)
class _Response:
    """What a caller gets of an answer once its head has come; the reason phrase is nobody's business."""

    version = (b"HTTP", 1, 1)
    phrase = b""
    request = None
    previousResponse = None

    def __init__(self, head: ResponseHead, exchange: _ClientProtocol) -> None:
        self.code = head.code
        self.headers = head.headers
        self.length = UNKNOWN_LENGTH if head.length is None else head.length
        self._exchange = exchange

    def deliverBody(self, protocol: IProtocol) -> None:
        """Give the body to a protocol, whose transport is a push producer."""
        self._exchange.deliver(protocol)

    def setPreviousResponse(self, response: IResponse) -> None:
        """Note the redirect that led here; we follow none."""
        self.previousResponse = response


@implementer(IAgent)
class StrictAgent:
    """
    Sends each request on a connection of its own, once, and takes no answer but a strict and plain one.

    Beside what a connection fails with, `MalformedResponseError` and `IncompleteResponseError` are how an
    answer, or its body, ends that is not whole.
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
        """Send a request, whose body is of a known length. Raises `ValueError` if it cannot be written."""
        there = URI.fromBytes(uri)
        head = _request_head(method, there, headers or Headers(), bodyProducer)
        connecting = self._endpoints.endpointForURI(there).connect(
            Factory.forProtocol(lambda: _ClientProtocol(method))
        )
        answer: Deferred[IResponse] = connecting.addCallback(
            lambda exchange: exchange.send(head, bodyProducer)
        )
        return answer


def _request_head(method: bytes, there: URI, headers: Headers, body: IBodyProducer | None) -> bytes:
    target = b"%b %b" % (method, there.originForm)
    if not _REQUEST.fullmatch(target):
        raise ValueError("a method or a path that cannot be sent")
    if body is not None and body.length is UNKNOWN_LENGTH:
        raise ValueError("a body of unknown length")
    headers = headers.copy()
    headers.removeHeader(b"transfer-encoding")
    headers.setRawHeaders(b"host", [there.netloc])
    headers.setRawHeaders(b"connection", [b"close"])
    headers.setRawHeaders(b"accept-encoding", [b"identity"])
    headers.setRawHeaders(b"content-length", [b"%d" % (body.length if body else 0)])
    fields = [b"%b: %b" % (name, value) for name, values in headers.getAllRawHeaders() for value in values]
    return b"\r\n".join([target + b" HTTP/1.1", *fields, b"", b""])
