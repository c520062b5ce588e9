"""How requests for runs end, in the words of the log, the metrics and `/status`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfaas.protocol.formats import Reason

if TYPE_CHECKING:
    from bfaas.protocol.formats import Exit


class OutcomeKind(enum.StrEnum):
    """
    How a request for a run ended.

    `RUN_OUTCOMES` are the values of the label `outcome` of `bfaas_run_duration_seconds`. `REJECTIONS`, the
    values of the label `reason` of `bfaas_requests_rejected_total`, are requests answered with an HTTP error.
    `NOT_STARTED` is both: a worker reports it by an HTTP error or, once the response has started, by the
    exit.
    """

    EXIT = "exit"
    TIMEOUT = "timeout"
    WORKER_LOST = "worker-lost"
    OUTPUT_LIMIT = "output-limit"
    NOT_STARTED = "not-started"
    CLIENT_DISCONNECTED = "client-disconnected"
    INTERNAL_ERROR = "internal-error"

    UNAUTHORIZED = "unauthorized"
    INVALID_REQUEST = "invalid-request"
    CLIENT_LIMIT = "client-limit"
    SHUTTING_DOWN = "shutting-down"
    QUEUE_FULL = "queue-full"
    QUEUE_TIMEOUT = "queue-timeout"
    REPLAYED = "replayed"
    WORKER_FAILED = "worker-failed"
    WORKER_TIMEOUT = "worker-timeout"


RUN_OUTCOMES = (
    OutcomeKind.EXIT,
    OutcomeKind.TIMEOUT,
    OutcomeKind.WORKER_LOST,
    OutcomeKind.OUTPUT_LIMIT,
    OutcomeKind.NOT_STARTED,
    OutcomeKind.CLIENT_DISCONNECTED,
    OutcomeKind.INTERNAL_ERROR,
)

REJECTIONS = (
    OutcomeKind.UNAUTHORIZED,
    OutcomeKind.INVALID_REQUEST,
    OutcomeKind.CLIENT_LIMIT,
    OutcomeKind.SHUTTING_DOWN,
    OutcomeKind.QUEUE_FULL,
    OutcomeKind.QUEUE_TIMEOUT,
    OutcomeKind.REPLAYED,
    OutcomeKind.NOT_STARTED,
    OutcomeKind.WORKER_FAILED,
    OutcomeKind.WORKER_TIMEOUT,
)

_BY_REASON = {reason.value: OutcomeKind(reason.value) for reason in Reason}


@dataclass(frozen=True)
class Outcome:
    """How a request for a run ended; `exit_code` is the script's, for `EXIT` alone."""

    kind: OutcomeKind
    exit_code: int | None = None

    @classmethod
    def from_exit(cls, exit_: Exit) -> Outcome:
        """Return the outcome of a run that ended with an exit. Unknown reasons count as plain exits."""
        kind = _BY_REASON.get(exit_.reason or "")
        return cls(OutcomeKind.EXIT, exit_.code) if kind is None else cls(kind)

    def __str__(self) -> str:
        """Return the outcome as text: `exit 3`, `timeout`, `queue-full`."""
        return self.kind if self.exit_code is None else f"{self.kind} {self.exit_code}"
