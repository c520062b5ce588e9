"""
The log of a role: Twisted's text format, or JSON with one object per line.

Under twistd, its options choose the destination: `--logfile` (rotated as twistd does), `--syslog`, or
`--logger`, whose observer replaces ours. Otherwise it is standard output.
"""

from __future__ import annotations

import json
import os
import select
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from twisted.application.service import MultiService
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, formatEvent, textFileLogObserver
from zope.interface import provider

if TYPE_CHECKING:
    from collections.abc import Mapping

    from twisted.application.service import IService
    from twisted.python.usage import Options

_log = Logger()


def _log_format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError(f"{text!r} is neither text nor json")
    return text


LOG_FORMAT = [
    "log-format",
    None,
    "text",
    "Format of the log: text, or json with one object per line.",
    _log_format,
]
"""The command-line option of all roles."""


def with_logging(service: IService, options: Options, reactor: Any) -> IService:
    """Wrap the service in one that sets the log observer that the options choose."""
    return _LoggingService(service, make_observer(options, reactor))


class _LoggingService(MultiService):
    """Sets the log observer of twistd's application when it is added to it."""

    def __init__(self, service: IService, observer: ILogObserver | None) -> None:
        super().__init__()
        self._observer = observer
        service.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:
        """Add the service to an application."""
        if self._observer is not None:
            parent.setComponent(ILogObserver, self._observer)
        super().setServiceParent(parent)


def make_observer(options: Options, reactor: Any) -> ILogObserver | None:
    """
    Return the observer that writes the log of a role as its options say, or None if twistd has its own.

    Raises `OSError` if the log file cannot be opened.
    """
    twistd: Mapping[str, Any] = options.parent or {}
    is_json = options.get("log-format") == "json"
    if twistd.get("logger") or (twistd.get("syslog") and not is_json):
        return None
    stream: Any = _open_stream(twistd, reactor)
    return json_observer(stream) if is_json else textFileLogObserver(stream)


def logs_to_standard_output(options: Options) -> bool:
    """Return whether the log goes to standard output."""
    twistd: Mapping[str, Any] = options.parent or {}
    is_daemon = bool(twistd) and not twistd["nodaemon"]
    has_observer = bool(twistd.get("logger") or twistd.get("syslog"))
    return not is_daemon and not has_observer and twistd.get("logfile") in (None, "", "-")


class LogStream(Protocol):
    """A destination of log lines."""

    def write(self, text: str, /) -> object:
        """Write a line, including its newline."""

    def flush(self) -> object:
        """Write what is buffered."""


def _open_stream(twistd: Mapping[str, Any], reactor: Any) -> LogStream:
    if twistd.get("syslog"):
        return _Syslog(twistd["prefix"])
    name = twistd.get("logfile")
    if name == "-" and not twistd["nodaemon"]:
        raise ValueError("a daemon cannot log to standard output (--logfile -)")
    if name == "-" or not twistd or (not name and twistd["nodaemon"]):
        return StandardOutput()
    from twisted.python.logfile import LogFile  # noqa: PLC0415 - a worker without twistd does not need it

    file: Any = LogFile.fromFullPath(name or "twistd.log")
    if not signal.getsignal(signal.SIGUSR1):

        def rotate(*_: object) -> None:
            reactor.callFromThread(file.rotate)

        signal.signal(signal.SIGUSR1, rotate)
    stream: LogStream = file
    return stream


class StandardOutput:
    """
    A log stream to standard output that never blocks and never fails.

    Otherwise a full pipe or a stopped terminal would block the whole program. Lines without room are dropped,
    and their number is logged once there is room again; the same applies to a full disk.
    """

    _CHUNK_SIZE = select.PIPE_BUF
    """Bytes per write: a pipe that poll(2) reports as writable accepts this many without blocking."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._dropped = 0
        self._line_incomplete = False

    def write(self, text: str) -> None:
        """Write a line, or drop it."""
        if self._dropped and self._is_writable():
            dropped, self._dropped = self._dropped, 0
            _log.warn("standard output was full: {dropped} lines of the log were dropped", dropped=dropped)
        data = text.encode("utf-8", "backslashreplace")
        if self._line_incomplete:
            data = b"\n" + data
        size = len(data)
        try:
            while data and self._is_writable():
                data = data[os.write(self._descriptor, data[: self._CHUNK_SIZE]) :]
        except OSError:
            pass  # a full disk, or a pipe without a reader
        if data:
            self._dropped += 1
        if len(data) < size:
            self._line_incomplete = bool(data)

    def flush(self) -> None:
        """Do nothing: `write` does not buffer."""

    def _is_writable(self) -> bool:
        return any(events & select.POLLOUT for _, events in self._poll.poll(0))


class _Syslog:
    """A log stream to syslog, for lines that are formatted already."""

    def __init__(self, prefix: str) -> None:
        import syslog  # noqa: PLC0415 - workers usually do not need it

        syslog.openlog(prefix)
        self._write = syslog.syslog

    def write(self, text: str) -> None:
        self._write(text.rstrip("\n"))

    def flush(self) -> None:
        """Do nothing: `write` does not buffer."""


def json_observer(stream: LogStream) -> ILogObserver:
    """
    Return an observer that writes each event as a JSON object.

    It has `time` (RFC 3339), `level`, `logger`, `message`, and `traceback` if the event has a failure; also
    the event's own fields, as text unless they are numbers, booleans or null.
    """

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        own_fields = {key: _json_value(value) for key, value in event.items() if not key.startswith("log_")}
        level: Any = event.get("log_level", LogLevel.info)
        fields = {
            "time": datetime.fromtimestamp(event["log_time"], UTC).isoformat(timespec="milliseconds"),
            "level": level.name,
            "logger": event.get("log_namespace", ""),
            "message": formatEvent(event),
        }
        if "log_failure" in event:
            fields["traceback"] = event["log_failure"].getTraceback()
        stream.write(json.dumps({**own_fields, **fields}) + "\n")
        stream.flush()

    observer: ILogObserver = observe
    return observer


def _json_value(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
