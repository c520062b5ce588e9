"""
How often the Machines API may be asked.

For each action and machine (for creations and lists: the app), once a second and three times in a burst; to
look at a machine more often (https://fly.io/docs/machines/api/working-with-machines-api/#rate-limits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfaas.machines.api import RateLimitedError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


_USUALLY = (1.0, 3.0)
_RATES = {"get": (5.0, 10.0)}
"""Calls a second, and in a burst, by action."""


class Unlimited:
    """Lets everything through."""

    def acquire(self, action: str, machine_id: str = "") -> None:
        """Let it through."""


class RateLimiter(Unlimited):
    """A token bucket for each action and machine."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}

    def acquire(self, action: str, machine_id: str = "") -> None:
        """Take a token. Raises `RateLimitedError` where there is none."""
        rate, burst = _RATES.get(action, _USUALLY)
        now = self._clock.seconds()
        tokens, since = self._buckets.get((action, machine_id), (burst, now))
        tokens = min(burst, tokens + rate * (now - since))
        allowed = tokens >= 1
        self._buckets[action, machine_id] = (tokens - 1 if allowed else tokens, now)
        if not allowed:
            raise RateLimitedError("rate limit exceeded")
