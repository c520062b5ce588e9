"""
Lives through many episodes, in as many processes as there are processors.

`python -m tests.sim.run 1000` lives through the first thousand; `--from 5000` begins elsewhere. What fails is
told with its seed, and `--seed 123` lives through that one alone and tells its history.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from twisted.logger import globalLogBeginner

from tests.sim.world import FAULTS, World

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH = 25


class Batch(NamedTuple):
    """What became of some episodes."""

    seeds: int
    hours: float
    calls: int
    marks: Counter[str]
    endings: Counter[str]
    failures: list[str]


def quiet() -> None:
    """Let nobody but the worlds hear the log, and collect garbage between episodes only."""
    globalLogBeginner.beginLoggingTo([], discardBuffer=True, redirectStandardIO=False)
    gc.disable()


def live(seeds: range) -> Batch:
    """Live through some episodes."""
    gc.collect()
    hours, calls, failures = 0.0, 0, []
    marks: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, marks)
        try:
            world.live()
        except Exception as error:  # noqa: BLE001 - a broken promise or a broken program, both are told
            failures.append(f"seed {seed}: {error!r}")
        hours += world.clock.now / 3600
        calls += world.ledger.calls
        endings += world.endings
    return Batch(len(seeds), hours, calls, marks, endings, failures)


def live_all(first: int, count: int) -> Iterator[Batch]:
    """Live through many, in batches."""
    seeds = range(first, first + count)
    batches = [seeds[begin : begin + _BATCH] for begin in range(0, count, _BATCH)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), quiet) as pool:
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
    print("\n".join([*world.trace, f"{world}"]))  # noqa: T201
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
    began = time.monotonic()
    all_of_it = Batch(0, 0.0, 0, Counter(), Counter(), [])
    for batch in live_all(arguments.first, arguments.count):
        all_of_it = Batch(*[one + more for one, more in zip(all_of_it, batch, strict=True)])
        for failure in batch.failures:
            print(failure, flush=True)  # noqa: T201
    seeds, hours, calls, marks, endings, failures = all_of_it
    unmarked = sorted(set(FAULTS) - set(marks))
    print(f"{seeds} seeds, {hours:,.0f} hours, {calls:,} calls, {time.monotonic() - began:.0f} s")  # noqa: T201
    print("endings:", ", ".join(f"{name} {count}" for name, count in endings.most_common()))  # noqa: T201
    print("faults:", ", ".join(f"{name} {marks[name]}" for name in FAULTS))  # noqa: T201
    print(f"{len(failures)} broken, {len(unmarked)} faults never struck: {' '.join(unmarked)}")  # noqa: T201
    return 1 if failures or unmarked else 0


if __name__ == "__main__":
    sys.exit(main())
