"""
HTTP/1.1 server channel with size and time limits and without pipelining.

The parser is Twisted's. This channel is stricter wherever two parsers could read different requests from the
same bytes: it sends 400 and closes the connection, so that no second request can be smuggled in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.protocols.basic import LineReceiver
from twisted.web.http import RESPONSES, SERVICE_UNAVAILABLE, HTTPChannel, datetimeToString

if TYPE_CHECKING:
    from twisted.web.http import Request
    from twisted.web.http_headers import Headers

RETRY_AFTER = "1"
"""Default `Retry-After` of a 503, in seconds."""

_MAX_DIGITS = 18
"""Maximum digits of a Content-Length. Python's `int()` raises an exception beyond 4300."""


class Channel(HTTPChannel):
    """
    HTTP/1.1 and 1.0 on one connection, with request bodies of at most `max_body` bytes.

    An incomplete request takes some 50 KiB of memory at most: a head (16 KiB), and either trailers (30 KiB
    for 1 KiB of data) or the beginning of a body (16 KiB; the rest is in a file).
    """

    maxHeaders = 64
    totalHeadersSize = 16 << 10
    IDLE_TIMEOUT = 60.0
    """Seconds that a connection may be idle between requests."""
    REQUEST_TIMEOUT = 15.0
    """Seconds from a request's first byte to its last."""
    MAX_IGNORED = 64 << 10
    """Bytes that a client may send during a response; they are discarded."""

    _MAX_TRAILERS = 1 << 10
    _PRINTABLE = range(0x21, 0x7F)

    transport: Any

    def __init__(self, max_body: int) -> None:
        super().__init__()
        self.max_body = max_body
        self._in_request = False
        self._responding = False
        self._ignored = 0

    def send_error(self, code: int, message: str) -> None:
        """Send a one-line error response and close the connection; ignore further data."""
        if self.transport.disconnecting:
            return
        text = message.encode() + b"\n"
        head = [
            b"HTTP/1.1 %d %b" % (code, RESPONSES[code]),
            b"Date: " + datetimeToString(),
            *([b"Retry-After: " + RETRY_AFTER.encode()] if code == SERVICE_UNAVAILABLE else []),
            b"Content-Type: text/plain; charset=utf-8",
            b"Content-Length: %d" % len(text),
            b"Connection: close",
            b"",
            text,
        ]
        self.transport.write(b"\r\n".join(head))
        self.loseConnection()

    def reject_too_large(self) -> None:
        """Send 413 for a request body that is too large."""
        self.send_error(413, f"the body is larger than {self.max_body} bytes")

    def reject_malformed(self) -> None:
        """Send 400 for a malformed request or a request head that is too large."""
        self.send_error(400, "malformed request, or request head too large")

    _respondToBadRequestAndDisconnect = reject_malformed

    def lineLengthExceeded(self, _: bytes) -> None:
        """Reject a line that is too long."""
        self.reject_malformed()

    def dataReceived(self, data: bytes) -> None:
        """Process request data. The first byte starts the request timeout; more data does not extend it."""
        if not self._in_request:
            self._in_request = True
            self.setTimeout(self.REQUEST_TIMEOUT)
            if data[0] not in self._PRINTABLE and data[:1] not in b"\r\n":
                # Usually a TLS handshake, whose client would wait for a response.
                self.reject_malformed()
                return
        LineReceiver.dataReceived(self, data)

    def lineReceived(self, line: bytes) -> None:
        """Process a line of the head; reject obsolete line folding."""
        if line[:1] in (b" ", b"\t"):
            self.reject_malformed()
        else:
            super().lineReceived(line)

    def headerReceived(self, line: bytes) -> bool:
        """Process a header; reject it if it is not UTF-8, or is ambiguous about the body's framing."""
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        if not _is_valid_header(name.lower(), value):
            self.reject_malformed()
            return False
        return bool(super().headerReceived(line))

    def allHeadersReceived(self) -> None:
        """Start to receive the body; reject a Content-Length over the limit before any 100 (Continue)."""
        if self.length is None:
            # The decoder keeps trailers, which nothing uses, as many small objects.
            decoder: Any = self._transferDecoder
            decoder._maxTrailerHeadersSize = self._MAX_TRAILERS  # noqa: SLF001 - Twisted has no public option
        elif self.length > self.max_body:
            self.reject_too_large()
            return
        if self._version == b"HTTP/1.1" and not self._expectation_supported():
            self.requests[-1].gotLength(self.length)  # body data may follow in the same piece
            self.send_error(417, "the only supported expectation is 100-continue")
            return
        super().allHeadersReceived()

    def _expectation_supported(self) -> bool:
        expected = _list_items(self.requests[-1].requestHeaders, "Expect")
        return all(item == "100-continue" for item in expected)

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """Return whether the connection persists; Twisted's method reads only one Connection option."""
        return version == b"HTTP/1.1" and "close" not in _list_items(request.requestHeaders, "Connection")

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        """Write a response head, with `Connection: close` if the connection ends with this response."""
        if "close" in _list_items(headers, "Connection"):
            self.persistent = 0
        elif not self.persistent:
            headers.setRawHeaders("Connection", ["close"])
        super().writeHeaders(version, code, reason, headers)

    def allContentReceived(self) -> None:
        """Dispatch the request."""
        self._responding = True
        super().allContentReceived()

    def rawDataReceived(self, data: bytes) -> None:
        """
        Process body data; discard data that arrives during a response.

        A client that pipelines gets no second response: the connection ends with the first. It is read until
        then only to notice when the client disconnects.
        """
        if not self._responding:
            super().rawDataReceived(data)
            return
        self.persistent = 0
        self._ignored += len(data)
        if self._ignored > self.MAX_IGNORED:
            self.transport.abortConnection()

    def setLineMode(self, extra: bytes = b"") -> None:
        """Wait for the next request after a response; close the connection if `extra` data came early."""
        self._in_request = self._responding = False
        if extra:
            self.loseConnection()
        else:
            self.setTimeout(self.IDLE_TIMEOUT)
            super().setLineMode()

    def timeoutConnection(self) -> None:
        """Close an idle connection; send 408 if a request took too long. Log nothing."""
        if self._in_request:
            self.send_error(408, f"the request was not complete within {self.REQUEST_TIMEOUT:g} s")
        else:
            self.loseConnection()

    def loseConnection(self) -> None:
        """Close the connection once all output is sent."""
        self.setTimeout(None)
        super().loseConnection()


def _list_items(headers: Headers, name: str) -> list[str]:
    """Return the items of a list-valued header, in lower case."""
    items = ",".join(headers.getRawHeaders(name, [])).lower().split(",")
    return [stripped for item in items if (stripped := item.strip(" \t"))]


def _is_valid_header(name: bytes, value: bytes) -> bool:
    """Return whether a header (name in lower case) is UTF-8 and, if it frames the body, unambiguous."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    if name == b"transfer-encoding":
        return value.lower() == b"chunked"
    return name != b"content-length" or len(value) <= _MAX_DIGITS
