"""
Request bodies of `POST /run`: a script, or JSON with a script, standard input, variables and a timeout.

A plain body is the script (`curl -d` labels it a form; see `bfaas.http.media_type`). A JSON body is an
object: `{"script": "...", "stdin": "...", "env": {"NAME": "..."}, "timeout": "2.5s"}`, of which only `script`
is required. Any other body is rejected, so that nothing unintended runs.
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
"""Limit, in bytes, of all variables together, as Linux counts them; below Linux's limit for a single one."""

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


class InvalidRequestError(ValueError):
    """A request body is invalid. The message is one line of ASCII for the client."""


@dataclass(frozen=True)
class RunRequest:
    """
    A requested run; `timeout` is in seconds, or None.

    `body` and `content_type` are sent to the worker. `content_type` is None for a script alone, which workers
    of the Go original accept, too. `size` is the size of the client's body, in bytes.
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
        """Return the request for a script alone. Raises `InvalidRequestError`."""
        if b"\0" in script:
            raise InvalidRequestError("a script cannot contain a NUL byte")
        # Bash would treat it as part of the first command, and continue with the next line.
        if script.startswith(_BYTE_ORDER_MARKS):
            raise InvalidRequestError("the script starts with a byte order mark: send UTF-8 without one")
        return cls(script, script, len(script))

    @classmethod
    def from_json(cls, data: bytes) -> RunRequest:
        """Decode a JSON body. Raises `InvalidRequestError`."""
        if data.startswith(_BYTE_ORDER_MARKS):
            raise InvalidRequestError("the body starts with a byte order mark: send UTF-8 without one")
        fields = _object(data)
        for name in fields:
            if name not in ("script", "stdin", "env", "timeout"):
                raise InvalidRequestError(
                    f"unknown key {_quoted(name)}: the keys are script, stdin, env and timeout"
                )
        if "script" not in fields:
            raise InvalidRequestError("script is missing")
        script = cls.plain(_text("script", fields["script"])).script
        if fields.keys() == {"script"}:
            return cls(script, script, len(data))
        stdin, env = _text("stdin", fields.get("stdin", "")), _env(fields.get("env", {}))
        timeout = _timeout(fields["timeout"]) if "timeout" in fields else None
        # The shortest encoding, so that a body within the coordinator's limit is within the worker's.
        body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        return cls(script, body, len(data), JSON, stdin, env, timeout)

    def effective_timeout(self, maximum: float) -> float:
        """Return the run's time limit in seconds: its own timeout, but at most `maximum`."""
        return maximum if self.timeout is None else min(maximum, self.timeout)


def _object(data: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
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
    except ValueError:  # a number with more digits than int() accepts
        raise InvalidRequestError("the body contains a number that is too long") from None
    if not isinstance(payload, dict):
        raise InvalidRequestError("the body is not a JSON object")
    return payload


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise InvalidRequestError(f"duplicate key {_quoted(name)}")
        fields[name] = value
    return fields


def _text(what: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{what} is not a string")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{what} contains a lone surrogate") from None


def _env(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequestError("env is not an object")
    size = 0
    for name, content in value.items():
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"env: {_quoted(name)} is not a name: letters, digits, underscores; no digit first"
            )
        encoded = _text(f"env: {_quoted(name)}", content)
        if b"\0" in encoded:
            raise InvalidRequestError(f"env: {_quoted(name)} contains a NUL byte")
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
    """Quote client data as one short line of ASCII."""
    return json.dumps(text if len(text) <= 40 else f"{text[:40]}...")  # noqa: PLR2004 - enough to identify it
