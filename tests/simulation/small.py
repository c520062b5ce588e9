"""
A small world, lived through in every way: one request, two machines, every outcome of the first API calls.

`python -m tests.simulation.small 6` takes every path through the first six calls; each call that is made
has one of seven outcomes, so that there are up to 117,649 paths.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING

from tests.simulation.ledger import BrokenPromiseError
from tests.simulation.run import quiet
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.nodes import Node

OUTCOMES = ("fine", "500", "429", "lost-answer", "hangs", "hangs-after", "zombie-call")

_PATIENCE = 620.0
"""Seconds after which what came of the first calls is over: a create may take 90, six times, and then 60."""


class SmallWorld(World):
    """One pool of two, in which nothing goes wrong but what the path says of the first calls."""

    def __init__(self, path: tuple[int, ...], depth: int) -> None:
        super().__init__(1)
        self.rates, self.events, self.traits, self.how = {}, {}, set(), []
        self.max_req_time, self.max_wait, self.max_queue, self.max_per_client = 2.0, 30.0, 100, 20
        self.taken: list[int] = []
        self._path = path
        self._depth = depth

    def strikes(self) -> frozenset[str]:
        """Let a call have the outcome that the path says; where it says nothing, the first."""
        if len(self.taken) >= self._depth:
            return frozenset()
        place = len(self.taken)
        self.taken.append(self._path[place] if place < len(self._path) else 0)
        return frozenset({OUTCOMES[self.taken[-1]]})

    def live(self) -> None:
        """Have one request, then see that both machines serve, and that nothing is left."""
        node: Node = self._start_node("p", 2)
        self._run(0.2)
        self._send(node, 1, 0.1, 0)
        self._run(_PATIENCE)
        self._heal()
        self._check_service()
        self._run(2.0)
        self._check_end()
        if self.broken:
            raise BrokenPromiseError(self.broken[0])


def below(path: tuple[int, ...], depth: int) -> Iterator[str | None]:
    """Take every path that begins so; for each, tell the promise that it broke."""
    first = path
    for number in itertools.count():
        if number % 256 == 0:
            gc.collect()  # worlds are full of cycles, and nothing else collects them here
        world = SmallWorld(path, depth)
        try:
            world.live()
        except BrokenPromiseError as error:
            yield f"path {[OUTCOMES[outcome] for outcome in world.taken]}: {error}"
        else:
            yield None
        taken = world.taken
        while len(taken) > len(first) and taken[-1] == len(OUTCOMES) - 1:
            taken.pop()
        if len(taken) <= len(first):
            return
        path = (*taken[:-1], taken[-1] + 1)


def _explore(job: tuple[tuple[int, ...], int]) -> tuple[int, list[str]]:
    outcomes = list(below(*job))
    return len(outcomes), [outcome for outcome in outcomes if outcome]


def explore(depth: int) -> tuple[int, list[str]]:
    """Take every path through the first calls; tells how many there are, and which broke what."""
    jobs = [((one, two), depth) for one in range(len(OUTCOMES)) for two in range(len(OUTCOMES))]
    paths, broken = 0, []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), quiet) as pool:
        for count, failures in pool.imap_unordered(_explore, jobs):
            paths += count
            broken += failures
    return paths, broken


if __name__ == "__main__":
    began = time.monotonic()
    paths, broken = explore(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
    print("\n".join(broken[:20]))
    print(f"{paths:,} paths, {len(broken)} broken, {time.monotonic() - began:.0f} s")
    sys.exit(bool(broken))
