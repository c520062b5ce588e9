"""
Exhaustive search: one request, two machines, and every combination of outcomes of the first API calls.

`python -m tests.simulation.exhaustive 6` takes every path through the first six calls; each call has one of
seven outcomes, so that there are up to 117,649 paths.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING

from tests.simulation.oracle import InvariantError
from tests.simulation.run import prepare_process
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTCOMES = ("success", "500", "429", "lost-response", "hangs", "hangs-after-execution", "late-execution")

_SETTLE_TIME = 620.0
"""Seconds after which the first calls have no more effect: six creates of up to 90 s each, and 60 s."""


class ExhaustiveWorld(World):
    """One pool of two machines, without faults except the outcomes of the first `depth` calls."""

    def __init__(self, path: tuple[int, ...], depth: int) -> None:
        super().__init__(1)
        self.rates, self.events, self.traits, self.script_faults = {}, {}, set(), []
        self.max_req_time, self.max_wait, self.max_queue, self.max_per_client = 2.0, 30.0, 100, 20
        self.taken: list[int] = []
        self._path = path
        self._depth = depth

    def call_faults(self) -> frozenset[str]:
        """Return the next outcome of the path; beyond its end, the first outcome."""
        if len(self.taken) >= self._depth:
            return frozenset()
        index = len(self.taken)
        self.taken.append(self._path[index] if index < len(self._path) else 0)
        return frozenset({OUTCOMES[self.taken[-1]]})

    def run_episode(self) -> None:
        """Send one request, then check that both machines serve, and that nothing is left over."""
        node = self._start_node("p", 2)
        self._advance(0.2)
        self._send(node, 1, 0.1, 0)
        self._advance(_SETTLE_TIME)
        self._heal()
        self._check_service()
        self._advance(2.0)
        self._check_shutdown()
        if self.violations:
            raise InvariantError(self.violations[0])


def explore(prefix: tuple[int, ...], depth: int) -> Iterator[str | None]:
    """Take every path with a prefix, in order; yield its violation or None."""
    path = prefix
    for number in itertools.count():
        if number % 256 == 0:
            gc.collect()  # worlds are full of reference cycles, and automatic collection is off
        world = ExhaustiveWorld(path, depth)
        try:
            world.run_episode()
        except InvariantError as error:
            yield f"path {[OUTCOMES[outcome] for outcome in world.taken]}: {error}"
        else:
            yield None
        taken = world.taken
        while len(taken) > len(prefix) and taken[-1] == len(OUTCOMES) - 1:
            taken.pop()
        if len(taken) <= len(prefix):
            return
        path = (*taken[:-1], taken[-1] + 1)


def _run_job(job: tuple[tuple[int, ...], int]) -> tuple[int, list[str]]:
    results = list(explore(*job))
    return len(results), [violation for violation in results if violation]


def explore_all(depth: int) -> tuple[int, list[str]]:
    """Take every path in parallel; return the number of paths and the violations."""
    jobs = [((first, second), depth) for first in range(len(OUTCOMES)) for second in range(len(OUTCOMES))]
    paths, violations = 0, []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), prepare_process) as pool:
        for count, found in pool.imap_unordered(_run_job, jobs):
            paths += count
            violations += found
    return paths, violations


def main() -> int:
    """Search, print a summary; return 1 if an invariant was violated."""
    started_at = time.monotonic()
    paths, violations = explore_all(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
    print("\n".join(violations[:20]))
    print(f"{paths:,} paths, {len(violations)} failed, {time.monotonic() - started_at:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
