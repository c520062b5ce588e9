"""
Parsers for runs from untrusted workers.

Well-formed output is forwarded to the client. Anything else is an error, and uses bounded memory.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from bfaas.protocol.files import MAX_FILES, InvalidPathError, check_path, pattern_matcher
from bfaas.protocol.formats import (
    MAX_DATA,
    MAX_FILE_PIECE,
    Exit,
    FilePiece,
    Format,
    WireError,
    decode_json,
    has_raw_controls,
    is_exit_code,
    write_event,
    write_file,
    write_output,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_EVENT = 512 * 1024
"""Bytes of one event that a reader accepts: enough for 64 KiB of output, with six bytes of JSON for each."""

MAX_COMMENTS = 64 * 1024
"""Bytes of comments that a reader accepts: one every 15 s for two days."""


class OutputLimitError(WireError):
    """A received run has more output than its limit."""


class RunReader(Protocol):
    """
    Parses one run incrementally and returns its output in the client's format.

    Output is forwarded up to the first error, wherever the data is split; then `error` is set, and further
    data is discarded. After the last piece, `exit` is how the run ended, or None if the worker did not report
    it.
    """

    error: WireError | None

    def feed(self, data: bytes) -> bytes:
        """Parse a piece and return the data to forward."""
        ...

    @property
    def exit(self) -> Exit | None:
        """How the run ended; None while no exit was received."""
        ...

    @property
    def forwards_exit(self) -> bool:
        """Whether the forwarded data includes the exit."""
        ...


_EVENT_NAMES = {
    b"event:%b%b" % (space, name): name
    for space in (b"", b" ")
    for name in (b"stdout", b"stderr", b"file", b"exit")
}


class _FileChecker:
    """
    Checks that pieces make up whole files that were requested, one after the other, and each once.

    Only the last file may be incomplete, if the run was ended meanwhile.
    """

    def __init__(self, outputs: Sequence[str]) -> None:
        self._matchers = [pattern_matcher(pattern) for pattern in outputs]
        self._names: set[str] = set()
        self._current: FilePiece | None = None
        self._left = 0

    @property
    def any(self) -> bool:
        return bool(self._names)

    def check(self, piece: FilePiece) -> None:
        """Raise `WireError` unless a piece may come now."""
        current = self._current
        if current is None:
            self._check_new(piece)
            self._left = piece.size
        elif (piece.name, piece.size, piece.mode) != (current.name, current.size, current.mode):
            raise WireError("incomplete file")
        self._left -= len(piece.data)
        if self._left < 0 or len(piece.data) > MAX_FILE_PIECE or not (piece.data or not piece.size):
            raise WireError("invalid size of a file or its piece")
        self._current = piece if self._left else None

    def _check_new(self, piece: FilePiece) -> None:
        try:
            check_path(piece.name)
        except InvalidPathError:
            raise WireError("invalid name of a file") from None
        if piece.name in self._names or len(self._names) >= MAX_FILES:
            raise WireError("duplicate file, or too many files")
        if not any(matches(piece.name) for matches in self._matchers):
            raise WireError("a file that was not requested")
        self._names.add(piece.name)


class EventReader:
    """
    Parses events, forwards well-formed output, and stores the exit, which the caller forwards.

    Comments are dropped. Files are accepted after all text, if they match `outputs`. Text counts towards
    `max_output` with the least number of bytes that a script must have written for it, files with their
    content. Output is forwarded as events or as NDJSON. Data of more than `MAX_DATA` bytes, or with
    characters that some clients treat as line breaks, is encoded again: workers of the Go original may send
    such events.
    """

    forwards_exit = False

    def __init__(self, max_output: int, format_: Format = Format.EVENTS, outputs: Sequence[str] = ()) -> None:
        self._format = format_
        self._files = _FileChecker(outputs)
        self.exit: Exit | None = None
        self.error: WireError | None = None
        self._event: list[bytes] = []  # complete lines of the current event
        self._line = bytearray()  # the current, incomplete line
        self._size = 0  # bytes of both
        self._output_left = max_output
        self._comments_left = MAX_COMMENTS

    def feed(self, data: bytes) -> bytes:
        """Parse a piece and return the complete output events."""
        if self.error is not None:
            return b""
        output: list[bytes] = []
        try:
            # Line by line, since searching for one byte takes a tenth of the time of searching for two.
            *ends, rest = data.split(b"\n")
            for end in ends:
                self._append(end)
                line = bytes(self._line)
                self._line.clear()
                if line:
                    self._event.append(line)
                else:
                    event, self._event, self._size = self._event, [], 0
                    output.append(self._parse(event))
            self._append(rest)
        except WireError as error:
            self.error = error.with_traceback(None)  # its frames would keep the data in memory
            self._event, self._line = [], bytearray()
        return b"".join(output)

    def _append(self, piece: bytes) -> None:
        """Append a piece to the current line."""
        self._line += piece
        self._size += len(piece)
        if self._size > MAX_EVENT or len(self._event) > 2:  # noqa: PLR2004 - an event has two lines
            raise WireError("event too large")

    def _parse(self, event: list[bytes]) -> bytes:
        if len(event) == 1 and event[0].startswith(b":"):
            self._comments_left -= len(event[0]) + 2
            if self._comments_left < 0:
                raise WireError("too many comments")
            return b""
        name = _EVENT_NAMES.get(event[0]) if len(event) == 2 else None  # noqa: PLR2004 - as above
        line = event[-1] if event else b""
        if name is None or not line.startswith(b"data:") or b"\r" in line:
            raise WireError("invalid event")
        if self.exit is not None:
            raise WireError("event after the exit")
        data = line[6:] if line.startswith(b"data: ") else line[5:]
        if name == b"exit":
            self.exit = Exit.from_json(data)
            return b""
        if name == b"file":
            return self._parse_file(data)
        if self._files.any:
            raise WireError("output after a file")
        stream, text = name.decode(), _text(data)
        self._count(_min_output_bytes(text))
        if len(data) > MAX_DATA or (not data.isascii() and has_raw_controls(data)):
            return write_output(self._format, stream, text)
        return write_event(self._format, stream, data)

    def _parse_file(self, data: bytes) -> bytes:
        piece = FilePiece.from_json(data)
        self._files.check(piece)
        self._count(len(piece.data))
        return write_file(self._format, piece)

    def _count(self, size: int) -> None:
        self._output_left -= size
        if self._output_left < 0:
            raise OutputLimitError("output limit exceeded")


def _text(data: bytes) -> str:
    """Decode the data of an output event. Raises `WireError` unless it is a JSON string."""
    if not data.startswith(b'"'):
        raise WireError("the data of an output event is not a string")
    text: str = decode_json(data)
    return text


def _min_output_bytes(text: str) -> int:
    """
    Return the least number of bytes that a script must have written for an output event with this text.

    U+FFFD may replace a single byte of invalid UTF-8. Raises `WireError` for a lone surrogate.
    """
    try:
        return max(1, len(text.encode()) - 2 * text.count("\ufffd"))
    except UnicodeEncodeError:
        raise WireError("lone surrogate") from None


_RAW_EXIT = re.compile(rb"\nexit: (-?[0-9]{1,3})(?: ([a-z-]{1,32}))?\n\Z")
_RAW_EXIT_LENGTH = 64


class RawReader:
    """
    Forwards a raw run unchanged, and parses the exit from its last line.

    A script can print text that looks like an exit line. Only the last one counts.
    """

    forwards_exit = True

    def __init__(self, max_output: int) -> None:
        self.error: WireError | None = None
        self._tail = b""
        self._left = max_output + _RAW_EXIT_LENGTH

    def feed(self, data: bytes) -> bytes:
        """Return the piece, up to the limit."""
        output = data[: self._left]
        self._left -= len(output)
        if len(output) < len(data):
            self.error = OutputLimitError("output limit exceeded")
        self._tail = (self._tail + output[-_RAW_EXIT_LENGTH:])[-_RAW_EXIT_LENGTH:]
        return output

    @property
    def exit(self) -> Exit | None:
        """The exit in the last line; None if that is not an exit line."""
        match = _RAW_EXIT.search(self._tail)
        if match is None or not is_exit_code(int(match[1])):
            return None
        reason = match[2].decode() if match[2] else None
        return Exit(int(match[1]) & 0xFF, reason=reason)


def run_reader(format_: Format, max_output: int, outputs: Sequence[str] = ()) -> RunReader:
    """
    Return the reader for a client's format and a worker with this output limit, in bytes.

    `outputs` are the patterns of files in the request.

    Workers send events, also for clients that get NDJSON.
    """
    return RawReader(max_output) if format_ is Format.RAW else EventReader(max_output, format_, outputs)
