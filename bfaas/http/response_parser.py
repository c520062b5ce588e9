"""
An answer to an HTTP request, read strictly: RFC 9112 to the letter, each part with a bound.

A worker may be in the hands of the script it ran. Twisted's client takes much that no honest server says:
heads without end, floods of interim answers, folded lines, framings that contradict each other. This takes
none of it, and keeps no more than the piece at hand and an unfinished line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twisted.web.http_headers import Headers

if TYPE_CHECKING:
    from collections.abc import Generator

    Reading = Generator[None, None, None]
    FairQueue = Generator[None, None, bytes]

MAX_HEAD = 16 * 1024
"""Bytes of an answer's head, interim answers and all; and, again, of its chunk extensions and trailers."""

MAX_FIELDS = 64
"""Header fields of an answer, those of interim answers and trailers included."""

MAX_INTERIM = 5
"""Interim (1xx) answers before the one that counts."""

_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\t -~\x80-\xff]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})((?:;[\t -~\x80-\xff]*)?)")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_NO_BODY = (204, 304)


class MalformedResponseError(Exception):
    """An answer breaks the rules, or goes beyond a bound."""


@dataclass(frozen=True)
class ResponseHead:
    """A final answer's head. A body that is neither chunked nor of a known length has no end of its own."""

    code: int
    headers: Headers
    chunked: bool
    length: int | None


class ResponseParser:
    """
    Reads one answer, piece by piece, without any I/O; however it is cut, the outcome is the same.

    `head` is there once it has come whole. Then the body comes, until the answer is `complete` or there is
    an `error`. What comes after that is thrown away.
    """

    def __init__(self, method: bytes = b"GET") -> None:
        self.head: ResponseHead | None = None
        self.complete = False
        self.error: MalformedResponseError | None = None
        self._method = method
        self._data = b""
        self._at = 0
        self._body: list[bytes] = []
        self._room = MAX_HEAD
        self._fields_left = MAX_FIELDS
        self._reading = self._read()

    def feed(self, data: bytes) -> bytes:
        """Take a piece, give what is of the body in it."""
        if self.complete or self.error:
            return b""
        self._data = self._data[self._at :] + data
        self._at = 0
        try:
            next(self._reading)
        except StopIteration:
            self.complete = True
        except MalformedResponseError as error:
            self.error = error.with_traceback(None)  # whose frames hold the piece
        if self.complete or self.error:
            self._data = b""
        body, self._body = self._body, []
        return b"".join(body)

    def _read(self) -> Reading:
        """Read the answer from its first byte to its last; each `yield` waits for another piece."""
        interim = 0
        while (code := _status((yield from self._counted_line()))) < 200:  # noqa: PLR2004 - a final one
            yield from self._fields()
            interim += 1
            if code == 101 or interim > MAX_INTERIM:  # noqa: PLR2004 - Switching Protocols
                raise MalformedResponseError("interim answers that nobody asked for")
        head = self.head = _head(code, (yield from self._fields()))
        self._room = MAX_HEAD
        if self._method == b"HEAD" or code in _NO_BODY:
            return
        if head.chunked:
            yield from self._chunks()
        elif head.length is not None:
            yield from self._pass_on(head.length)
        else:
            while True:
                yield from self._pass_on(len(self._data) - self._at)
                yield

    def _chunks(self) -> Reading:
        while True:
            match = _CHUNK.fullmatch((yield from self._line(8 + self._room)))
            if match is None:
                raise MalformedResponseError("a chunk's size is none")
            self._consume(len(match[2]))
            size = int(match[1], 16)
            if size == 0:
                break
            yield from self._pass_on(size)
            yield from self._line(0)
        yield from self._fields()

    def _pass_on(self, size: int) -> Reading:
        """Pass on so many bytes of the body."""
        while size > (there := len(self._data) - self._at):
            self._body.append(self._data[self._at :])
            self._at += there
            size -= there
            yield
        self._body.append(self._data[self._at : self._at + size])
        self._at += size

    def _fields(self) -> Generator[None, None, Headers]:
        """Read header fields, or trailers, up to the empty line."""
        headers = Headers()
        while line := (yield from self._counted_line()):
            match = _FIELD.fullmatch(line)
            if match is None:
                raise MalformedResponseError("a header that is none")
            self._fields_left -= 1
            if self._fields_left < 0:
                raise MalformedResponseError(f"more than {MAX_FIELDS} headers")
            headers.addRawHeader(match[1], match[2].strip(b" \t"))
        return headers

    def _counted_line(self) -> FairQueue:
        line = yield from self._line(self._room)
        self._consume(len(line) + 2)
        return line

    def _line(self, limit: int) -> FairQueue:
        """Read a line of at most so many bytes, up to its CRLF. A bare CR or LF ends none."""
        while (end := self._data.find(b"\r\n", self._at)) < 0:
            # The last byte may be the CR.
            if len(self._data) - self._at > limit + 1:
                raise MalformedResponseError("a line that is too long")
            yield
        if end - self._at > limit:
            raise MalformedResponseError("a line that is too long")
        line = self._data[self._at : end]
        self._at = end + 2
        return line

    def _consume(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise MalformedResponseError(f"more than {MAX_HEAD} bytes beside the body")


def _status(line: bytes) -> int:
    match = _STATUS.fullmatch(line)
    if match is None:
        raise MalformedResponseError("no status line of HTTP/1.1")
    return int(match[1])


def _head(code: int, headers: Headers) -> ResponseHead:
    """Tell how the body is framed: in one way, or the answer is refused."""
    codings = headers.getRawHeaders(b"transfer-encoding", [])
    lengths = headers.getRawHeaders(b"content-length", [])
    encodings = headers.getRawHeaders(b"content-encoding", [])
    if any(encoding.strip().lower() != b"identity" for encoding in encodings):
        raise MalformedResponseError("an encoded answer, which was not asked for")
    if len(codings) + len(lengths) > 1:
        raise MalformedResponseError("the body is framed twice")
    if codings and codings[0].lower() != b"chunked":
        raise MalformedResponseError("the body is framed in a way that we do not know")
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise MalformedResponseError("the body's length is none")
    return ResponseHead(code, headers, bool(codings), int(lengths[0]) if lengths else None)
