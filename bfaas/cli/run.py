"""
`bfaas run`: run a script at a coordinator, write its output, and exit with its exit code.

Exit codes other than the script's (124 if it exceeded its time limit, 125 if its worker was lost):
`EX_TEMPFAIL` (75) if the coordinator asks to try again later (429, 503), `EX_UNAVAILABLE` (69) if it rejects
the request otherwise or cannot be reached, 125 if the response breaks off, `EX_IOERR` (74) if output cannot
be written, or if the script exited with 0 but a file that was to be returned was not. After SIGINT, SIGTERM
and SIGHUP the command ends by that signal, and by SIGPIPE if the pipe of its output is closed: a shell shows
130, 143, 129 and 141.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import re
import signal
import socket
import sys
from base64 import b64encode
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from bfaas.access_tokens import check_token
from bfaas.cli.files import ReceivedFiles
from bfaas.http.client import BodyReceiver, read_body, send_request, single_use_agent
from bfaas.http.endpoints import describe
from bfaas.http.media_type import JSON
from bfaas.protocol import formats
from bfaas.protocol.parser import EventReader
from bfaas.protocol.request import RunRequest
from bfaas.system.runtime import run_with_reactor
from bfaas.system.stdio import OutputError, QueuedWriter, end_by_signal, write_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from twisted.web.iweb import IResponse

_LOST = 125
"""Exit code of a run that broke off, as of one whose worker was lost."""

_OK = 200
_TRY_LATER_STATUSES = (429, 503)
_MAX_ERROR_SIZE = 4096
_NO_LIMIT = 1 << 62  # the coordinator has one


@dataclass(frozen=True)
class RunCommand:
    """
    A request for a run, the coordinator's URL, and whether to print events instead of the output.

    `outputs` are the request's patterns of files, which are written below `output_dir`, but not if events are
    printed.
    """

    url: str
    headers: dict[str, str] = field(repr=False)
    body: bytes
    as_json: bool
    outputs: tuple[str, ...] = ()
    output_dir: str = "."

    @classmethod
    def of(
        cls,
        url: str,
        token: str,
        script: bytes,
        stdin: bytes | None,
        options: Mapping[str, object],
        *,
        output_dir: str = ".",
        as_json: bool,
    ) -> RunCommand:
        """
        Make a request to a URL from `base_url`: a plain body, as for the Go original, or JSON if needed.

        `token` is an access token, or empty. `options` are further keys of a JSON request, of which None and
        empty ones are left out. Raise `ValueError` for requests that a coordinator rejects:
        `InvalidRequestError` for invalid fields, `UnicodeError` for bytes that JSON cannot contain.
        """
        headers = {formats.AUTHORIZATION: f"Bearer {check_token(token)}"} if token else {}
        fields = {
            name: value for name, value in options.items() if value is not None and value not in ({}, [])
        }
        if stdin is None and not fields:
            return cls(url, headers, script, as_json)
        if stdin is not None:
            fields |= _stdin(stdin)
        fields["script"] = script.decode()
        body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        request = RunRequest.from_json(body)
        headers["Content-Type"] = JSON
        return cls(url, headers, body, as_json, tuple(request.outputs), output_dir)


def _stdin(data: bytes) -> dict[str, object]:
    try:
        return {"stdin": data.decode()}
    except UnicodeDecodeError:
        return {"stdin_base64": b64encode(data).decode()}


@dataclass(frozen=True)
class _Outcome:
    """An exit code, and lines for standard error."""

    code: int
    lines: tuple[str, ...] = ()


_URL = re.compile(
    r"(?P<scheme>(?i:https?))://"
    r"(?P<host>[A-Za-z0-9_.-]+|\[(?P<ipv6>[0-9A-Fa-f:.]+(%[A-Za-z0-9._~-]+)?)\])"
    r"(:(?P<port>[0-9]{0,5}))?/?"
)
_NAME = re.compile(r"(?=.{1,253}\.?\Z)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.|\Z))+")


def base_url(text: str) -> str:
    """
    Check a coordinator's URL (scheme, host, optional port), and return it without a trailing slash.

    A host is an IPv4 or IPv6 address, or a name of ASCII letters, digits, dashes and underscores. Raise
    `ValueError` with a message of one line, which does not contain a URL that may contain a password.
    """
    if "@" in text:
        raise ValueError("a coordinator's URL cannot contain credentials")
    match = _URL.fullmatch(text)
    if match is None or not _is_host(match["host"], match["ipv6"]) or not _is_port(match["port"]):
        raise ValueError(f"{text!r} is not a URL such as http://127.0.0.1:8000")
    port = f":{match['port']}" if match["port"] else ""
    return f"{match['scheme'].lower()}://{match['host']}{port}"


def _is_host(host: str, ipv6: str | None) -> bool:
    try:
        if ipv6 is not None:
            ipaddress.IPv6Address(ipv6)
        elif re.fullmatch(r"[0-9.]+", host):
            socket.inet_aton(host)
    except (ValueError, OSError):
        return False
    return ipv6 is not None or _NAME.fullmatch(host) is not None


def _is_port(text: str | None) -> bool:
    return not text or 0 < int(text) < 1 << 16


def run(command: RunCommand) -> int:
    """Run the command in a reactor. Return its exit code."""
    try:
        outcome = run_with_reactor(lambda reactor: _relay(reactor, command))
    except BrokenPipeError:
        end_by_signal(signal.SIGPIPE)
    except OutputError as error:
        outcome = _Outcome(os.EX_IOERR, (f"the output cannot be written: {error}",))
    for line in outcome.lines:
        _print_error(line)
    return outcome.code


def _print_error(line: str) -> None:
    write_error(f"bfaas: {line}\n")


async def _relay(reactor: Any, command: RunCommand) -> _Outcome:
    """Send the request and write the output. Cancelling closes the connection, which kills the script."""
    agent = single_use_agent(reactor)
    headers = Headers({name: [value] for name, value in command.headers.items()})
    try:
        response = await send_request(agent, "POST", command.url, formats.RUN_PATH, headers, command.body)
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - connection refused, unknown host, no HTTP
        return _Outcome(os.EX_UNAVAILABLE, (f"{command.url} does not respond: {describe(error)}",))
    if response.code != _OK:
        code = os.EX_TEMPFAIL if response.code in _TRY_LATER_STATUSES else os.EX_UNAVAILABLE
        return _Outcome(code, (f"{response.code}: {await _error_line(response)}",))
    return await _Output(reactor, command).write(response)


async def _error_line(response: IResponse) -> str:
    """Return the text of an error response as one line without control characters."""
    try:
        text = (await read_body(response, _MAX_ERROR_SIZE)).decode("ascii", "replace").strip()
    except CancelledError:
        raise
    except Exception:  # noqa: BLE001 - too long or incomplete: the status is sufficient
        text = ""
    line = "".join(character if character.isprintable() else " " for character in text)
    retry = response.headers.getRawHeaders("Retry-After", [""])[0]
    return f"{line} (try again in {retry} s)" if retry.isdigit() else line


class _Output:
    """Receive a run's events and write its output and files, at the pace of its readers."""

    def __init__(self, reactor: Any, command: RunCommand) -> None:
        self._as_json = command.as_json
        self._files = ReceivedFiles(command.output_dir)
        # The names of files are checked against what was requested.
        self._reader = EventReader(_NO_LIMIT, formats.Format.NDJSON, command.outputs)
        self._body = BodyReceiver(self._take)
        self._writer = QueuedWriter(reactor, self._body.pause, self._body.resume, self._fail)
        self._written: Deferred[None] = Deferred()

    async def write(self, response: IResponse) -> _Outcome:
        """Write everything, and return the outcome. Raise `BrokenPipeError` and `OutputError`."""
        try:
            return await self._receive(response)
        finally:
            self._files.close()

    async def _receive(self, response: IResponse) -> _Outcome:
        response.deliverBody(self._body)
        reason = ""
        try:
            await self._body.done
        except (CancelledError, BrokenPipeError, OutputError):
            raise
        except Exception as error:  # noqa: BLE001 - every error means that it broke off
            reason = str(error)
        exit_ = self._reader.exit
        if exit_ is not None and self._as_json:
            self._write(formats.Stream.STDOUT, formats.write_exit(formats.Format.NDJSON, exit_))
        self._writer.finish(lambda: self._written.callback(None))
        await self._written
        if exit_ is None:
            return _Outcome(_LOST, (f"the response broke off: {reason}".removesuffix(": "),))
        code = os.EX_IOERR if exit_.code == 0 and exit_.output_errors else exit_.code
        return _Outcome(code, () if self._as_json else tuple(_remarks(exit_, self._files.incomplete)))

    def _take(self, data: bytes) -> None:
        lines = self._reader.feed(data)
        if self._as_json:
            self._write(formats.Stream.STDOUT, lines)
        else:
            for name, group in groupby(map(json.loads, lines.splitlines()), lambda event: event["event"]):
                if name == "file":
                    for event in group:
                        self._files.add(event)
                else:
                    text = "".join(event["data"] for event in group)
                    self._write(formats.Stream(name), text.encode())
        if self._reader.error is not None:
            raise self._reader.error

    def _write(self, stream: formats.Stream, data: bytes) -> None:
        standard = sys.stdout if stream == formats.Stream.STDOUT else sys.stderr
        if standard is not None:
            self._writer.write(standard.fileno(), data)
        elif stream == formats.Stream.STDOUT and data:
            raise OutputError(os.strerror(errno.EBADF))
        # Output to a closed standard error is lost, as with other programs.

    def _fail(self, error: Exception) -> None:
        waiting = self._written if self._body.done.called else self._body.done
        waiting.errback(Failure(error))
        self._body.close()


