"""
Strict parser for HTTP/1.1 responses (RFC 9112) with bounds on every part.

A worker may be under the control of the script that it ran. Twisted's client accepts responses that no honest
server sends: endless heads, floods of interim responses, folded lines, contradictory framing. This parser
rejects all of those, and buffers no more than the current piece and one incomplete line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twisted.web.http_headers import Headers

if TYPE_CHECKING:
    from collections.abc import Generator

    Steps = Generator[None, None, None]
    LineSteps = Generator[None, None, bytes]

MAX_HEAD = 16 * 1024
"""Limit, in bytes, of head and interim responses together, and of chunk extensions and trailers together."""

MAX_FIELDS = 64
"""Limit of a response's header fields, including those of interim responses and trailers."""

MAX_INTERIM = 5
"""Limit of interim (1xx) responses before the final one."""

_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\t -~\x80-\xff]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})((?:;[\t -~\x80-\xff]*)?)")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_NO_BODY = (204, 304)


class MalformedResponseError(Exception):
    """A response is malformed or exceeds a limit."""


@dataclass(frozen=True)
class ResponseHead:
    """
    The head of a final response.

    A body that is neither chunked nor of a known `length` has no explicit end: it is never `complete`.
    """

    code: int
    headers: Headers
    chunked: bool
    length: int | None


class ResponseParser:
    """
    Parses one response incrementally, without I/O. The result does not depend on where the data is split.

    `head` is set once the head is complete. Body data follows until the response is `complete` or there is an
    `error`. Data after that is discarded.
    """

    def __init__(self, method: bytes = b"GET") -> None:
        self.head: ResponseHead | None = None
        self.complete = False
        self.error: MalformedResponseError | None = None
        self._method = method
        self._data = b""
        self._position = 0
        self._body: list[bytes] = []
        self._budget = MAX_HEAD
        self._fields_left = MAX_FIELDS
        self._steps = self._parse()

    def feed(self, data: bytes) -> bytes:
        """Parse a piece and return the body data in it."""
        if self.complete or self.error:
            return b""
        self._data = self._data[self._position :] + data
        self._position = 0
        try:
            next(self._steps)
        except StopIteration:
            self.complete = True
        except MalformedResponseError as error:
            self.error = error.with_traceback(None)  # its frames would keep the data in memory
        if self.complete or self.error:
            self._data = b""
        body, self._body = self._body, []
        return b"".join(body)

    def _parse(self) -> Steps:
        """Parse the response from its first byte to its last; each `yield` waits for the next piece."""
        interim = 0
        while (code := _status((yield from self._counted_line()))) < 200:  # noqa: PLR2004 - a final status
            yield from self._fields()
            interim += 1
            if code == 101 or interim > MAX_INTERIM:  # noqa: PLR2004 - Switching Protocols
                raise MalformedResponseError("unexpected interim response")
        head = self.head = _head(code, (yield from self._fields()))
        self._budget = MAX_HEAD
        if self._method == b"HEAD" or code in _NO_BODY:
            return
        if head.chunked:
            yield from self._chunks()
        elif head.length is not None:
            yield from self._body_data(head.length)
        else:
            while True:
                yield from self._body_data(len(self._data) - self._position)
                yield

    def _chunks(self) -> Steps:
        while True:
            match = _CHUNK.fullmatch((yield from self._line(8 + self._budget)))
            if match is None:
                raise MalformedResponseError("invalid chunk size")
            self._consume(len(match[2]))
            size = int(match[1], 16)
            if size == 0:
                break
            yield from self._body_data(size)
            yield from self._line(0)
        yield from self._fields()

    def _body_data(self, size: int) -> Steps:
        """Append `size` bytes to the body."""
        while size > (available := len(self._data) - self._position):
            self._body.append(self._data[self._position :])
            self._position += available
            size -= available
            yield
        self._body.append(self._data[self._position : self._position + size])
        self._position += size

    def _fields(self) -> Generator[None, None, Headers]:
        """Parse header or trailer fields up to the empty line."""
        headers = Headers()
        while line := (yield from self._counted_line()):
            match = _FIELD.fullmatch(line)
            if match is None:
                raise MalformedResponseError("invalid header")
            self._fields_left -= 1
            if self._fields_left < 0:
                raise MalformedResponseError(f"more than {MAX_FIELDS} headers")
            headers.addRawHeader(match[1], match[2].strip(b" \t"))
        return headers

    def _counted_line(self) -> LineSteps:
        line = yield from self._line(self._budget)
        self._consume(len(line) + 2)
        return line

    def _line(self, limit: int) -> LineSteps:
        """Return the next line, of at most `limit` bytes, without its CRLF. A bare CR or LF is data."""
        while (end := self._data.find(b"\r\n", self._position)) < 0:
            # The last byte may be the CR.
            if len(self._data) - self._position > limit + 1:
                raise MalformedResponseError("line too long")
            yield
        if end - self._position > limit:
            raise MalformedResponseError("line too long")
        line = self._data[self._position : end]
        self._position = end + 2
        return line

    def _consume(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise MalformedResponseError(f"more than {MAX_HEAD} bytes besides the body")


def _status(line: bytes) -> int:
    match = _STATUS.fullmatch(line)
    if match is None:
        raise MalformedResponseError("invalid HTTP/1.1 status line")
    return int(match[1])


def _head(code: int, headers: Headers) -> ResponseHead:
    """Build the head. Raises `MalformedResponseError` unless the body is framed in one supported way."""
    codings = headers.getRawHeaders(b"transfer-encoding", [])
    lengths = headers.getRawHeaders(b"content-length", [])
    encodings = headers.getRawHeaders(b"content-encoding", [])
    if any(encoding.strip().lower() != b"identity" for encoding in encodings):
        raise MalformedResponseError("unexpected Content-Encoding")
    if len(codings) + len(lengths) > 1:
        raise MalformedResponseError("more than one Content-Length or Transfer-Encoding")
    if codings and codings[0].lower() != b"chunked":
        raise MalformedResponseError("unsupported Transfer-Encoding")
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise MalformedResponseError("invalid Content-Length")
    return ResponseHead(code, headers, bool(codings), int(lengths[0]) if lengths else None)
