r"""
What coordinator and worker agree on: paths, headers, and how a run is written.

The formats are those of the Go original (superfly/bfaas), so that its clients and its workers fit.

A run in events (the default) is a stream of server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html): `stdout` and `stderr`, whose data is a
JSON string, then one `exit`, whose data is a JSON object. A raw run is the bytes as they come, then
`\nexit: CODE\n` or `\nexit: CODE REASON\n`. A run in lines, which no coordinator asks of a worker, is one
JSON object a line: `{"event": "stdout", "data": "..."}`, and last `{"event": "exit", "code": N, ...}`.
"""

from __future__ import annotations

import codecs
import enum
import json
import re
from dataclasses import dataclass, fields
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUN_PATH = "/run"
HEALTH_PATH = "/healthz"

AUTHORIZATION = "Authorization"
WORKER = "Worker"
COORD = "Coord"
RUN_ID = "Run-Id"
FORCE_INSTANCE = "fly-force-instance-id"

KEEPALIVE = 15.0
"""Seconds of silence after which a stream carries a heartbeat, for intermediaries that cut idle ones."""


SSE_HEARTBEAT = b": \n\n"

MAX_DATA = 16 * 1024
"""
Bytes of an output event's data, as JSON. Common readers take lines of up to 64 KiB: Go's `bufio.Scanner`,
asyncio's `StreamReader`.
"""

MAX_EXIT = 4096
"""Bytes of an exit event's data that a reader takes."""


class Stream(enum.StrEnum):
    """Which of a script's two outputs."""

    STDOUT = "stdout"
    STDERR = "stderr"


class Reason(enum.StrEnum):
    """Why we ended a run that did not end by itself."""

    TIMEOUT = "timeout"
    WORKER_LOST = "worker-lost"
    OUTPUT_LIMIT = "output-limit"
    NOT_STARTED = "not-started"

    @property
    def code(self) -> int:
        """The exit code that stands for it: 124 as `timeout(1)` has it, 125 for what is not the script's."""
        return 124 if self is Reason.TIMEOUT else 125


class Format(enum.Enum):
    """How a run is written; the value is its `Content-Type`."""

    EVENTS = "text/event-stream; charset=utf-8"
    RAW = "application/octet-stream"
    NDJSON = "application/x-ndjson"

    @property
    def media_type(self) -> str:
        """The content type without its parameters."""
        return self.value.partition(";")[0]


# What is written in silence, and means nothing. An empty line would be a fault to many who read JSON.
HEARTBEATS = {Format.EVENTS: SSE_HEARTBEAT, Format.NDJSON: b'{"event": "heartbeat"}\n'}


def requested_format(arguments: Mapping[bytes, Sequence[bytes]], accept: str = "") -> Format:
    """
    Tell the format that a request asks for: by its query, or else by its `Accept`.

    `raw` in the query, with any value but an empty one, means raw. Lines are for those who name their type.
    """
    if any(arguments.get(b"raw", ())):
        return Format.RAW
    for kind in accept.lower().split(","):
        name, *parameters = (part.replace(" ", "") for part in kind.split(";"))
        if name == Format.NDJSON.media_type:
            return Format.EVENTS if any(map(_REFUSED.fullmatch, parameters)) else Format.NDJSON
    return Format.EVENTS


_REFUSED = re.compile(r"q=0(\.0*)?")


class WireError(Exception):
    """A run that was read does not follow the format."""


@dataclass(frozen=True)
class Exit:
    """
    How a run ended.

    `code` is 0 to 255, 128+n for a script killed by signal n. Times are milliseconds, `cpu_ms` over all
    processes of the run; `max_rss_kb` is the largest resident set of one of them, in KiB.
    """

    code: int
    signal: str | None = None
    reason: str | None = None
    wall_ms: int | None = None
    cpu_ms: int | None = None
    max_rss_kb: int | None = None
    truncated: bool = False
    dropped_bytes: int = 0

    def __str__(self) -> str:
        return " ".join(["exit", str(self.code), *filter(None, (self.signal, self.reason))])

    @classmethod
    def forced(cls, reason: Reason, wall_ms: int | None = None) -> Exit:
        """Tell an end that we brought about."""
        return cls(reason.code, reason=reason, wall_ms=wall_ms)

    def to_json(self) -> bytes:
        """Write the `exit` event's data; what does not apply is left out."""
        told = {
            item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default
        }
        return json.dumps(told).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Exit:
        """Read the `exit` event's data; unknown fields are ignored. Raises `WireError`."""
        told = read_json(data) if len(data) <= MAX_EXIT else None
        if not isinstance(told, dict) or not is_code(told.get("code")):
            raise WireError("an exit event without a code")
        counts = {key: told[key] for key in ("wall_ms", "cpu_ms", "max_rss_kb") if _is_count(told.get(key))}
        dropped = told.get("dropped_bytes")
        return cls(
            code=told["code"] & 0xFF,
            signal=_safe_token(told.get("signal")),
            reason=_safe_token(told.get("reason")),
            truncated=told.get("truncated") is True,
            dropped_bytes=dropped if isinstance(dropped, int) and _is_count(dropped) else 0,
            **counts,
        )


