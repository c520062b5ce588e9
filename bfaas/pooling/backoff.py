"""Delays after failures in one pool: jittered, and cut short when the pool closes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

from bfaas.backoff import BackoffSchedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from twisted.internet.interfaces import IDelayedCall, IReactorTime


class JitteredBackoff:
    """
    The delays between attempts of one pool.

    After `expedite`, sleeps are short, because a closing pool waits for them.
    """

    _SCHEDULE = BackoffSchedule(initial=0.05, maximum=30.0)
    _MAX_EXPEDITED_DELAY = 0.5

    def __init__(self, clock: IReactorTime, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._timers: dict[IDelayedCall, None] = {}
        self._expedited = False

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after a failure, given the number of failures in a row before it."""
        return self._SCHEDULE.delay(failures, self._random)

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, or until `expedite`; after `expedite`, for at most half a second."""
        done: Deferred[None] = Deferred()
        timer = self._clock.callLater(
            min(seconds, self._MAX_EXPEDITED_DELAY) if self._expedited else seconds, done.callback, None
        )
        self._timers[timer] = None
        try:
            await done
        finally:
            del self._timers[timer]
            if timer.active():
                timer.cancel()

    def expedite(self) -> None:
        """End all sleeps now, and keep later ones short."""
        self._expedited = True
        for timer in self._timers:
            timer.reset(0.0)


class Backoff:
    """
    Pauses an activity of the pool, such as the creation of machines, after a failure.

    `callback` is called when the pause is over.
    """

    def __init__(self, clock: IReactorTime, delays: JitteredBackoff, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._delays = delays
        self._callback = callback
        self._failures = 0
        self._timer: IDelayedCall | None = None
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether the activity is paused."""
        return self._timer is not None and self._timer.active()

    def failed(self) -> None:
        """Start a pause, unless one is active: failures at the same time count once."""
        if not self.active and not self._closed:
            self._timer = self._clock.callLater(self._delays.delay(self._failures), self._callback)
            self._failures += 1

    def succeeded(self) -> None:
        """Reset the delay: the next pause is short."""
        self._failures = 0

    def close(self) -> None:
        """Cancel the pause and start no more; the callback is not called again."""
        self._closed = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
