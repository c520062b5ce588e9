"""
Deadlines for asynchronous work.

A deadline is a fixed time. It is created once and passed on, so that all steps of the work share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from twisted.internet.interfaces import IReactorTime
    from twisted.python.failure import Failure

T = TypeVar("T")

_MIN_DELAY = 1e-6
"""Seconds. During a shorter timer the clock may not advance."""


def ignore_cancellation(failure: Failure) -> None:
    """Errback of background work: ignore its cancellation, pass on any other failure."""
    failure.trap(CancelledError)


class DeadlineExceededError(Exception):
    """The work was cancelled at its deadline."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not done after {seconds:g} s")
        self.seconds = seconds


class Deadline:
    """A time, `seconds` from now on the clock."""

    def __init__(self, clock: IReactorTime, seconds: float) -> None:
        self._clock = clock
        self.seconds = seconds
        self._at = clock.seconds() + seconds

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 if it has passed or is closer than the resolution of a clock."""
        remaining = self._at - self._clock.seconds()
        return remaining if remaining > _MIN_DELAY else 0.0

    async def run(self, work: Coroutine[Deferred[Any], Any, T] | Deferred[T]) -> T:
        """
        Wait for the work. Cancel it at the deadline, and raise `DeadlineExceededError`.

        An error that the work raises while it is cancelled is raised unchanged. Cancelling `run` cancels the
        work. The cleanup of the work is awaited, even beyond the deadline.
        """
        task = work if isinstance(work, Deferred) else Deferred.fromCoroutine(work)
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            task.cancel()

        timer = self._clock.callLater(self.remaining, expire)
        try:
            return await task
        except CancelledError:
            if expired:
                raise DeadlineExceededError(self.seconds) from None
            raise
        finally:
            if timer.active():
                timer.cancel()
