"""Access control: which client a request is from, by its access token."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NoReturn

from twisted.logger import Logger

from bfaas.access_tokens import AccessTokens
from bfaas.http.errors import HTTPError
from bfaas.protocol.formats import AUTHORIZATION
from bfaas.system.startup import StartError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from twisted.web.server import Request

_SCHEME = "bearer"
_CHALLENGE = 'Bearer realm="bfaas"'
_FRESH = 1.0
"""Seconds after a change of a file during which its times may not tell whether it was changed again."""


class AccessControl:
    """
    Identifies clients by access tokens.

    `source` is the tokens, or a file of them, which is read again when it has changed. Raises `StartError` if
    the file cannot be read or has invalid lines. `wall_clock` returns the time in seconds since the epoch.
    """

    def __init__(self, source: AccessTokens | Path, wall_clock: Callable[[], float]) -> None:
        self._tokens: Callable[[], AccessTokens]
        if isinstance(source, AccessTokens):
            self._tokens = lambda: source
        else:
            self._tokens = _TokenFile(source, wall_clock).tokens

    def client_name(self, request: Request) -> str:
        """
        Return the name of the token in a request's `Authorization` header.

        Raises `HTTPError`: 401 without a valid token, 400 for repeated headers, 503 if the tokens cannot be
        read. The header is never part of a message.
        """
        headers = request.requestHeaders.getRawHeaders(AUTHORIZATION.encode(), [])
        if len(headers) > 1:
            _challenge(400, "more than one Authorization header", "invalid_request")
        scheme, _, token = b"".join(headers).decode("latin-1").strip().partition(" ")
        if scheme.lower() != _SCHEME:
            _challenge(401, "an access token is required: Authorization: Bearer TOKEN")
        name = self._tokens().find(token.strip())
        if name is None:
            _challenge(401, "the access token is not valid", "invalid_token")
        return name


def _challenge(code: int, message: str, error: str | None = None) -> NoReturn:
    """Raise an error with the header of RFC 6750, section 3."""
    challenge = _CHALLENGE if error is None else f'{_CHALLENGE}, error="{error}"'
    raise HTTPError(code, message, {"WWW-Authenticate": challenge})


class _TokenFile:
    """
    The tokens in a file, which is read again when it has changed.

    Invalid lines are logged and skipped, so that a mistake in one does not keep another from being revoked.
    While the file cannot be read, no token is valid.
    """

    _log = Logger()

    def __init__(self, path: Path, wall_clock: Callable[[], float]) -> None:
        self._path = path
        self._wall_clock = wall_clock
        self._version: tuple[int, ...] = ()
        self._tokens = AccessTokens(())
        self._problems: tuple[str, ...] = ()
        try:
            self._read_if_changed()
        except OSError as error:
            raise StartError(f"ACCESS_TOKENS: {path}: {error.strerror}") from None
        if self._problems:
            raise StartError(f"ACCESS_TOKENS: {path}: {self._problems[0]}")

    def tokens(self) -> AccessTokens:
        """Return the tokens that are in the file now. Raises `HTTPError` if it cannot be read."""
        try:
            self._read_if_changed()
        except OSError as error:
            self._version = ()
            self._report((error.strerror or str(error),))
            raise HTTPError(503, "the access tokens cannot be read") from None
        return self._tokens

    def _read_if_changed(self) -> None:
        status = self._path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if version == self._version:
            return
        tokens, problems = AccessTokens.parse(self._path.read_bytes().decode("utf-8", "replace"))
        is_fresh = abs(self._wall_clock() - status.st_ctime) < _FRESH
        self._version = () if is_fresh else version
        if tokens != self._tokens:
            self._log.info("{count} access tokens in {path}", count=len(tokens.entries), path=str(self._path))
        self._tokens = tokens
        self._report(problems)

    def _report(self, problems: tuple[str, ...]) -> None:
        """Log problems that are not known yet."""
        for problem in problems:
            if problem not in self._problems:
                self._log.error("access tokens: {path}: {problem}", path=str(self._path), problem=problem)
        self._problems = problems
