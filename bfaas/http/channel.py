"""
What a server hears on a connection: one request at a time, of bounded size, within bounded time, or none.

Twisted parses; this is stricter wherever two parsers could see different requests in the same bytes. Such
bytes are answered 400 and the connection ends, so that they are never two requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.protocols.basic import LineReceiver
from twisted.web.http import RESPONSES, SERVICE_UNAVAILABLE, HTTPChannel, datetimeToString

if TYPE_CHECKING:
    from twisted.web.http import Request
    from twisted.web.http_headers import Headers

RETRY_AFTER = "1"
"""Seconds, in the header of a 503 for which nothing better is known."""

_MAX_DIGITS = 18
"""Digits of a length; Python itself takes no more than 4300, with an exception."""


class Channel(HTTPChannel):
    """
    HTTP/1.1 and 1.0 on one connection. A body may have `max_body` bytes.

    What a client can make this hold without a whole request is a head (16 KiB), and trailers (1 KiB, which
    take thirty times that) or the beginning of a body (16 KiB; the rest is in a file): some 50 KiB.
    """

    maxHeaders = 64
    totalHeadersSize = 16 << 10
    IDLE_TIMEOUT = 60.0
    """Seconds that a connection may stay without a request."""
    REQUEST_TIMEOUT = 15.0
    """Seconds from a request's first byte to its last, however many come between."""
    MAX_IGNORED = 64 << 10
    """Bytes that a client may send while it is being answered; they are thrown away."""

    _MAX_TRAILERS = 1 << 10
    _PRINTABLE = range(0x21, 0x7F)

    transport: Any

    def __init__(self, max_body: int) -> None:
        super().__init__()
        self.max_body = max_body
        self._begun = False
        self._responding = False
        self._ignored = 0

    def refuse(self, code: int, line: str) -> None:
        """Answer with this status and this line, and close; nothing more is heard."""
        if self.transport.disconnecting:
            return
        text = line.encode() + b"\n"
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

    def too_large(self) -> None:
        """Refuse a request for its body's size."""
        self.refuse(413, f"the body is larger than {self.max_body} bytes")

    def malformed(self) -> None:
        """Refuse what is no request, or has more of a head than one may have."""
        self.refuse(400, "this is not a request, or its head is too large")

    _respondToBadRequestAndDisconnect = malformed

    def lineLengthExceeded(self, _: bytes) -> None:
        """Refuse a line without end."""
        self.malformed()

    def dataReceived(self, data: bytes) -> None:
        """Hear a piece of a request; the first begins its time, and the others do not lengthen it."""
        if not self._begun:
            self._begun = True
            self.setTimeout(self.REQUEST_TIMEOUT)
            if data[0] not in self._PRINTABLE and data[:1] not in b"\r\n":
                # TLS, mostly, which would wait for our answer.
                self.malformed()
                return
        LineReceiver.dataReceived(self, data)

    def lineReceived(self, line: bytes) -> None:
        """Take a line of a head, unless it goes on with the line before."""
        if line[:1] in (b" ", b"\t"):
            self.malformed()
        else:
            super().lineReceived(line)

    def headerReceived(self, line: bytes) -> bool:
        """Take a header, unless it is no text, or frames the body in a way that others may read otherwise."""
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        if not _is_valid_header(name.lower(), value):
            self.malformed()
            return False
        return bool(super().headerReceived(line))

    def allHeadersReceived(self) -> None:
        """Begin with a body, unless it is going to be too large: then it is not asked for."""
        if self.length is None:
            # The decoder keeps trailers, which nobody looks at, as many small objects.
            decoder: Any = self._transferDecoder
            decoder._maxTrailerHeadersSize = self._MAX_TRAILERS  # noqa: SLF001 - there is no other way
        elif self.length > self.max_body:
            self.too_large()
            return
        if self._version == b"HTTP/1.1" and not self._expects_nothing_unknown():
            self.requests[-1].gotLength(self.length)  # the body may have come already
            self.refuse(417, "the only expectation that is supported is 100-continue")
            return
        super().allHeadersReceived()

    def _expects_nothing_unknown(self) -> bool:
        expected = _listed(self.requests[-1].requestHeaders, "Expect")
        return all(item == "100-continue" for item in expected)

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """Return whether the connection stays open after the answer; Twisted reads one option alone."""
        return version == b"HTTP/1.1" and "close" not in _listed(request.requestHeaders, "Connection")

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        """Write a head, which says whether the connection ends with this answer."""
        if "close" in _listed(headers, "Connection"):
            self.persistent = 0
        elif not self.persistent:
            headers.setRawHeaders("Connection", ["close"])
        super().writeHeaders(version, code, reason, headers)

    def allContentReceived(self) -> None:
        """Have the request answered; its time is over."""
        self._responding = True
        super().allContentReceived()

    def rawDataReceived(self, data: bytes) -> None:
        """
        Hear a piece of a body, or of what comes before the answer has ended.

        Who does not wait for an answer is not heard: the connection ends with the answer. It is read until
        then, since nothing else tells whether the client is still there.
        """
        if not self._responding:
            super().rawDataReceived(data)
            return
        self.persistent = 0
        self._ignored += len(data)
        if self._ignored > self.MAX_IGNORED:
            self.transport.abortConnection()

    def setLineMode(self, extra: bytes = b"") -> None:
        """Wait for the next request, as the answer has ended; `extra` is what came too early."""
        self._begun = self._responding = False
        if extra:
            self.loseConnection()
        else:
            self.setTimeout(self.IDLE_TIMEOUT)
            super().setLineMode()

    def timeoutConnection(self) -> None:
        """End a connection without a request; refuse a request that took too long. Log nothing."""
        if self._begun:
            self.refuse(408, f"the request was not complete within {self.REQUEST_TIMEOUT:g} s")
        else:
            self.loseConnection()

    def loseConnection(self) -> None:
        """Close, once what was written is sent."""
        self.setTimeout(None)
        super().loseConnection()


def _listed(headers: Headers, name: str) -> list[str]:
    """Return the items of a header whose value is a list, in lower case."""
    items = ",".join(headers.getRawHeaders(name, [])).lower().split(",")
    return [stripped for item in items if (stripped := item.strip(" \t"))]


def _is_valid_header(name: bytes, value: bytes) -> bool:
    """Tell whether a header, its name in lower case, is one that can be read, and in one way alone."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    if name == b"transfer-encoding":
        return value.lower() == b"chunked"
    return name != b"content-length" or len(value) <= _MAX_DIGITS
