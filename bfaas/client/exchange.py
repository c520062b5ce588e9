"""What both clients send to a coordinator, and what they make of its errors."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import httpx

from bfaas import __version__
from bfaas.access_tokens import check_token
from bfaas.client.errors import BfaasError, BusyError, NoResponseError, RejectedError, ResponseLostError
from bfaas.protocol import formats
from bfaas.protocol.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEFAULT_URL = "http://127.0.0.1:8000"

MAX_ERROR_SIZE = 4096
"""Bytes of an error response that are read."""

NO_CONNECTION_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=20)
"""A run occupies its connection, so a limit would delay runs. The coordinator has limits of its own."""

OK = 200
_BUSY = (429, 503)
_WORKER_FAILED = range(500, 600)

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
"""Errors that occur before the first byte of a request is sent."""


class Coordinator:
    """
    The coordinator's URL, the token for it, and the limits of time of `Client.__init__`.

    Raises `ValueError` for a URL or a token that is invalid.
    """

    def __init__(self, url: str | None, token: str | None, silence: float) -> None:
        text = url or os.environ.get("BFAAS_URL", "").strip() or DEFAULT_URL
        if "@" in text:  # the text is not in the message, since it may contain a password
            raise ValueError("a coordinator's URL cannot contain credentials")
        try:
            parsed = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise ValueError(f"{text!r} is not a URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise ValueError(f"{text!r} is not a URL such as {DEFAULT_URL}")
        self._url = str(parsed).rstrip("/")
        token = (os.environ.get("BFAAS_TOKEN", "") if token is None else token).strip()
        self._headers = {"User-Agent": f"bfaas-client/{__version__}", "Accept-Encoding": "identity"}
        if token:
            self._headers[formats.AUTHORIZATION] = f"Bearer {check_token(token)}"
        self._timeout = httpx.Timeout(10.0, read=silence, write=60.0, pool=None)

    def run_request(self, http: httpx.Client | httpx.AsyncClient, body: RunBody) -> httpx.Request:
        """Return the request for a run."""
        headers = {**self._headers, **body.headers}
        url = self._url + formats.RUN_PATH
        return http.build_request("POST", url, headers=headers, content=body.content, timeout=self._timeout)

    def status_request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Return the request for the coordinator's status."""
        url = f"{self._url}/status"
        return http.build_request("GET", url, headers=self._headers, timeout=self._timeout)


class RunOptions(TypedDict, total=False):
    """
    What a run can have besides its script.

    * `stdin`: standard input; `/dev/null` by default.
    * `env`: additional variables.
    * `timeout`: a shorter time limit than the coordinator's, in seconds or as a duration such as `"2.5s"`.
    * `files`: files in the working directory, by their relative paths: text, bytes, a `File` with a mode, or
      a path of a local file, which is read and keeps its mode.
    * `outputs`: patterns of files to return, such as `"out/*.png"`.
    """

    stdin: str | bytes | None
    env: Mapping[str, str]
    timeout: float | str | None
    files: Mapping[str, str | bytes | File | os.PathLike[str]]
    outputs: Sequence[str]


class RunBody:
    """
    The body of a request for a run, and its headers.

    A script alone is sent as it is, which coordinators of the Go original accept, too. Raises `ValueError`
    for text that UTF-8 cannot encode, `TypeError` for one pattern in place of a list, and `OSError` for local
    files that cannot be read.
    """

    def __init__(self, script: str | bytes, options: RunOptions) -> None:
        plain = script.encode() if isinstance(script, str) else script
        self.headers = {"Content-Type": "text/plain; charset=utf-8"}
        self.content = plain
        fields: dict[str, Any] = {}
        stdin, timeout = options.get("stdin"), options.get("timeout")
        if isinstance(stdin, bytes):
            fields["stdin_base64"] = _base64(stdin)
        elif stdin is not None:
            fields["stdin"] = stdin
        if env := options.get("env"):
            fields["env"] = dict(env)
        if timeout is not None:
            fields["timeout"] = timeout if isinstance(timeout, str) else f"{timeout:f}s"
        if files := options.get("files"):
            fields["files"] = {path: _file(content) for path, content in files.items()}
        if outputs := options.get("outputs"):
            if isinstance(outputs, str):  # a sequence, too
                raise TypeError("outputs is a list of patterns")
            fields["outputs"] = list(outputs)
        if fields:
            self.headers = {"Content-Type": "application/json"}
            self.content = json.dumps({"script": plain.decode(), **fields}, ensure_ascii=False).encode()


def _file(content: str | bytes | File | os.PathLike[str]) -> str | dict[str, str]:
    if isinstance(content, str):
        return content
    if isinstance(content, os.PathLike):
        path = Path(content)
        content = File(path.read_bytes(), stat.S_IMODE(path.stat().st_mode) & 0o777)
    elif isinstance(content, bytes):
        content = File(content)
    return {"base64": _base64(content.data), "mode": f"{content.mode:04o}"}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class RetryBudget:
    """Decides which rejections are waited for; `max_wait` is in seconds, for all pauses together."""

    def __init__(self, max_wait: float) -> None:
        self._left = max_wait

    def pause(self, error: BfaasError) -> float:
        """Return how many seconds to wait before the request is sent again; otherwise raise the error."""
        if not isinstance(error, BusyError):
            raise error
        pause = max(1, error.retry_after)
        if pause > self._left:
            raise error
        self._left -= pause
        return pause


@contextmanager
def no_response_errors() -> Iterator[None]:
    """Raise `NoResponseError` for the errors of httpx until a response has begun."""
    try:
        yield
    except httpx.TransportError as error:
        raise NoResponseError(
            f"no response: {_describe(error)}", may_have_run=not isinstance(error, _NOT_SENT)
        ) from error


@contextmanager
def response_errors() -> Iterator[None]:
    """Raise `ResponseLostError` for the errors of httpx after a response has begun."""
    try:
        yield
    except httpx.TransportError as error:
        raise ResponseLostError(f"the response was lost: {_describe(error)}") from error


def decode_status(response: httpx.Response) -> dict[str, Any]:
    """Return the status in a response. Raises `BfaasError`."""
    if response.status_code != OK:
        raise rejection(response, response.content[:MAX_ERROR_SIZE])
    try:
        status = response.json()
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise BfaasError("the response is not a status", may_have_run=False)
    return status


def rejection(response: httpx.Response, body: bytes) -> RejectedError:
    """
    Return the error for an error response; `body` is the beginning of its text.

    The coordinator sends `Retry-After` with every 429 and 503, before it uses a machine. A 503 without it is
    not the coordinator's.
    """
    text = body.decode("ascii", "replace").strip()
    message = "".join(character if character.isprintable() else " " for character in text)
    status, run_id = response.status_code, response.headers.get(formats.RUN_ID)
    retry_after = response.headers.get("Retry-After", "")
    if status in _BUSY and re.fullmatch("[0-9]{1,6}", retry_after):
        return BusyError(status, message, run_id, int(retry_after))
    return RejectedError(status, message, run_id, may_have_run=status in _WORKER_FAILED)


def _describe(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
