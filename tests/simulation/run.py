"""
Runs many episodes, in as many processes as there are processors.

`python -m tests.simulation.run 1000` runs the first thousand; `--from 5000` starts at another seed.
Failures are printed with their seed; `--seed 123` runs one episode and prints its history.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twisted.logger import globalLogBeginner

from tests.simulation.world import FAULTS, World

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH = 32
_LIFETIME = 16  # batches in one process
_OFTEN = 5000  # episodes after which it tells how far it is
_MANY = 300  # episodes in which every fault strikes at least once


@dataclass
class Lived:
    """What became of some episodes."""

    seeds: int = 0
    hours: float = 0.0
    calls: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Lived) -> None:
        """Count some more."""
        self.seeds += other.seeds
        self.hours += other.hours
        self.calls += other.calls
        self.marks += other.marks
        self.endings += other.endings
        self.failures += other.failures


def quiet() -> None:
    """
    Let nobody but the worlds hear the log, and collect no garbage.

    What an episode leaves is about a megabyte: a process ends before it is too much.
    """
    globalLogBeginner.beginLoggingTo([], discardBuffer=True, redirectStandardIO=False)
    gc.disable()


def live(seeds: range) -> Lived:
    """Live through some episodes."""
    lived = Lived(len(seeds))
    for seed in seeds:
        world = World(seed, lived.marks)
        try:
            world.live()
        except Exception as error:  # noqa: BLE001 - a broken promise or a broken program, both are told
            lived.failures.append(f"seed {seed}: {error!r}")
        lived.hours += world.clock.now / 3600
        lived.calls += world.ledger.calls
        lived.endings += world.endings
    return lived


def live_all(first: int, count: int) -> Iterator[Lived]:
    """Live through many, in batches."""
    seeds = range(first, first + count)
    batches = [seeds[begin : begin + _BATCH] for begin in range(0, count, _BATCH)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), quiet, maxtasksperchild=_LIFETIME) as pool:
        yield from pool.imap_unordered(live, batches)


def replay(seed: int) -> int:
    """Live through one episode, and tell its history."""
    quiet()
    world = World(seed, trace=True)
    assert world.trace is not None
    status = 0
    try:
        world.live()
    except Exception as error:  # noqa: BLE001 - what it is is told
        world.trace.append(f"{error!r}")
        status = 1
    print("\n".join([*world.trace, f"{world}"]))
    return status


def main() -> int:
    """Tell what became of it all; the exit code is 1 where a promise was broken or a fault never struck."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    began, lived = time.monotonic(), Lived()
    for batch in live_all(arguments.first, arguments.count):
        lived.add(batch)
        for failure in batch.failures:
            print(failure, flush=True)
        if lived.seeds // _OFTEN > (lived.seeds - batch.seeds) // _OFTEN:
            print(f"... {lived.seeds} seeds, {len(lived.failures)} broken", flush=True)
    unmarked = sorted(set(FAULTS) - set(lived.marks))
    took = time.monotonic() - began
    endings = ", ".join(f"{name} {count}" for name, count in lived.endings.most_common())
    strikes = ", ".join(f"{name} {lived.marks[name]}" for name in FAULTS)
    print(f"{lived.seeds} seeds, {lived.hours:,.0f} hours, {lived.calls:,} calls, {took:.0f} s")
    print(f"endings: {endings}")
    print(f"faults: {strikes}")
    print(f"{len(lived.failures)} broken; never struck: {' '.join(unmarked) or 'none'}")
    return 1 if lived.failures or (unmarked and lived.seeds >= _MANY) else 0


if __name__ == "__main__":
    sys.exit(main())
