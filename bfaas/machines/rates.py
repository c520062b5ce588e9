"""
How often the Machines API may be asked.

For each action and machine (for creations and lists: the app), once a second and three times in a burst
(https://fly.io/docs/machines/api/working-with-machines-api/#rate-limits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfaas.machines.api import RateLimitedError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


class NoLimits:
    """Lets everything through."""

    def take(self, action: str, machine_id: str = "", rate: float = 1, burst: float = 3) -> None:
        """Let it through."""


class RateLimits(NoLimits):
    """A token bucket for each action and machine."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}

    def take(self, action: str, machine_id: str = "", rate: float = 1, burst: float = 3) -> None:
        """Take a token; `rate` are added a second, up to `burst`. Raises `RateLimitedError`."""
        now = self._clock.seconds()
        tokens, since = self._buckets.get((action, machine_id), (burst, now))
        tokens = min(burst, tokens + rate * (now - since))
        allowed = tokens >= 1
        self._buckets[action, machine_id] = (tokens - 1 if allowed else tokens, now)
        if not allowed:
            raise RateLimitedError("rate limit exceeded")
