"""
Rate limits of the Machines API.

Each action on each machine (for create and list: on the app) has its own limit: one call a second, in
bursts of up to three; for get, five a second, in bursts of up to ten
(https://fly.io/docs/machines/api/working-with-machines-api/#rate-limits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bfaas.machines.api import RateLimitedError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


class _Rate(NamedTuple):
    per_second: float
    burst: float


_DEFAULT_RATE = _Rate(1.0, 3.0)
_RATES = {"get": _Rate(5.0, 10.0)}


class Unlimited:
    """Allows every call."""

    def acquire(self, action: str, machine_id: str = "") -> None:
        """Allow a call."""


class RateLimiter(Unlimited):
    """Token buckets, one for each action and machine."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}  # tokens, and when they were counted

    def acquire(self, action: str, machine_id: str = "") -> None:
        """Take a token for a call. Raises `RateLimitedError` if none is left."""
        rate = _RATES.get(action, _DEFAULT_RATE)
        now = self._clock.seconds()
        tokens, counted_at = self._buckets.get((action, machine_id), (rate.burst, now))
        tokens = min(rate.burst, tokens + rate.per_second * (now - counted_at))
        allowed = tokens >= 1
        self._buckets[action, machine_id] = (tokens - 1 if allowed else tokens, now)
        if not allowed:
            raise RateLimitedError("rate limit exceeded")