def read_json(data: bytes) -> Any:
    """Read JSON. In bytes, `json` would take other encodings than UTF-8 for it, and lone surrogates."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise WireError("data that is not JSON") from error


def is_code(value: object) -> bool:
    """Tell an exit code, 0 to 255; or -1, which is how the original tells a death by a signal."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= 255  # noqa: PLR2004


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _safe_token(value: object) -> str | None:
    """Take a short plain word as it is, and nothing else: it goes on to someone's terminal."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9+-]{1,32}", value) else None


class RunWriter(Protocol):
    """Writes one run in one format: bytes of output in, bytes of the answer out."""

    def output(self, stream: Stream, data: bytes) -> bytes:
        """Write a piece of output."""
        ...

    def end(self, exit_: Exit) -> bytes:
        """Write what was held back, then the exit."""
        ...


def write_event(format_: Format, stream: str, data: bytes) -> bytes:
    """Write an event of output, whose data is a JSON string without line ends: these end the event."""
    if format_ is Format.NDJSON:
        return b'{"event": "%b", "data": %b}\n' % (stream.encode(), data)
    return b"event: %b\ndata: %b\n\n" % (stream.encode(), data)


def write_output(format_: Format, stream: str, text: str) -> bytes:
    """Write output as events, each with at most `MAX_DATA` bytes of data."""
    return b"".join([write_event(format_, stream, data) for data in _json_strings(text)])


# JSON allows these characters in a string, and some readers split lines at them: U+0085, U+2028, U+2029. The
# other C1 controls are escaped too, since terminals obey them.
_C1_CONTROL = re.compile(rb"\xc2[\x80-\x9f]")
_SEPARATOR = re.compile(rb"\xe2\x80[\xa8\xa9]")


def has_raw_controls(data: bytes) -> bool:
    """Return whether UTF-8 has C1 controls, U+2028 or U+2029."""
    # To look for a single byte first costs next to nothing, and most output has neither of them.
    if b"\xc2" in data and _C1_CONTROL.search(data):
        return True
    return b"\xe2" in data and _SEPARATOR.search(data) is not None


def _escaped(match: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(match[0].decode())


def _json_strings(text: str) -> list[bytes]:
    """Encode text as JSON strings of at most `MAX_DATA` bytes, without line ends of any kind."""
    encoded = encode_basestring(text).encode()
    if has_raw_controls(encoded):
        encoded = _SEPARATOR.sub(_escaped, _C1_CONTROL.sub(_escaped, encoded))
    if len(encoded) <= MAX_DATA:
        return [encoded]
    pieces = []
    start, end = 1, len(encoded) - 1
    while start < end:
        stop = start + MAX_DATA - 2
        stop = end if stop >= end else _boundary(encoded, start, stop)
        pieces.append(b'"%b"' % encoded[start:stop])
        start = stop
    return pieces


def _boundary(encoded: bytes, start: int, stop: int) -> int:
    """Return the last position up to `stop` that is not within a character or an escape sequence."""
    while encoded[stop] & 0xC0 == 0x80:  # noqa: PLR2004 - the mark of a continuation byte in UTF-8
        stop -= 1
    backslash = encoded.rfind(b"\\", stop - 5, stop)
    if backslash >= 0:
        before = encoded[start : backslash + 1]
        # An even number of backslashes is that many escaped ones.
        starts_escape = (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
        length = 6 if encoded[backslash + 1] == ord("u") else 2
        if starts_escape and backslash + length > stop:
            return backslash
    return stop


def write_exit(format_: Format, exit_: Exit) -> bytes:
    """Write the exit's event."""
    if format_ is Format.NDJSON:
        return b'{"event": "exit", ' + exit_.to_json()[1:] + b"\n"
    return b"event: exit\ndata: " + exit_.to_json() + b"\n\n"


class EventWriter:
    """Writes events, or lines. A character split over two pieces is held back until it is whole."""

    def __init__(self, format_: Format = Format.EVENTS) -> None:
        self._format = format_
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {stream: decoder("replace") for stream in Stream}

    def output(self, stream: Stream, data: bytes) -> bytes:
        """Write a piece of output as events, or nothing while it is not one whole character."""
        return self._event(stream, self._decoders[stream].decode(data))

    def end(self, exit_: Exit) -> bytes:
        """Write what was held back, then the `exit` event."""
        rest = [
            self._event(stream, decoder.decode(b"", final=True)) for stream, decoder in self._decoders.items()
        ]
        return b"".join([*rest, write_exit(self._format, exit_)])

    def _event(self, stream: Stream, text: str) -> bytes:
        return write_output(self._format, stream, text) if text else b""


class RawWriter:
    """Writes bytes as they are."""

    def output(self, stream: Stream, data: bytes) -> bytes:  # noqa: ARG002 - the protocol's signature
        """Write a piece of output."""
        return data

    def end(self, exit_: Exit) -> bytes:
        """Write the exit line."""
        reason = f" {exit_.reason}" if exit_.reason else ""
        return f"\nexit: {exit_.code}{reason}\n".encode()


def run_writer(format_: Format) -> RunWriter:
    """Make the writer of a format."""
    return RawWriter() if format_ is Format.RAW else EventWriter(format_)
