"""The runs of one coordinator: their identifiers, one log line for each, and the latest outcomes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

from bfaas.coordinator.outcome import Outcome, OutcomeKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.coordinator.client_limits import Client
    from bfaas.pool import Allocation

RECENT_RUNS = 50
"""Ended runs that `/status` lists."""

_UNKNOWN_FAILURE = Outcome(OutcomeKind.INTERNAL_ERROR)


@dataclass(eq=False)
class Run:
    """
    A request for a run. Times are those of the coordinator's clock, in seconds; None before they are known.

    `queued_at` is the arrival of the request, `started_at` the allocation of a ready machine, `response_at`
    the start of the worker's response, `first_byte_at` the first byte of that response's body (heartbeats
    do not count). `request_id` is the client's name for the request, if any. `queue_entry` is set while the
    request is in the queue. `done` fires at the end.
    """

    id: str
    client: Client
    queued_at: float
    machine: str | None = None
    started_at: float | None = None
    response_at: float | None = None
    first_byte_at: float | None = None
    ended_at: float | None = None
    bytes: int = 0
    outcome: Outcome = _UNKNOWN_FAILURE
    request_id: str = ""
    queue_entry: Deferred[Allocation] | None = None
    done: Deferred[None] = field(default_factory=Deferred)


class RunObserver(Protocol):
    """Receives the outcomes of requests."""

    def ended(self, run: Run, /) -> None:
        """Record the end of a run, or of a request that was queued."""

    def rejected(self, reason: OutcomeKind, /) -> None:
        """Record a rejected request."""


class _NullObserver(RunObserver):
    def ended(self, _: Run, /) -> None:
        pass

    def rejected(self, _: OutcomeKind, /) -> None:
        pass


class RunTracker:
    """
    Tracks runs from request to end.

    `wall_clock` returns the time in seconds since the epoch. `random` generates identifiers, each of 16 hex
    digits.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        wall_clock: Callable[[], float],
        random: Random,
        observer: RunObserver | None = None,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._random = random
        self._observer = observer or _NullObserver()
        self._active: set[Run] = set()
        self._recent: deque[dict[str, object]] = deque(maxlen=RECENT_RUNS)

    def new_id(self) -> str:
        """Return a new identifier."""
        return f"{self._random.getrandbits(64):016x}"

    def begin(self, run_id: str, client: Client) -> Run:
        """Record a request that waits for a machine."""
        run = Run(run_id, client, self._clock.seconds())
        self._active.add(run)
        return run

    def started(self, run: Run, machine_id: str) -> None:
        """Record the allocation of a ready machine."""
        run.machine, run.started_at = machine_id, self._clock.seconds()

    def rejected(self, reason: OutcomeKind) -> None:
        """Record a rejected request, whether `begin` was called for it or not."""
        self._observer.rejected(reason)

    def end(self, run: Run) -> None:
        """Record the end of a run; write a log line if it had a machine."""
        self._active.remove(run)
        run.ended_at = self._clock.seconds()
        self._observer.ended(run)
        started_at = run.ended_at if run.started_at is None else run.started_at
        times = {
            "wait_ms": _ms(started_at - run.queued_at),
            "run_ms": _ms(run.ended_at - started_at),
        }
        outcome = str(run.outcome)
        recent = {"id": run.id, "ended_at": round(self._wall_clock()), **times, "outcome": outcome}
        if run.client.token is not None:
            recent["client"] = run.client.token
        self._recent.append(recent)
        if run.machine is not None:
            self._log.info(
                "run {run} of {client} on {machine}: {outcome}, {bytes} bytes; waited {wait_ms} ms, "
                "response after {response_ms} ms, first byte after {first_byte_ms} ms, ran {run_ms} ms",
                run=run.id,
                client=run.client.key,
                machine=run.machine,
                outcome=outcome,
                bytes=run.bytes,
                response_ms=None if run.response_at is None else _ms(run.response_at - started_at),
                first_byte_ms=None if run.first_byte_at is None else _ms(run.first_byte_at - started_at),
                **times,
            )
        run.done.callback(None)

    def find(self, request_id: str) -> Run | None:
        """Return the active run whose client has given it this name."""
        return next((run for run in self._active if run.request_id == request_id), None)

    async def wait_idle(self) -> None:
        """Wait until all requests that are active now have ended."""
        await DeferredList([run.done for run in self._active])

    def status(self) -> dict[str, object]:
        """Return the number of runs that have a machine, and the latest ended runs, newest last."""
        running = sum(run.machine is not None for run in self._active)
        return {"running": running, "recent": list(self._recent)}


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
