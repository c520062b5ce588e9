"""
The log: text as Twisted writes it, or JSON, an object a line, for programs that read it; and where it goes.

Under twistd its own options say where: `--logfile` (rotated as twistd does), `--syslog`, or `--logger`, whose
observer replaces ours. Otherwise it is standard output.
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


def _format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError(f"{text!r} is neither text nor json")
    return text


LOG_FORMAT = ["log-format", None, "text", "How to write the log: text, or json, an object a line.", _format]
"""The option that both roles have."""


class Out(Protocol):
    """Where the text of a log goes."""

    def write(self, text: str, /) -> object:
        """Write a line, with its end."""

    def flush(self) -> object:
        """Pass on what was written."""


class StandardOutput:
    """
    Standard output for a log, which never blocks and never fails.

    A pipe or terminal that takes no more would stop the whole program at the next line. Lines that find no
    room are dropped, and their number is logged once there is room again. So are those of a full disk.
    """

    _PIECE = select.PIPE_BUF
    """Bytes that are written at once: where poll(2) finds a pipe writable, it takes so many."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._dropped = 0
        self._cut = False

    def write(self, text: str) -> None:
        """Write a line, or drop it."""
        if self._dropped and self._has_room():
            dropped, self._dropped = self._dropped, 0
            _log.warn("standard output was full: {dropped} lines of the log were dropped", dropped=dropped)
        data = text.encode("utf-8", "backslashreplace")
        if self._cut:
            data = b"\n" + data
        whole = len(data)
        try:
            while data and self._has_room():
                data = data[os.write(self._descriptor, data[: self._PIECE]) :]
        except OSError:
            pass  # a full disk, a pipe without a reader
        if data:
            self._dropped += 1
        if len(data) < whole:
            self._cut = bool(data)

    def flush(self) -> None:
        """Do nothing: what is written has been passed on."""

    def _has_room(self) -> bool:
        return any(happened & select.POLLOUT for _, happened in self._poll.poll(0))


class _Syslog:
    """Twistd's syslog, for lines that are made already."""

    def __init__(self, prefix: str) -> None:
        import syslog  # noqa: PLC0415 - a worker that boots for every run does without

        syslog.openlog(prefix)
        self._write = syslog.syslog

    def write(self, text: str) -> None:
        self._write(text.rstrip("\n"))

    def flush(self) -> None:
        """Do nothing: what is written has been passed on."""


def observer_of(options: Options, reactor: Any) -> ILogObserver | None:
    """
    Make the observer that writes the log of a program of ours, in the format and to the place of its options.

    None where twistd has to make it. Raises `OSError` where the log file cannot be opened.
    """
    twistd: Mapping[str, Any] = options.parent or {}
    is_json = options.get("log-format") == "json"
    if twistd.get("logger") or (twistd.get("syslog") and not is_json):
        return None
    out: Any = _out(twistd, reactor)
    return json_lines(out) if is_json else textFileLogObserver(out)


def is_elsewhere(options: Options) -> bool:
    """Tell whether the log does not go to standard output."""
    twistd: Mapping[str, Any] = options.parent or {}
    file = twistd.get("logfile")
    daemon = bool(twistd) and not twistd["nodaemon"]
    return daemon or bool(twistd.get("logger") or twistd.get("syslog")) or file not in (None, "", "-")


def _out(twistd: Mapping[str, Any], reactor: Any) -> Out:
    if twistd.get("syslog"):
        return _Syslog(twistd["prefix"])
    name = twistd.get("logfile")
    if name == "-" and not twistd["nodaemon"]:
        raise ValueError("a daemon cannot log to standard output (--logfile -)")
    if name == "-" or not twistd or (not name and twistd["nodaemon"]):
        return StandardOutput()
    from twisted.python.logfile import LogFile  # noqa: PLC0415 - a worker by itself does without

    file: Any = LogFile.fromFullPath(name or "twistd.log")
    if not signal.getsignal(signal.SIGUSR1):

        def rotate(*_: object) -> None:
            reactor.callFromThread(file.rotate)

        signal.signal(signal.SIGUSR1, rotate)
    out: Out = file
    return out


def json_lines(out: Out) -> ILogObserver:
    """
    Write each event as an object: `time` (RFC 3339), `level`, `from`, `message`, and the event's own fields.

    A field that is neither a number nor a truth value is written as text; a failure has its `traceback`.
    """

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        fields = {key: _plain(value) for key, value in event.items() if not key.startswith("log_")}
        level: Any = event.get("log_level", LogLevel.info)
        told = {
            "time": datetime.fromtimestamp(event["log_time"], UTC).isoformat(timespec="milliseconds"),
            "level": level.name,
            "from": event.get("log_namespace", ""),
            "message": formatEvent(event),
        }
        if "log_failure" in event:
            told["traceback"] = event["log_failure"].getTraceback()
        out.write(json.dumps({**fields, **told}) + "\n")
        out.flush()

    observer: ILogObserver = observe
    return observer


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def with_logging(service: IService, options: Options, reactor: Any) -> IService:
    """Have twistd write the log of a service as its options say."""
    return _Logged(service, observer_of(options, reactor))


class _Logged(MultiService):
    """Tells twistd's application how to log, as it is made a part of it."""

    def __init__(self, service: IService, observer: ILogObserver | None) -> None:
        super().__init__()
        self._observer = observer
        service.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:
        """Join an application."""
        if self._observer is not None:
            parent.setComponent(ILogObserver, self._observer)
        super().setServiceParent(parent)
