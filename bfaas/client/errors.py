"""
The errors of the client.

    BfaasError
    ├── NoResponseError          no connection, or no response
    ├── RejectedError            an error response
    │   └── BusyError            429 or 503 with Retry-After: try again later
    ├── ResponseLostError        the response is incomplete or invalid
    │   └── CancelledRunError    `Run.cancel` was called
    └── ScriptFailedError        `Result.check`: the exit code is not 0

Arguments that no request can contain raise `ValueError` or `TypeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bfaas.client.events import Result


class BfaasError(Exception):
    """A run failed. `may_have_run` is False only if it is certain that no part of the script was run."""

    def __init__(self, message: str, *, may_have_run: bool) -> None:
        super().__init__(message)
        self.may_have_run = may_have_run


class NoResponseError(BfaasError):
    """The coordinator could not be reached, or did not respond. The cause is an `httpx.TransportError`."""


class RejectedError(BfaasError):
    """
    The coordinator responded with an error.

    `status` is the HTTP status, `message` the response's line of text, and `run_id` names the request in the
    coordinator's log, if it has a name.
    """

    def __init__(self, status: int, message: str, run_id: str | None, *, may_have_run: bool) -> None:
        super().__init__(f"{status}: {message}", may_have_run=may_have_run)
        self.status = status
        self.message = message
        self.run_id = run_id


class BusyError(RejectedError):
    """The script was not started, and may be sent again after `retry_after` seconds."""

    def __init__(self, status: int, message: str, run_id: str | None, retry_after: int) -> None:
        super().__init__(status, message, run_id, may_have_run=False)
        self.retry_after = retry_after


class ResponseLostError(BfaasError):
    """The response ended before the exit of the run, or is not valid. The script has begun."""

    def __init__(self, message: str) -> None:
        super().__init__(message, may_have_run=True)


class CancelledRunError(ResponseLostError):
    """The run was cancelled with `Run.cancel`."""


class ScriptFailedError(BfaasError):
    """A script's exit code is not 0. `result` is its complete result."""

    def __init__(self, result: Result) -> None:
        super().__init__(str(result.exit), may_have_run=True)
        self.result = result
