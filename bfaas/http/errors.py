"""The exception that stands for an HTTP error response."""

from __future__ import annotations


class HTTPError(Exception):
    """A request fails with status `code`, a one-line plain text body and extra response headers."""

    def __init__(self, code: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = headers or {}
