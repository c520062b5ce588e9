"""The runs of one coordinator: what each is called, a line in the log for each, what became of the latest."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from twisted.internet.interfaces import IReactorTime

LATEST = 50
"""Runs that are remembered after their end."""


class Refused(enum.StrEnum):
    """Why a request did not become a run."""

    MALFORMED = "malformed"
    CLIENT_LIMIT = "client-limit"
    SHUTTING_DOWN = "shutting-down"
    QUEUE_FULL = "queue-full"
    QUEUE_TIMEOUT = "queue-timeout"
    REPLAYED = "replayed"
    WORKER_FAILED = "worker-failed"
    NOT_STARTED = "not-started"
    WORKER_TIMEOUT = "worker-timeout"


@dataclass(eq=False)
class Run:
    """
    A request for a run, from its coming to its end; moments are by the coordinator's clock.

    `answered` is when the worker began to answer, `first_byte` when there was something to write. `ending` is
    for people: `exit 0`, a reason of ours, why it was refused, `left` for a client that went away, or `error`
    for a mistake of ours. `gone` fires at its end.
    """

    id: str
    client: str
    queued_at: float
    machine: str | None = None
    started_at: float | None = None
    response_at: float | None = None
    first_byte_at: float | None = None
    ended_at: float | None = None
    bytes: int = 0
    ending: str = "error"
    done: Deferred[None] = field(default_factory=Deferred)


class RunObserver(Protocol):
    """Is told what becomes of requests."""

    def ended(self, run: Run, /) -> None:
        """Note the end of a run, or of a request that waited in vain."""

    def refused(self, reason: str, /) -> None:
        """Note that a request was refused: a word of `Refused`."""


class _Nobody:
    def ended(self, _: Run) -> None:
        pass

    def refused(self, _: str) -> None:
        pass


class RunTracker:
    """
    Keeps count of runs.

    `wall` tells the time in seconds since the epoch; `random` makes identifiers, of 16 hex digits. `watch` is
    told what becomes of requests.
    """

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, wall: Callable[[], float], random: Random, watch: RunObserver | None = None
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._random = random
        self._watch = watch or _Nobody()
        self._under_way: set[Run] = set()
        self._latest: deque[dict[str, object]] = deque(maxlen=LATEST)

    def new_id(self) -> str:
        """Make an identifier that no run has had."""
        return f"{self._random.getrandbits(64):016x}"

    def begin(self, run_id: str, client: str) -> Run:
        """Note that a request has come, and waits for a machine."""
        run = Run(run_id, client, self._clock.seconds())
        self._under_way.add(run)
        return run

    def served(self, run: Run, machine_id: str) -> None:
        """Note that it has a machine that is ready."""
        run.machine, run.started_at = machine_id, self._clock.seconds()

    def refused(self, reason: str) -> None:
        """Note that a request was refused, whether it had come to be a run or not."""
        self._watch.refused(reason)

    def end(self, run: Run) -> None:
        """Note its end; one that had a machine has its line in the log."""
        self._under_way.remove(run)
        run.ended_at = ended = self._clock.seconds()
        self._watch.ended(run)
        served = ended if run.started_at is None else run.started_at
        wait_ms, run_ms = _ms(served - run.queued_at), _ms(ended - served)
        answer_ms, first_ms = (
            None if moment is None else _ms(moment - served)
            for moment in (run.response_at, run.first_byte_at)
        )
        self._latest.append(
            {"run": run.id, "ended": round(self._wall()), "wait_ms": wait_ms, "run_ms": run_ms,
             "ending": run.ending}
        )  # fmt: skip
        if run.machine is not None:
            self._log.info(
                "run {run} of {client} on {machine}: {ending}, {bytes} bytes; waited {wait_ms} ms, answered "
                "after {answer_ms} ms, first byte after {first_ms} ms, ran {run_ms} ms",
                run=run.id, client=run.client, machine=run.machine, ending=run.ending, bytes=run.bytes,
                wait_ms=wait_ms, answer_ms=answer_ms, first_ms=first_ms, run_ms=run_ms,
            )  # fmt: skip
        run.done.callback(None)

    async def wait_idle(self) -> None:
        """Wait until all that are under way now have ended."""
        await DeferredList([run.done for run in self._under_way])

    def status(self) -> dict[str, object]:
        """Tell how many have a machine now, and what became of the latest, newest last."""
        running = sum(run.machine is not None for run in self._under_way)
        return {"running": running, "recent": list(self._latest)}


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
