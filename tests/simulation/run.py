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

_BATCH_SIZE = 32  # episodes
_BATCHES_PER_PROCESS = 16
_REPORT_EVERY = 5000  # episodes
_ALL_FAULTS_WITHIN = 300  # episodes in which every fault must occur at least once


@dataclass
class Summary:
    """The results of some episodes."""

    episodes: int = 0
    hours: float = 0.0
    calls: int = 0
    fault_counts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Summary) -> None:
        """Add the results of more episodes."""
        self.episodes += other.episodes
        self.hours += other.hours
        self.calls += other.calls
        self.fault_counts += other.fault_counts
        self.outcomes += other.outcomes
        self.failures += other.failures


def prepare_process() -> None:
    """
    Discard the log, except for the worlds' observers, and switch garbage collection off.

    An episode leaves about a megabyte of garbage: processes are replaced before it becomes too much.
    """
    globalLogBeginner.beginLoggingTo([], discardBuffer=True, redirectStandardIO=False)
    gc.disable()


def run_episodes(seeds: range) -> Summary:
    """Run episodes one after the other."""
    summary = Summary(len(seeds))
    for seed in seeds:
        world = World(seed, summary.fault_counts)
        try:
            world.run_episode()
        except Exception as error:  # noqa: BLE001 - a violated invariant or any other error
            summary.failures.append(f"seed {seed}: {error!r}")
        summary.hours += world.clock.now / 3600
        summary.calls += world.oracle.calls
        summary.outcomes += world.outcomes
    return summary


def run_batches(first: int, count: int) -> Iterator[Summary]:
    """Run episodes in parallel; yield the results in batches."""
    seeds = range(first, first + count)
    batches = [seeds[start : start + _BATCH_SIZE] for start in range(0, count, _BATCH_SIZE)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), prepare_process, maxtasksperchild=_BATCHES_PER_PROCESS) as pool:
        yield from pool.imap_unordered(run_episodes, batches)


def replay(seed: int) -> int:
    """Run one episode and print its history; return the exit status."""
    prepare_process()
    world = World(seed, trace=True)
    assert world.trace is not None
    status = 0
    try:
        world.run_episode()
    except Exception as error:  # noqa: BLE001 - it is printed
        world.trace.append(f"{error!r}")
        status = 1
    print("\n".join([*world.trace, f"{world}"]))
    return status


def main() -> int:
    """Run episodes, print a summary; return 1 if one failed, or if a fault never occurred."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    started_at, summary = time.monotonic(), Summary()
    for batch in run_batches(arguments.first, arguments.count):
        summary.add(batch)
        for failure in batch.failures:
            print(failure, flush=True)
        if summary.episodes // _REPORT_EVERY > (summary.episodes - batch.episodes) // _REPORT_EVERY:
            print(f"... {summary.episodes} episodes, {len(summary.failures)} failed", flush=True)
    missing = sorted(set(FAULTS) - set(summary.fault_counts))
    seconds = time.monotonic() - started_at
    outcomes = ", ".join(f"{name} {count}" for name, count in summary.outcomes.most_common())
    faults = ", ".join(f"{name} {summary.fault_counts[name]}" for name in FAULTS)
    print(
        f"{summary.episodes} episodes, {summary.hours:,.0f} simulated hours, "
        f"{summary.calls:,} API calls, {seconds:.0f} s"
    )
    print(f"outcomes: {outcomes}")
    print(f"faults: {faults}")
    print(f"{len(summary.failures)} failed; faults that never occurred: {' '.join(missing) or 'none'}")
    return 1 if summary.failures or (missing and summary.episodes >= _ALL_FAULTS_WITHIN) else 0


if __name__ == "__main__":
    sys.exit(main())
