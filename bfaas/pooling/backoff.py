"""Pauses after failures, longer the more there were in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from twisted.internet.interfaces import IDelayedCall, IReactorTime


class Pauses:
    """Pauses of one pool: jittered, so that pools do not march in step; short once it has to hurry."""

    _SHORTEST, _LONGEST = 0.05, 30.0
    _HURRIED = 0.5

    def __init__(self, clock: IReactorTime, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._naps: dict[IDelayedCall, None] = {}
        self._hurries = False

    def after(self, failures: int) -> float:
        """Choose the seconds to wait after so many failures before this one."""
        longest = min(self._LONGEST, self._SHORTEST * 2.0 ** min(failures, 30))
        return longest * self._random.uniform(0.5, 1.0)

    async def nap(self, seconds: float) -> None:
        """Sleep; not long, and not on, while there is a hurry."""
        done: Deferred[None] = Deferred()
        longest = self._HURRIED if self._hurries else seconds
        nap = self._clock.callLater(min(seconds, longest), done.callback, None)
        self._naps[nap] = None
        try:
            await done
        finally:
            del self._naps[nap]
            if nap.active():
                nap.cancel()

    def hurry(self) -> None:
        """End all naps."""
        self._hurries = True
        for nap in self._naps:
            nap.reset(0.0)


class Backoff:
    """
    Holds something back after it failed; `again` is called when the pause is over.

    `pause` chooses the seconds, by the number of failures in a row before.
    """

    def __init__(self, clock: IReactorTime, pause: Callable[[int], float], again: Callable[[], None]) -> None:
        self._clock = clock
        self._pause = pause
        self._again = again
        self._failures = 0
        self._timer: IDelayedCall | None = None
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether it is to be held back now."""
        return self._timer is not None and self._timer.active()

    def failed(self) -> None:
        """Begin a pause, unless one is under way: what fails together counts once."""
        if not self.active and not self._closed:
            self._timer = self._clock.callLater(self._pause(self._failures), self._again)
            self._failures += 1

    def succeeded(self) -> None:
        """Let the next pause be short."""
        self._failures = 0

    def close(self) -> None:
        """Call nobody any more."""
        self._closed = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
