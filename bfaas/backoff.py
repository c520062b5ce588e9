"""Exponential backoff: the delays between attempts that fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

_MAX_EXPONENT = 100  # avoids an OverflowError


@dataclass(frozen=True)
class BackoffSchedule:
    """Delays in seconds that grow from `initial` by `factor` after each failure, up to `maximum`."""

    initial: float
    maximum: float
    factor: float = 2.0

    def delay(self, failures: int, random: Random | None = None) -> float:
        """
        Return the seconds to wait after a failure, given the number of failures in a row before it.

        With `random`, the delay is jittered: between half of the scheduled delay and all of it, so that
        clients which failed together do not retry together.
        """
        delay = min(self.maximum, self.initial * self.factor ** min(failures, _MAX_EXPONENT))
        return delay if random is None else delay * random.uniform(0.5, 1.0)
