"""Load from several clients at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def rate(work: Callable[[], object], loops: int, seconds: float, warm_up: float = 0.0) -> float:
    """Call something in parallel loops; return the calls that end per second, after `warm_up` seconds."""
    window_start = time.monotonic() + warm_up

    def loop() -> int:
        done = 0
        while True:
            work()
            now = time.monotonic()
            if now >= window_start + seconds:
                return done
            done += now >= window_start

    with ThreadPoolExecutor(loops) as threads:
        return sum(threads.map(lambda _: loop(), range(loops))) / seconds
