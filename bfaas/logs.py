"""The log's formats: text as Twisted writes it, or JSON, an object a line, for programs that read it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from twisted.application.service import MultiService
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, textFileLogObserver
from zope.interface import provider

if TYPE_CHECKING:
    from twisted.application.service import IService


def _format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError(f"{text!r} is neither text nor json")
    return text


LOG_FORMAT = ["log-format", None, "text", "How to write the log: text, or json, an object a line.", _format]
"""The option that both roles have."""


def observer_of(format_: str) -> ILogObserver:
    """Write the log to standard output, in a format that the option took."""
    out = sys.__stdout__  # Twisted makes sys.stdout a way into the log
    assert out is not None  # noqa: S101 - a role has one
    return json_lines(out) if format_ == "json" else textFileLogObserver(out)


def json_lines(out: TextIO) -> ILogObserver:
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


def logged(service: IService, format_: str) -> IService:
    """Have twistd write the log of a service in a format; text is its own."""
    return service if format_ == "text" else _Logged(service, observer_of(format_))


class _Logged(MultiService):
    """Tells twistd's application how to log, as it is made a part of it."""

    def __init__(self, service: IService, observer: ILogObserver) -> None:
        super().__init__()
        self._observer = observer
        service.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:
        """Join an application."""
        parent.setComponent(ILogObserver, self._observer)
        super().setServiceParent(parent)
