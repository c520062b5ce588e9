"""Pauses after failures, longer the more there were in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IDelayedCall, IReactorTime


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
    def pauses(self) -> bool:
        """Whether it is to be held back now."""
        return self._timer is not None and self._timer.active()

    def failed(self) -> None:
        """Begin a pause, unless one is under way: what fails together counts once."""
        if not self.pauses and not self._closed:
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