def _remarks(exit_: formats.Exit, incomplete: str | None) -> Iterator[str]:
    if exit_.truncated:
        yield f"{exit_.dropped_bytes} bytes of output were dropped"
    if exit_.oom:
        yield "out of memory"
    if exit_.reason:
        yield f"ended by the coordinator: {exit_.reason}"
    if incomplete is not None:
        yield f"{incomplete}: incomplete, and therefore not written"
    for failure in exit_.output_errors:
        yield f"{failure.name}: {_PROBLEMS.get(failure.error, failure.error)}"
    if exit_.output_errors_dropped:
        yield f"{exit_.output_errors_dropped} more files were not returned"


_PROBLEMS: dict[str, str] = {
    formats.OutputProblem.NOT_FOUND: "no such file after the run",
    formats.OutputProblem.DIRECTORY: "a directory; request DIRECTORY/*",
    formats.OutputProblem.SYMBOLIC_LINK: "a symbolic link, which is not followed",
    formats.OutputProblem.SPECIAL_FILE: "not a regular file",
    formats.OutputProblem.INVALID_NAME: "its name is not valid",
    formats.OutputProblem.OUTPUT_LIMIT: "beyond the limit of output",
    formats.OutputProblem.TOO_MANY_FILES: "beyond the limit of files",
    formats.OutputProblem.UNREADABLE: "the script's user cannot read it",
    formats.OutputProblem.CHANGED: "changed while it was read",
}
