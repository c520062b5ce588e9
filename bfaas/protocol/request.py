"""
Request bodies of `POST /run`: a script, or JSON with a script, its input, files, variables and a timeout.

A plain body is the script (`curl -d` labels it a form; see `bfaas.http.media_type`). A JSON body is an
object with the keys in `_KEYS`, of which only `script` is required; docs/http-api.md describes them. Any
other body is rejected, so that nothing unintended runs. `bfaas.protocol.form` converts forms to JSON.
"""

from __future__ import annotations

import binascii
import codecs
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bfaas.http.media_type import JSON
from bfaas.protocol.files import (
    DEFAULT_MODE,
    MAX_FILES,
    MAX_PATTERNS,
    File,
    InvalidPathError,
    check_path,
    check_paths,
    check_pattern,
)
from bfaas.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_ENV = 128 * 1024 - 1
"""Limit, in bytes, of all variables together, as Linux counts them; below Linux's limit for a single one."""

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_KEYS = ("script", "stdin", "stdin_base64", "env", "timeout", "files", "outputs")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


_MODE = re.compile("0[0-7]{3}")


class InvalidRequestError(ValueError):
    """A request body is invalid. The message is one line of ASCII for the client."""


@dataclass(frozen=True)
class RunRequest:
    """
    A requested run; `timeout` is in seconds, or None.

    `files` are written before the script starts, and `outputs` are patterns of files to return after its end.
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
    files: Mapping[str, File] = field(default_factory=dict, repr=False)
    outputs: Sequence[str] = ()

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
        return cls.from_fields(_object(data), len(data))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], size: int) -> RunRequest:
        """Return the request in a decoded JSON object; `size` is that of the client's body."""
        for name in fields:
            if name not in _KEYS:
                raise InvalidRequestError(f"unknown key {quoted(name)}: the keys are {', '.join(_KEYS)}")
        if "script" not in fields:
            raise InvalidRequestError("script is missing")
        script = cls.plain(_text("script", fields["script"])).script
        if fields.keys() == {"script"}:
            return cls(script, script, size)
        if {"stdin", "stdin_base64"} <= fields.keys():
            raise InvalidRequestError("there are both stdin and stdin_base64")
        stdin = _text("stdin", fields.get("stdin", "")) or _base64(
            "stdin_base64", fields.get("stdin_base64", "")
        )
        env = _env(fields.get("env", {}))
        timeout = _timeout(fields["timeout"]) if "timeout" in fields else None
        files, outputs = _files(fields.get("files", {})), _outputs(fields.get("outputs", []))
        # The shortest encoding, so that the worker's limit is not much above the coordinator's.
        body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        return cls(script, body, size, JSON, stdin, env, timeout, files, outputs)

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
            raise InvalidRequestError(f"duplicate key {quoted(name)}")
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
                f"env: {quoted(name)} is not a name: letters, digits, underscores; no digit first"
            )
        encoded = _text(f"env: {quoted(name)}", content)
        if b"\0" in encoded:
            raise InvalidRequestError(f"env: {quoted(name)} contains a NUL byte")
        size += len(name) + len(encoded) + 2
    if size > MAX_ENV:
        raise InvalidRequestError(f"env is larger than {MAX_ENV} bytes")
    return value


def _base64(what: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{what} is not a string")
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError:
        raise InvalidRequestError(f"{what} is not base64 (RFC 4648, section 4)") from None


def _files(value: object) -> dict[str, File]:
    if not isinstance(value, dict):
        raise InvalidRequestError("files is not an object")
    if len(value) > MAX_FILES:
        raise InvalidRequestError(f"files: more than {MAX_FILES}")
    files = {path: _file(f"files: {quoted(path)}", content) for path, content in value.items()}
    for path in files:
        _check("files", path, check_path)
    try:
        check_paths(files)
    except InvalidPathError as error:
        raise InvalidRequestError(f"files: a path is invalid: {error}") from None
    return files


def _file(what: str, value: object) -> File:
    """Decode a file: its text, or an object with its base64 encoding and its mode."""
    if not isinstance(value, dict):
        return File(_text(what, value))
    if "base64" not in value or not value.keys() <= {"base64", "mode"}:
        raise InvalidRequestError(f"{what} is neither text nor an object with base64 and mode")
    mode = value.get("mode", f"{DEFAULT_MODE:04o}")
    if not isinstance(mode, str) or not _MODE.fullmatch(mode):
        raise InvalidRequestError(f'{what}: mode is not a string such as "0644"')
    return File(_base64(what, value["base64"]), int(mode, 8))


def _outputs(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise InvalidRequestError("outputs is not a list of strings")
    if len(value) > MAX_PATTERNS:
        raise InvalidRequestError(f"outputs: more than {MAX_PATTERNS} patterns")
    for pattern in value:
        _check("outputs", pattern, check_pattern)
    return value


def _check(what: str, path: str, check: Callable[[str], None]) -> None:
    try:
        check(path)
    except InvalidPathError as error:
        raise InvalidRequestError(f"{what}: {quoted(path)}: {error}") from None


def _timeout(value: object) -> float:
    if not isinstance(value, str):
        raise InvalidRequestError('timeout is not a string such as "2.5s"')
    try:
        seconds = parse_duration(value)
    except ValueError:
        raise InvalidRequestError(f"timeout: {quoted(value)} is not a duration such as 2.5s") from None
    if seconds <= 0:
        raise InvalidRequestError(f"timeout: {quoted(value)} is not above zero")
    return seconds


def quoted(text: str) -> str:
    """Quote a client's text as one short line of ASCII."""
    return json.dumps(text if len(text) <= 40 else f"{text[:40]}...")  # noqa: PLR2004 - enough to identify it
