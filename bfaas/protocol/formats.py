r"""
The protocol between client, coordinator and worker: paths, headers and response formats.

The formats are those of the Go original (superfly/bfaas), and compatible with its clients and workers:

* Events (the default): a stream of server-sent events
  (https://html.spec.whatwg.org/multipage/server-sent-events.html). The data of `stdout` and `stderr` events
  is a JSON string. `file` events, whose data is a JSON object, follow if the request has `outputs`, which the
  original does not know. The last event is `exit`, whose data is a JSON object.
* Raw: the output bytes unchanged, then `\nexit: CODE\n` or `\nexit: CODE REASON\n`.
* NDJSON: one JSON object per line, `{"event": "stdout", "data": "..."}`, the last one
  `{"event": "exit", "code": N, ...}`. Coordinators do not request it from workers.
"""

from __future__ import annotations

import binascii
import codecs
import enum
import json
import re
from dataclasses import asdict, dataclass, fields, replace
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

HEARTBEAT_INTERVAL = 15.0
"""Seconds without output after which a heartbeat is sent: intermediaries close idle connections."""

SSE_HEARTBEAT = b": \n\n"

MAX_DATA = 16 * 1024
"""
Bytes of an output event's data, as JSON. Common readers have a limit of 64 KiB per line: Go's
`bufio.Scanner`, asyncio's `StreamReader`.
"""

MAX_EXIT = 32 * 1024
"""Bytes of an exit event's data that a reader accepts."""

MAX_FILE_PIECE = 9 * 1024
"""Bytes of a file in one event: with a path of `MAX_PATH`, the event's data is shorter than `MAX_DATA`."""

MAX_OUTPUT_ERRORS = 16
"""Entries of an exit's `output_errors`."""


class Stream(enum.StrEnum):
    """An output stream of a script."""

    STDOUT = "stdout"
    STDERR = "stderr"


class Reason(enum.StrEnum):
    """Why the coordinator or the worker ended a run."""

    TIMEOUT = "timeout"
    WORKER_LOST = "worker-lost"
    OUTPUT_LIMIT = "output-limit"
    NOT_STARTED = "not-started"

    @property
    def code(self) -> int:
        """The exit code: 124 for a timeout, as of `timeout(1)`; 125 for failures outside the script."""
        return 124 if self is Reason.TIMEOUT else 125


class OutputProblem(enum.StrEnum):
    """Why a requested file was not returned, or not reliably."""

    NOT_FOUND = "not-found"
    DIRECTORY = "directory"
    SYMBOLIC_LINK = "symbolic-link"
    SPECIAL_FILE = "special-file"
    INVALID_NAME = "invalid-name"
    OUTPUT_LIMIT = "output-limit"
    TOO_MANY_FILES = "too-many-files"
    UNREADABLE = "unreadable"
    CHANGED = "changed"


@dataclass(frozen=True)
class OutputFailure:
    """A file, or a pattern, that a run could not return. `error` is an `OutputProblem` of this version."""

    name: str
    error: str

    _MAX_NAME = 100  # characters

    @classmethod
    def of(cls, name: str, problem: OutputProblem) -> OutputFailure:
        """Return a failure with a short, printable name."""
        return cls(_UNPRINTABLE.sub("\ufffd", name)[: cls._MAX_NAME], problem)

    @classmethod
    def from_json(cls, value: object) -> OutputFailure | None:
        """Return the failure in an item of `output_errors`, or None if that is invalid."""
        if not isinstance(value, dict):
            return None
        name, error = value.get("name"), _safe_token(value.get("error"))
        if not isinstance(name, str) or error is None:
            return None
        return cls(_UNPRINTABLE.sub("\ufffd", name)[: cls._MAX_NAME], error)


_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Format(enum.Enum):
    """A response format; the value is its `Content-Type`."""

    EVENTS = "text/event-stream; charset=utf-8"
    RAW = "application/octet-stream"
    NDJSON = "application/x-ndjson"

    @property
    def media_type(self) -> str:
        """The content type without its parameters."""
        return self.value.partition(";")[0]


# Sent after `HEARTBEAT_INTERVAL` without output. (Many JSON readers reject empty lines.)
HEARTBEATS = {Format.EVENTS: SSE_HEARTBEAT, Format.NDJSON: b'{"event": "heartbeat"}\n'}


def requested_format(arguments: Mapping[bytes, Sequence[bytes]], accept: str = "") -> Format:
    """
    Return the format that a request selects by its query, or else by its `Accept` header.

    A non-empty `raw` in the query selects raw; `Accept` selects NDJSON only if it names that type.
    """
    if any(arguments.get(b"raw", ())):
        return Format.RAW
    for media_range in accept.lower().split(","):
        name, *parameters = (part.replace(" ", "") for part in media_range.split(";"))
        if name == Format.NDJSON.media_type:
            return Format.EVENTS if any(map(_ZERO_QUALITY.fullmatch, parameters)) else Format.NDJSON
    return Format.EVENTS


