"""
What a request asks for: a script, and where its body is JSON also standard input, variables and a timeout.

A plain body is the script (`curl -d` calls it a form; see `bfaas.http.media_type`). A JSON body is an object:
`{"script": "...", "stdin": "...", "env": {"NAME": "..."}, "timeout": "2.5s"}`, of which only `script` must be
there. What is not exactly so is refused, rather than run as something that was not meant.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bfaas.http.media_type import JSON
from bfaas.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ENV = 128 * 1024 - 1
"""Bytes that variables may have together, as Linux counts them: so each fits into one argument too."""

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


class InvalidRequestError(ValueError):
    """A body that cannot be run as it is. The message is one line of ASCII for the client."""


@dataclass(frozen=True)
class RunRequest:
    """
    One run to be made; `timeout` is in seconds, None where none was asked for.

    `body` says all of it to a worker, and `content_type` how; None for a script alone, which any worker
    takes, the Go original's too. `size` is that of the body that the client sent, in bytes.
    """

    script: bytes
    body: bytes = field(repr=False)
    size: int
    content_type: str | None = None
    stdin: bytes = b""
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None

    @classmethod
    def plain(cls, script: bytes) -> RunRequest:
        """Ask for a script and nothing else. Raises `InvalidRequestError`."""
        if b"\0" in script:
            raise InvalidRequestError("a script cannot contain a NUL byte")
        # Bash would take it for a part of the first command, and go on with the next line.
        if script.startswith(_BYTE_ORDER_MARKS):
            raise InvalidRequestError("the script starts with a byte order mark: send UTF-8 without one")
        return cls(script, script, len(script))

    @classmethod
    def from_json(cls, data: bytes) -> RunRequest:
        """Read a JSON body. Raises `InvalidRequestError`."""
        if data.startswith(_BYTE_ORDER_MARKS):
            raise InvalidRequestError("the body starts with a byte order mark: send UTF-8 without one")
        told = _object(data)
        for name in told:
            if name not in ("script", "stdin", "env", "timeout"):
                raise InvalidRequestError(
                    f"unknown key {_quoted(name)}: there are script, stdin, env and timeout"
                )
        if "script" not in told:
            raise InvalidRequestError("script is missing")
        script = cls.plain(_text("script", told["script"])).script
        if told.keys() == {"script"}:
            return cls(script, script, len(data))
        stdin, env = _text("stdin", told.get("stdin", "")), _env(told.get("env", {}))
        timeout = _timeout(told["timeout"]) if "timeout" in told else None
        # The shortest form there is, so that it is within any limit that the client's was within.
        body = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
        return cls(script, body, len(data), JSON, stdin, env, timeout)

    def effective_timeout(self, maximum: float) -> float:
        """Tell how long the run may take, in seconds, where `maximum` is the maximum that any may."""
        return maximum if self.timeout is None else min(maximum, self.timeout)


def _object(data: bytes) -> dict[str, Any]:
    try:
        told = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except InvalidRequestError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8, at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the body is not JSON, at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:  # a number with more digits than Python reads
        raise InvalidRequestError("the body has a number that is too long") from None
    if not isinstance(told, dict):
        raise InvalidRequestError("the body is not a JSON object")
    return told


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = {}
    for name, value in pairs:
        if name in told:
            raise InvalidRequestError(f"{_quoted(name)} is given twice")
        told[name] = value
    return told


def _text(what: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{what} is not a string")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{what} has half a character (a lone surrogate)") from None


def _env(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequestError("env is not an object")
    size = 0
    for name, content in value.items():
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"env: {_quoted(name)} is no name: letters, digits, underscores; no digit first"
            )
        encoded = _text(f"env: {_quoted(name)}", content)
        if b"\0" in encoded:
            raise InvalidRequestError(f"env: {_quoted(name)} has a NUL")
        size += len(name) + len(encoded) + 2
    if size > MAX_ENV:
        raise InvalidRequestError(f"env is larger than {MAX_ENV} bytes")
    return value


def _timeout(value: object) -> float:
    if not isinstance(value, str):
        raise InvalidRequestError('timeout is not a string such as "2.5s"')
    try:
        seconds = parse_duration(value)
    except ValueError:
        raise InvalidRequestError(f"timeout: {_quoted(value)} is not a duration such as 2.5s") from None
    if seconds <= 0:
        raise InvalidRequestError(f"timeout: {_quoted(value)} is not above zero")
    return seconds


def _quoted(text: str) -> str:
    """Quote what a client sent in one short line of ASCII."""
    return json.dumps(text if len(text) <= 40 else f"{text[:40]}...")  # noqa: PLR2004 - enough to find it by
