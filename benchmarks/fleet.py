"""
What a fleet asks of the Machines API, and how long the machines of coordinators that have died are left.

A hundred coordinators of a hundred machines each, in one app and in simulated time: the real pool, the real
client with all its repetitions, the API's rules and Fly's limits in memory (`benchmarks/counted.py`). A fifth
of a pool's machines has runs of 30 to 60 s, one after the other; the others stand by. In turn:

- `start`: all begin at once, in an empty app. How often a second they ask for a list and for machines, and
  after how many seconds each knows which machines there are. Fly allows an app one of each a second, so
  that ten thousand machines take hours.
- `steady`: that is past, the app is full. How often a second it is asked, by action. The baseline `alone` is
  one such coordinator in an app of its own, times as many as there are: what they would ask if they did not
  have to look after each other. `refused` is what of it Fly refuses with 429. `hottest` is how often a second
  the machine that is asked most is asked for one thing; Fly allows one.
- `orphans`: half of the coordinators die at once. After how many seconds each of their machines is gone;
  the baseline is the length of a lease, before the end of which nobody may touch them. And what is asked
  meanwhile.

Rates are of ten seconds each. Run it with `python -m benchmarks.fleet`. COORDINATORS, MACHINES (of each),
LATENCY (seconds of a call, there and back), BOOT and SECONDS (of steady state) can be set.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, globalLogBeginner
from zope.interface import provider

from benchmarks.counted import Book, CountedMachines
from benchmarks.report import Report
from bfaas.machines.api import MachineConfig
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.pool import Pool
from bfaas.pooling.config import PoolConfig, lease_ttl, pool_of
from tests.simulation.clock import HeapClock, NodeClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bfaas.machines.api import Machine

_MAX_REQ_TIME = 60.0
_WINDOW = 10
_FILLED = 150.0
_PATIENCE = 3600.0
_UNKNOWN = "the pool has not listed its machines yet"
_REFUSED = ("refused", "refused list", "refused create", "refused start")
_ACTIONS = (
    "all", "get lease", "refresh lease", "start", "wait", "get", "stop", "create", "destroy", "list",
    *_REFUSED,
)  # fmt: skip


class Coordinator:
    """A pool, and those who ask it for machines."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.knows_at: float | None = None
        self.clock = NodeClock(fleet.heap)
        self._random = Random(name)  # noqa: S311 - a run is to be the same each time
        api = CountedMachines(self.clock, self._random, fleet.machines, fleet.book, fleet.latency)
        self._size = fleet.size
        settings = PoolConfig(
            name=name, size=fleet.size, region="ams", template=MachineConfig("basher:1"),
            max_req_time=_MAX_REQ_TIME, lease_ttl=lease_ttl(_MAX_REQ_TIME),
            standby=fleet.size - fleet.size // 5,
        )  # fmt: skip
        self.pool = Pool(api, self, self.clock, self._random, settings)

    def begin_runs(self) -> None:
        """Let a fifth of the machines be in use from now on."""
        for _ in range(self._size // 5):
            Deferred.fromCoroutine(self._run_on_and_on())

    async def _run_on_and_on(self) -> None:
        while True:
            allocation = await self.pool.allocate("client")
            await deferLater(self.clock, self._random.uniform(0.5, 1.0) * _MAX_REQ_TIME)
            allocation.release()

    async def wait_until_ready(self, machine: Machine) -> None:  # noqa: ARG002 - the same for all
        """Wait as a pool's probe does."""
        await deferLater(self.clock, 0.02)


class Fleet:
    """Coordinators that share an app."""

    def __init__(self, coordinators: int, size: int, latency: float, boot: float) -> None:
        self.heap = HeapClock()
        self._windows = 0
        self.size = size
        self.latency = latency
        clock = NodeClock(self.heap)
        self.book = Book(clock)
        timing = Timing(boot=boot, stop=0.3, stop_cooldown=0.4)
        random = Random(1)  # noqa: S311 - a run is to be the same each time
        self.machines = EmulatedMachines(clock, lambda: 1e9 + self.heap.now, timing=timing, random=random)
        self.coordinators = [Coordinator(self, f"c{number}") for number in range(coordinators)]

    def begin(self) -> None:
        """Let all begin at once."""
        for coordinator in self.coordinators:
            coordinator.pool.start()

    def run(self, seconds: float) -> None:
        """Let time pass. Most garbage is collected while it is young: to go through all takes seconds."""
        end = self.heap.now + seconds
        while self.heap.now < end:
            self.heap.run_until(min(end, self.heap.now + _WINDOW))
            self._windows += 1
            gc.collect(1 if self._windows % 10 else 2)

    def fill(self) -> None:
        """Let it come to rest with all its machines, as if limits had not been in the way."""
        self.book.enforced = False
        self.begin()
        self.run(1.0)
        for coordinator in self.coordinators:
            coordinator.begin_runs()
        self.run(_FILLED)
        self.book.enforced = True
        gc.freeze()

    def rates(self, action: str, since: float) -> list[float]:
        """Tell how often a second the API was asked for something since then, window by window."""
        windows = range(int(since), int(self.heap.now) - _WINDOW + 1, _WINDOW)
        asked = self.book.asked
        return [sum(asked[second, action] for second in range(at, at + _WINDOW)) / _WINDOW for at in windows]

    def hottest(self, since: Counter[tuple[str, str]], seconds: float) -> Iterator[tuple[str, float]]:
        """Tell for each action how often a second the machine was asked for it that was asked most."""
        most: Counter[str] = Counter()
        for (action, machine_id), count in (self.book.of_machine - since).items():
            if machine_id:
                most[action] = max(most[action], count)
        for action, count in most.most_common():
            yield action, count / seconds


def measure(coordinators: int, size: int, latency: float, boot: float, seconds: float) -> Report:
    """Measure a fleet's start, so many seconds of its life, and the end of half of it."""
    gc.disable()
    report = Report("fleet")
    report.notes.append(
        f"{coordinators} coordinators of {size} machines; {latency:g} s a call, {boot:g} s a boot, leases of "
        f"{lease_ttl(_MAX_REQ_TIME)} s"
    )
    said = _count_warnings()
    _start(report, Fleet(coordinators, size, latency, boot))
    alone, fleet = Fleet(1, size, latency, boot), Fleet(coordinators, size, latency, boot)
    for each in (alone, fleet):
        each.fill()
        said.clear()
        asked_before = each.book.of_machine.copy()
        each.run(seconds)
    since = fleet.heap.now - seconds
    for action in _ACTIONS:
        without = [coordinators * rate for rate in alone.rates(action, since)]
        if any(without):
            report.add(f"alone: {action}", "/s", without)
        if any(rates := fleet.rates(action, since)):
            report.add(f"steady: {action}", "/s", rates, *([f"alone: {action}"] if any(without) else []))
    ready = sum(coordinator.pool.not_ready_reason is None for coordinator in fleet.coordinators)
    report.notes.append(f"steady: {ready} of {coordinators} ready; sweeps not done: {dict(said) or 'none'}")
    for action, rate in fleet.hottest(asked_before, seconds):
        report.add(f"hottest: {action}", "/s", [rate])
    _let_half_die(report, fleet)
    return report


def _start(report: Report, fleet: Fleet) -> None:
    fleet.begin()
    for coordinator in fleet.coordinators:
        coordinator.begin_runs()
    while waiting := [each for each in fleet.coordinators if each.knows_at is None]:
        fleet.run(1.0)
        for coordinator in waiting:
            if coordinator.pool.not_ready_reason != _UNKNOWN:
                coordinator.knows_at = fleet.heap.now
    report.add("start: knows after", "s", [each.knows_at or 0.0 for each in fleet.coordinators])
    fleet.run(60.0)
    report.notes.append(f"start: {len(fleet.book.there())} machines after {fleet.heap.now:g} s")
    for action in ("all", "list", "create", *_REFUSED[:3]):
        report.add(f"start: {action}", "/s", fleet.rates(action, 0))


def _let_half_die(report: Report, fleet: Fleet) -> None:
    """Stop the clocks of half of the coordinators, and wait until their machines are gone."""
    died = fleet.heap.now
    dead = {coordinator.name for coordinator in fleet.coordinators[::2]}
    for coordinator in fleet.coordinators[::2]:
        coordinator.clock.dead = True
    orphans = {machine_id for machine_id, name in fleet.book.there() if pool_of(name) in dead}
    while fleet.heap.now < died + _PATIENCE and not orphans <= fleet.book.destroyed.keys():
        fleet.run(_WINDOW)
    gone = [fleet.book.destroyed[orphan] - died for orphan in orphans & fleet.book.destroyed.keys()]
    report.notes.append(f"orphans: {len(gone)} of {len(orphans)} gone after {fleet.heap.now - died:g} s")
    report.add("lease", "s", [lease_ttl(_MAX_REQ_TIME)])
    if gone:
        report.add("orphans: gone after", "s", gone, "lease")
    for action in ("all", "get lease", "get", "destroy", "refused"):
        report.add(f"orphans: {action}", "/s", fleet.rates(action, died))


def _count_warnings() -> Counter[str]:
    """Count the sweeps that are not done, by why; nothing else that is logged is told."""
    said: Counter[str] = Counter()

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event.get("log_format") == "reconciliation failed: {error}":
            said[type(event["error"]).__name__] += 1

    globalLogBeginner.beginLoggingTo([observe], redirectStandardIO=False, discardBuffer=True)
    return said


def main() -> None:
    """Measure and tell."""
    coordinators, size = int(os.environ.get("COORDINATORS", "100")), int(os.environ.get("MACHINES", "100"))
    latency, boot = float(os.environ.get("LATENCY", "0.05")), float(os.environ.get("BOOT", "1"))
    report = measure(coordinators, size, latency, boot, float(os.environ.get("SECONDS", "320")))
    report.write()


if __name__ == "__main__":
    main()