_ZERO_QUALITY = re.compile(r"q=0(\.0*)?")


class WireError(Exception):
    """A received run does not conform to its format."""


@dataclass(frozen=True)
class Exit:
    """
    How a run ended.

    `code` is 0 to 255; 128+n for a script killed by signal n. Times are in milliseconds; `cpu_ms` is the sum
    over all processes of the run, `max_rss_kb` the largest resident set of one of them, in KiB. `oom` is true
    if the code is 137 because Linux killed a process of the run when memory ran out.
    `output_errors` are requested files that are missing, `output_errors_dropped` counts further ones.
    """

    code: int
    signal: str | None = None
    reason: str | None = None
    wall_ms: int | None = None
    cpu_ms: int | None = None
    max_rss_kb: int | None = None
    oom: bool = False
    truncated: bool = False
    dropped_bytes: int = 0
    output_errors: tuple[OutputFailure, ...] = ()
    output_errors_dropped: int = 0

    def __str__(self) -> str:
        return " ".join(["exit", str(self.code), *filter(None, (self.signal, self.reason))])

    @classmethod
    def forced(cls, reason: Reason, wall_ms: int | None = None) -> Exit:
        """Return the exit of a run that the coordinator or the worker ended."""
        return cls(reason.code, reason=reason, wall_ms=wall_ms)

    def to_json(self) -> bytes:
        """Encode the `exit` event's data; fields with default values are omitted."""
        payload = {
            item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default
        }
        if self.output_errors:
            payload["output_errors"] = [asdict(failure) for failure in self.output_errors]
        return json.dumps(payload).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Exit:
        """
        Decode the `exit` event's data. Unknown fields and invalid optional fields are ignored.

        Raises `WireError` for data that is too long, not a JSON object or without a valid code.
        """
        payload = decode_json(data) if len(data) <= MAX_EXIT else None
        if not isinstance(payload, dict) or not is_exit_code(payload.get("code")):
            raise WireError("exit event without a valid code")
        keys = ("wall_ms", "cpu_ms", "max_rss_kb")
        counts = {key: payload[key] for key in keys if _is_count(payload.get(key))}
        failures = payload.get("output_errors")
        failures = failures[:MAX_OUTPUT_ERRORS] if isinstance(failures, list) else []
        return cls(
            code=payload["code"] & 0xFF,
            signal=_safe_token(payload.get("signal")),
            reason=_safe_token(payload.get("reason")),
            oom=payload.get("oom") is True,
            truncated=payload.get("truncated") is True,
            dropped_bytes=_count_or_0(payload.get("dropped_bytes")),
            output_errors=tuple(filter(None, map(OutputFailure.from_json, failures))),
            output_errors_dropped=_count_or_0(payload.get("output_errors_dropped")),
            **counts,
        )

    def with_output_errors(self, failures: Sequence[OutputFailure]) -> Exit:
        """Return this exit with the first `MAX_OUTPUT_ERRORS` failures, and the number of the others."""
        kept = tuple(failures[:MAX_OUTPUT_ERRORS])
        return replace(self, output_errors=kept, output_errors_dropped=len(failures) - len(kept))


def decode_json(data: bytes) -> Any:
    """Decode JSON in UTF-8; from bytes, `json.loads` would accept other encodings and lone surrogates."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise WireError("invalid JSON") from error


def is_exit_code(value: object) -> bool:
    """Return whether a value is 0 to 255, or -1, which the Go original sends for death by a signal."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= 255  # noqa: PLR2004


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _count_or_0(value: object) -> int:
    return value if isinstance(value, int) and _is_count(value) else 0


