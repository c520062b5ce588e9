"""
A span of time that work is run under, and what its end looks like.

Deadlines are absolute: made once, then handed down, so that the steps of one piece of work share its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from twisted.internet.interfaces import IReactorTime

T = TypeVar("T")

_INSTANT = 1e-6  # seconds: a timer so short may leave the clock where it is


class DeadlineExceededError(Exception):
    """Time ran out, and the work was cancelled."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not done after {seconds:g} s")
        self.seconds = seconds


class Deadline:
    """A moment, `seconds` from now on the clock."""

    def __init__(self, clock: IReactorTime, seconds: float) -> None:
        self._clock = clock
        self.seconds = seconds
        self._at = clock.seconds() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left; 0 when there are none, or less than a clock can tell."""
        left = self._at - self._clock.seconds()
        return left if left > _INSTANT else 0.0

    async def run(self, work: Coroutine[Deferred[Any], Any, T] | Deferred[T]) -> T:
        """
        Wait for the work; cancel it when the time is up, and raise `DeadlineExceededError`.

        What the work raises while it is being cancelled is raised here: only plain cancellation becomes
        the deadline's error. Cancelling this cancels the work. A coroutine that cleans up behind an
        `await` is waited for, beyond the deadline.
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
