"""
What `bfaas run` does: have a coordinator run a script, and end as the script did.

Its own exit codes, beside the script's (124 where its time was over, 125 where its worker was lost): 75 where
the coordinator said to come back later (429, 503), 69 where it refused otherwise or cannot be reached, 125
where the answer broke off, 141 where nobody reads the output any more, 74 where it cannot be written, 130
after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError
from twisted.web.http_headers import Headers

from bfaas import wire
from bfaas.ask import Ask
from bfaas.endpoints import describe
from bfaas.exchange import Body, BytesProducer, head, read_body, single_use_agent
from bfaas.media import JSON
from bfaas.process import in_own_reactor
from bfaas.reader import EventReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from twisted.web.iweb import IResponse

TRY_LATER, UNAVAILABLE, LOST, UNREAD, UNWRITTEN = 75, 69, 125, 141, 74

_OK, _TRY_LATER_STATUSES = 200, (429, 503)
_MAX_REFUSAL = 4096
_NO_LIMIT = 1 << 62  # the coordinator has one


@dataclass(frozen=True)
class Errand:
    """A request for a run, to a coordinator's URL, and whether events are wanted instead of its output."""

    url: str
    headers: dict[str, str]
    body: bytes
    as_json: bool

    @classmethod
    def of(
        cls,
        url: str,
        script: bytes,
        stdin: bytes | None,
        env: Mapping[str, str],
        timeout: str | None,
        *,
        as_json: bool,
    ) -> Errand:
        """
        Make the request as plain as it can be, for coordinators of the Go original.

        Raises `ValueError` for what a coordinator would not take: of that, `AskError` where it is in what is
        asked for, and `UnicodeDecodeError` where JSON cannot hold it.
        """
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
        if stdin is None and timeout is None and not env:
            return cls(url, {}, script, as_json)
        told: dict[str, object] = {"script": script.decode()}
        if stdin is not None:
            told["stdin"] = stdin.decode()
        if env:
            told["env"] = dict(env)
        if timeout is not None:
            told["timeout"] = timeout
        body = json.dumps(told).encode()
        Ask.from_json(body)
        return cls(url, {"Content-Type": JSON}, body, as_json)


class _UnwrittenError(Exception):
    """Output cannot be written."""


def run(errand: Errand) -> int:
    """Do it in a reactor of its own; returns the exit code."""
    return in_own_reactor(lambda reactor: _run(reactor, errand))


async def _run(reactor: Any, errand: Errand) -> int:
    """Relay a run; to be told to end closes the connection, and with it ends the script."""
    try:
        return await _relay(reactor, errand)
    except BrokenPipeError:
        _give_up_output()
        return UNREAD
    except _UnwrittenError as error:
        _give_up_output()
        return _complain(f"the output cannot be written: {error}", UNWRITTEN)


async def _relay(reactor: Any, errand: Errand) -> int:
    agent = single_use_agent(reactor)
    named = Headers({name: [value] for name, value in errand.headers.items()})
    url = f"{errand.url.rstrip('/')}{wire.RUN_PATH}".encode()
    try:
        response = await head(agent.request(b"POST", url, named, BytesProducer(errand.body)))
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - refused, no such host, no HTTP: whichever
        return _complain(f"{errand.url} does not answer: {describe(error)}", UNAVAILABLE)
    if response.code != _OK:
        code = TRY_LATER if response.code in _TRY_LATER_STATUSES else UNAVAILABLE
        return _complain(f"{response.code}: {await _refusal(response)}", code)
    return await _stream(response, errand)


async def _refusal(response: IResponse) -> str:
    """Read what a refusal says, as one line that does nothing to a terminal."""
    try:
        text = (await read_body(response, _MAX_REFUSAL)).decode("ascii", "replace").strip()
    except CancelledError:
        raise
    except Exception:  # noqa: BLE001 - too long, cut off: the status says enough
        text = ""
    line = "".join(character if character.isprintable() else " " for character in text)
    retry = response.headers.getRawHeaders("Retry-After", [""])[0]
    return f"{line} (try again in {retry} s)" if retry.isdigit() else line


async def _stream(response: IResponse, errand: Errand) -> int:
    """Write what comes as it comes, and tell how the run ended."""
    reader = EventReader(_NO_LIMIT, wire.Format.LINES)

    def take(data: bytes) -> None:
        lines = reader.feed(data)
        if errand.as_json:
            _write(sys.stdout, lines)
        else:
            for line in lines.splitlines():
                event = json.loads(line)
                stream = sys.stdout if event["event"] == wire.Stream.STDOUT else sys.stderr
                _write(stream, event["data"].encode())
        if reader.error is not None:
            raise reader.error

    body = Body(take)
    response.deliverBody(body)
    broken = ""
    try:
        await body.done
    except (CancelledError, BrokenPipeError, _UnwrittenError):
        raise
    except Exception as error:  # noqa: BLE001 - however it broke off
        broken = str(error)
    exit_ = reader.exit
    if exit_ is None:
        return _complain(f"the answer broke off {broken}".strip(), LOST)
    if errand.as_json:
        _write(sys.stdout, wire.write_exit(wire.Format.LINES, exit_))
        return exit_.code
    if exit_.truncated:
        _complain(f"{exit_.dropped_bytes} bytes of output were dropped", exit_.code)
    return _complain(f"ended by the coordinator: {exit_.reason}", exit_.code) if exit_.reason else exit_.code


def _write(stream: Any, data: bytes) -> None:
    if stream is None:  # it was closed before we began: nobody wants it
        return
    try:
        stream.buffer.write(data)
        stream.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _UnwrittenError(error.strerror) from error


def _give_up_output() -> None:
    """Lose what is not written yet: Python would try again as it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(line: str, code: int) -> int:
    with suppress(BrokenPipeError, _UnwrittenError):
        _write(sys.stderr, f"bfaas: {line}\n".encode(errors="backslashreplace"))
    return code