def _safe_token(value: object) -> str | None:
    """Return a short plain word, None for anything else: the value may be printed on a terminal."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9+-]{1,32}", value) else None


class RunWriter(Protocol):
    """Encodes one run in one format: from output bytes to response bytes."""

    def output(self, stream: Stream, data: bytes) -> bytes:
        """Encode a piece of output."""
        ...

    def flush(self) -> bytes:
        """Encode any incomplete character at the end of the output."""
        ...

    def end(self, exit_: Exit) -> bytes:
        """Encode any incomplete character at the end of the output, then the exit."""
        ...


def write_event(format_: Format, stream: str, data: bytes) -> bytes:
    """Encode an output event. The data is a JSON string without line breaks, which would end the event."""
    if format_ is Format.NDJSON:
        return b'{"event": "%b", "data": %b}\n' % (stream.encode(), data)
    return b"event: %b\ndata: %b\n\n" % (stream.encode(), data)


def write_output(format_: Format, stream: str, text: str) -> bytes:
    """Encode output as events with at most `MAX_DATA` bytes of data each."""
    return b"".join([write_event(format_, stream, data) for data in _json_strings(text)])


# JSON allows U+0085, U+2028 and U+2029 in strings, but some readers split lines at them. The other C1
# controls are escaped too, since terminals interpret them.
_C1_CONTROL = re.compile(rb"\xc2[\x80-\x9f]")
_SEPARATOR = re.compile(rb"\xe2\x80[\xa8\xa9]")


def has_raw_controls(data: bytes) -> bool:
    """Return whether UTF-8 has C1 controls, U+2028 or U+2029."""
    # Searching for a single byte first costs almost nothing, and most output has neither.
    if b"\xc2" in data and _C1_CONTROL.search(data):
        return True
    return b"\xe2" in data and _SEPARATOR.search(data) is not None


def _escaped(match: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(match[0].decode())


def _json_strings(text: str) -> list[bytes]:
    """Encode text as JSON strings of at most `MAX_DATA` bytes, without line breaks of any kind."""
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
    """Return the last position up to `stop` that is not inside a character or an escape sequence."""
    while encoded[stop] & 0xC0 == 0x80:  # noqa: PLR2004 - a UTF-8 continuation byte
        stop -= 1
    backslash = encoded.rfind(b"\\", stop - 5, stop)
    if backslash >= 0:
        before = encoded[start : backslash + 1]
        # An even number of backslashes is a sequence of escaped backslashes.
        starts_escape = (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
        length = 6 if encoded[backslash + 1] == ord("u") else 2
        if starts_escape and backslash + length > stop:
            return backslash
    return stop


@dataclass(frozen=True)
class FilePiece:
    """A piece of a file that a run returns: path, size and mode of the file, and some of its content."""

    name: str
    size: int
    mode: int
    data: bytes

    @classmethod
    def from_json(cls, data: bytes) -> FilePiece:
        """Decode a `file` event's data. Raises `WireError`; the name is not checked."""
        payload = decode_json(data)
        if not isinstance(payload, dict) or payload.keys() != {"name", "size", "mode", "base64"}:
            raise WireError("invalid file event")
        name, size, mode, encoded = (payload[key] for key in ("name", "size", "mode", "base64"))
        if not isinstance(name, str) or not _is_count(size) or not isinstance(encoded, str):
            raise WireError("invalid file event")
        if not isinstance(mode, str) or not re.fullmatch("0[0-7]{3}", mode):
            raise WireError("invalid mode of a file")
        try:
            return cls(name, size, int(mode, 8), binascii.a2b_base64(encoded, strict_mode=True))
        except ValueError as error:
            raise WireError("invalid base64") from error


def write_file(format_: Format, piece: FilePiece) -> bytes:
    """Encode a piece of a file of at most `MAX_FILE_PIECE` bytes as an event."""
    payload = {
        "name": piece.name,
        "size": piece.size,
        "mode": f"{piece.mode:04o}",
        "base64": binascii.b2a_base64(piece.data, newline=False).decode(),
    }
    # Paths contain no controls and line separators, so nothing else has to be escaped.
    data = json.dumps(payload, ensure_ascii=False).encode()
    if format_ is Format.NDJSON:
        return b'{"event": "file", ' + data[1:] + b"\n"
    return b"event: file\ndata: " + data + b"\n\n"


def write_exit(format_: Format, exit_: Exit) -> bytes:
    """Encode the exit event."""
    if format_ is Format.NDJSON:
        return b'{"event": "exit", ' + exit_.to_json()[1:] + b"\n"
    return b"event: exit\ndata: " + exit_.to_json() + b"\n\n"


class EventWriter:
    """Encodes events or NDJSON. A character split across pieces is held back until it is complete."""

    def __init__(self, format_: Format = Format.EVENTS) -> None:
        self._format = format_
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {stream: decoder("replace") for stream in Stream}

    def output(self, stream: Stream, data: bytes) -> bytes:
        """Encode a piece of output as events; nothing while no character is complete."""
        return self._event(stream, self._decoders[stream].decode(data))

    def flush(self) -> bytes:
        """Encode incomplete characters as U+FFFD."""
        return b"".join(
            self._event(stream, decoder.decode(b"", final=True)) for stream, decoder in self._decoders.items()
        )

    def end(self, exit_: Exit) -> bytes:
        """Encode incomplete characters as U+FFFD, then the `exit` event."""
        return self.flush() + write_exit(self._format, exit_)

    def _event(self, stream: Stream, text: str) -> bytes:
        return write_output(self._format, stream, text) if text else b""


class RawWriter:
    """Passes output bytes unchanged."""

    def output(self, stream: Stream, data: bytes) -> bytes:  # noqa: ARG002 - the protocol's signature
        """Return the output unchanged."""
        return data

    def flush(self) -> bytes:
        """Return nothing: incomplete characters are passed as they are."""
        return b""

    def end(self, exit_: Exit) -> bytes:
        """Encode the exit line."""
        reason = f" {exit_.reason}" if exit_.reason else ""
        return f"\nexit: {exit_.code}{reason}\n".encode()


def run_writer(format_: Format) -> RunWriter:
    """Return a writer for a format."""
    return RawWriter() if format_ is Format.RAW else EventWriter(format_)
