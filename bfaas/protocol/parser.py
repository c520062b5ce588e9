"""
How a run is read back from a worker that may say anything.

What is well-formed goes on to the client; the rest is refused, and costs no more than its bound.
"""

from __future__ import annotations

import re
from typing import Protocol

from bfaas.protocol.formats import (
    MAX_DATA,
    Exit,
    Format,
    WireError,
    has_raw_controls,
    is_code,
    read_json,
    write_event,
    write_output,
)

MAX_EVENT = 512 * 1024
"""Bytes of one event that a reader takes: a piece of 64 KiB of what JSON writes in six bytes each."""

MAX_COMMENTS = 64 * 1024
"""Bytes of comments that a reader takes: one every 15 s for two days."""


class OutputLimitError(WireError):
    """A run that was read has more output than one that keeps to its limit."""


class RunReader(Protocol):
    """
    Reads one run, piece by piece, and passes its output on in the client's format.

    What is well-formed is passed on up to the first byte that is not, however the run was cut; then there is
    an `error`, and what comes after it is thrown away. After the last piece, `exit` is how the run ended, or
    None where the worker did not say.
    """

    error: WireError | None

    def feed(self, data: bytes) -> bytes:
        """Take a piece, give what is to be passed on."""
        ...

    @property
    def exit(self) -> Exit | None:
        """How the run ended, as far as it was read."""
        ...

    @property
    def forwards_exit(self) -> bool:
        """Whether what was passed on includes the exit."""
        ...


_NAMES = {
    b"event:%b%b" % (space, name): name for space in (b"", b" ") for name in (b"stdout", b"stderr", b"exit")
}


class EventReader:
    """
    Reads events, lets only well-formed output through, and keeps the exit for its owner to tell.

    Comments are dropped. What counts towards `max_output` is the bytes that a script must at least have
    written for the text that came. What is passed on can be written as lines instead. Data of more than
    `MAX_DATA` bytes, or with characters that some clients take for a line end, is encoded again: workers of
    the Go original may send such events.
    """

    forwards_exit = False

    def __init__(self, max_output: int, format_: Format = Format.EVENTS) -> None:
        self._format = format_
        self.exit: Exit | None = None
        self.error: WireError | None = None
        self._event: list[bytes] = []  # the lines of an event that has not ended
        self._line = bytearray()  # the line that has not
        self._size = 0  # of both, in bytes
        self._room = max_output
        self._room_for_comments = MAX_COMMENTS

    def feed(self, data: bytes) -> bytes:
        """Take a piece, give the output events that are complete."""
        if self.error is not None:
            return b""
        passed_on: list[bytes] = []
        try:
            # Line by line, since to look for one byte takes a tenth of what it takes to look for two.
            *ends, rest = data.split(b"\n")
            for end in ends:
                self._take(end)
                line = bytes(self._line)
                self._line.clear()
                if line:
                    self._event.append(line)
                else:
                    event, self._event, self._size = self._event, [], 0
                    passed_on.append(self._read(event))
            self._take(rest)
        except WireError as error:
            self.error = error.with_traceback(None)  # whose frames hold the piece
            self._event, self._line = [], bytearray()
        return b"".join(passed_on)

    def _take(self, piece: bytes) -> None:
        """Keep a piece of a line."""
        self._line += piece
        self._size += len(piece)
        if self._size > MAX_EVENT or len(self._event) > 2:  # noqa: PLR2004 - an event has two lines
            raise WireError("an event that does not end")

    def _read(self, event: list[bytes]) -> bytes:
        if len(event) == 1 and event[0].startswith(b":"):
            self._room_for_comments -= len(event[0]) + 2
            if self._room_for_comments < 0:
                raise WireError("comments without end")
            return b""
        name = _NAMES.get(event[0]) if len(event) == 2 else None  # noqa: PLR2004 - as above
        line = event[-1] if event else b""
        if name is None or not line.startswith(b"data:") or b"\r" in line:
            raise WireError("something that is no event")
        if self.exit is not None:
            raise WireError("an event after the exit")
        data = line[6:] if line.startswith(b"data: ") else line[5:]
        if name == b"exit":
            self.exit = Exit.from_json(data)
            return b""
        stream, text = name.decode(), _text(data)
        self._room -= _min_output_bytes(text)
        if self._room < 0:
            raise OutputLimitError("more output than the limit")
        if len(data) > MAX_DATA or (not data.isascii() and has_raw_controls(data)):
            return write_output(self._format, stream, text)
        return write_event(self._format, stream, data)


def _text(data: bytes) -> str:
    """Read the data of an output event. Raises `WireError` unless it is a JSON string."""
    if not data.startswith(b'"'):
        raise WireError("an output event that is not a string")
    text: str = read_json(data)
    return text


def _min_output_bytes(text: str) -> int:
    """
    Return how many bytes a script must at least have written for an output event with this text.

    U+FFFD may stand for one byte that was not UTF-8. Raises `WireError` for a lone surrogate.
    """
    try:
        return max(1, len(text.encode()) - 2 * text.count("\ufffd"))
    except UnicodeEncodeError:
        raise WireError("half a character") from None


_RAW_EXIT = re.compile(rb"\nexit: (-?[0-9]{1,3})(?: ([a-z-]{1,32}))?\n\Z")
_RAW_EXIT_LENGTH = 64


class RawReader:
    """
    Reads a raw run. Everything is passed on at once; the last bytes tell whether it was whole.

    A script can print what looks like an exit line. The one that counts is the answer's last.
    """

    forwards_exit = True

    def __init__(self, max_output: int) -> None:
        self.error: WireError | None = None
        self._tail = b""
        self._room = max_output + _RAW_EXIT_LENGTH

    def feed(self, data: bytes) -> bytes:
        """Take a piece, give it back, up to the limit."""
        kept = data[: self._room]
        self._room -= len(kept)
        if len(kept) < len(data):
            self.error = OutputLimitError("more output than the limit")
        self._tail = (self._tail + kept[-_RAW_EXIT_LENGTH:])[-_RAW_EXIT_LENGTH:]
        return kept

    @property
    def exit(self) -> Exit | None:
        """What the last line says, if it is an exit line."""
        match = _RAW_EXIT.search(self._tail)
        if match is None or not is_code(int(match[1])):
            return None
        reason = match[2].decode() if match[2] else None
        return Exit(int(match[1]) & 0xFF, reason=reason)


def run_reader(format_: Format, max_output: int) -> RunReader:
    """
    Make the reader for a client's format, for a worker that delivers so many bytes of output at the most.

    Lines are made of the events that a worker writes.
    """
    return RawReader(max_output) if format_ is Format.RAW else EventReader(max_output, format_)
