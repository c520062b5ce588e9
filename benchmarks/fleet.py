"""
Calls of a fleet to the Machines API, and how long the machines of crashed coordinators remain.

A hundred coordinators with a hundred machines each share an app, in simulated time: the real pool, the real
client with all its retries, the API's rules and Fly's rate limits in memory
(`benchmarks/counting_machines.py`). A fifth of a pool's machines has runs of 30 to 60 s, one after the
other; the others are warm standbys. The phases:

- `start`: all coordinators start at once, in an empty app: the rates of list and create calls, and the
  seconds until each coordinator has listed its machines. Fly allows an app one of each call per second, so
  that ten thousand machines take hours.
- `steady`: the app is full: the rates of calls, by action. The baseline `alone` is the rate of one
  coordinator in an app of its own, multiplied by the number of coordinators: the calls without
  reconciliation of other pools' machines. `rejected` is the rate of 429 responses. `hottest` is the rate of
  one action on the machine that gets it most often; Fly allows one per second.
- `orphans`: half of the coordinators crash at once: the seconds until each of their machines is gone, with
  the length of a lease as the baseline, since no other coordinator may touch them before its end; and the
  rates of calls meanwhile.

Rates are over ten seconds each. Run it with `python -m benchmarks.fleet`. COORDINATORS, MACHINES (of each),
LATENCY (seconds of a call's round trip), BOOT and SECONDS (of steady state) can be set.
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

from benchmarks.counting_machines import CallLog, CountingMachines
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
_FILL_TIME = 150.0
_TIMEOUT = 3600.0
_NOT_LISTED = "the pool has not listed its machines yet"
_REJECTED = ("rejected", "rejected list", "rejected create", "rejected start")
_ACTIONS = (
    "all", "get lease", "refresh lease", "start", "wait", "get", "stop", "create", "destroy", "list",
    *_REJECTED,
)  # fmt: skip


class Coordinator:
    """A pool, and requests that use its machines."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.listed_at: float | None = None
        self.clock = NodeClock(fleet.heap)
        self._random = Random(name)  # noqa: S311 - repeatable
        api = CountingMachines(self.clock, self._random, fleet.machines, fleet.calls, fleet.latency)
        self._size = fleet.size
        settings = PoolConfig(
            name=name, size=fleet.size, region="ams", template=MachineConfig("basher:1"),
            max_req_time=_MAX_REQ_TIME, lease_ttl=lease_ttl(_MAX_REQ_TIME),
            standby=fleet.size - fleet.size // 5,
        )  # fmt: skip
        self.pool = Pool(api, self, self.clock, self._random, settings)

    def start_runs(self) -> None:
        """Keep a fifth of the machines in use from now on."""
        for _ in range(self._size // 5):
            Deferred.fromCoroutine(self._run_forever())

    async def _run_forever(self) -> None:
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
        self.calls = CallLog(clock)
        timing = Timing(boot=boot, stop=0.3, stop_cooldown=0.4)
        random = Random(1)  # noqa: S311 - repeatable
        self.machines = EmulatedMachines(clock, lambda: 1e9 + self.heap.now, timing=timing, random=random)
        self.coordinators = [Coordinator(self, f"c{number}") for number in range(coordinators)]

    def start(self) -> None:
        """Start all coordinators at once."""
        for coordinator in self.coordinators:
            coordinator.pool.start()

    def run(self, seconds: float) -> None:
        """Advance the time. Most collections are of young garbage: a full one takes seconds."""
        end = self.heap.now + seconds
        while self.heap.now < end:
            self.heap.run_until(min(end, self.heap.now + _WINDOW))
            self._windows += 1
            gc.collect(1 if self._windows % 10 else 2)

    def fill(self) -> None:
        """Create all machines without rate limits, and wait until the fleet is in a steady state."""
        self.calls.enforced = False
        self.start()
        self.run(1.0)
        for coordinator in self.coordinators:
            coordinator.start_runs()
        self.run(_FILL_TIME)
        self.calls.enforced = True
        gc.freeze()

    def rates(self, action: str, since: float) -> list[float]:
        """Return the calls per second of an action since a moment, window by window."""
        windows = range(int(since), int(self.heap.now) - _WINDOW + 1, _WINDOW)
        counts = self.calls.by_second
        return [
            sum(counts[second, action] for second in range(start, start + _WINDOW)) / _WINDOW
            for start in windows
        ]

    def hottest(self, since: Counter[tuple[str, str]], seconds: float) -> Iterator[tuple[str, float]]:
        """Yield for each action the calls per second on the machine that got most of them."""
        maxima: Counter[str] = Counter()
        for (action, machine_id), count in (self.calls.by_machine - since).items():
            if machine_id:
                maxima[action] = max(maxima[action], count)
        for action, count in maxima.most_common():
            yield action, count / seconds


def measure(coordinators: int, size: int, latency: float, boot: float, seconds: float) -> Report:
    """Measure a fleet's start, so many seconds of steady state, and a crash of half of it."""
    gc.disable()
    report = Report("fleet")
    report.notes.append(
        f"{coordinators} coordinators with {size} machines each; {latency:g} s per call, "
        f"{boot:g} s per boot, leases of {lease_ttl(_MAX_REQ_TIME)} s"
    )
    failures, errors = _observe_log()
    # Referenced until the end: collecting its suspended coroutines would run their cleanup.
    starting = Fleet(coordinators, size, latency, boot)
    _start(report, starting)
    alone, fleet = Fleet(1, size, latency, boot), Fleet(coordinators, size, latency, boot)
    for measured in (alone, fleet):
        measured.fill()
        failures.clear()
        counts_before = measured.calls.by_machine.copy()
        measured.run(seconds)
    since = fleet.heap.now - seconds
    for action in _ACTIONS:
        baseline = [coordinators * rate for rate in alone.rates(action, since)]
        if any(baseline):
            report.add(f"alone: {action}", "/s", baseline)
        if any(rates := fleet.rates(action, since)):
            report.add(f"steady: {action}", "/s", rates, *([f"alone: {action}"] if any(baseline) else []))
    ready = sum(coordinator.pool.not_ready_reason is None for coordinator in fleet.coordinators)
    report.notes.append(
        f"steady: {ready} of {coordinators} ready; failed reconciliations: {dict(failures) or 'none'}"
    )
    for action, rate in fleet.hottest(counts_before, seconds):
        report.add(f"hottest: {action}", "/s", [rate])
    _crash_half(report, fleet)
    if errors:
        raise RuntimeError(f"{len(errors)} unexpected errors, the first: {errors[0]}")
    return report


def _start(report: Report, fleet: Fleet) -> None:
    fleet.start()
    for coordinator in fleet.coordinators:
        coordinator.start_runs()
    while waiting := [coord for coord in fleet.coordinators if coord.listed_at is None]:
        fleet.run(1.0)
        for coordinator in waiting:
            if coordinator.pool.not_ready_reason != _NOT_LISTED:
                coordinator.listed_at = fleet.heap.now
    report.add("start: listed after", "s", [coord.listed_at or 0.0 for coord in fleet.coordinators])
    fleet.run(60.0)
    report.notes.append(f"start: {len(fleet.calls.existing())} machines after {fleet.heap.now:g} s")
    for action in ("all", "list", "create", *_REJECTED[:3]):
        report.add(f"start: {action}", "/s", fleet.rates(action, 0))


def _crash_half(report: Report, fleet: Fleet) -> None:
    """Stop the clocks of half of the coordinators, and wait until their machines are gone."""
    crashed_at = fleet.heap.now
    crashed = {coordinator.name for coordinator in fleet.coordinators[::2]}
    for coordinator in fleet.coordinators[::2]:
        coordinator.clock.dead = True
    orphans = {machine_id for machine_id, name in fleet.calls.existing() if pool_of(name) in crashed}
    while fleet.heap.now < crashed_at + _TIMEOUT and not orphans <= fleet.calls.destroyed.keys():
        fleet.run(_WINDOW)
    gone = [fleet.calls.destroyed[orphan] - crashed_at for orphan in orphans & fleet.calls.destroyed.keys()]
    report.notes.append(
        f"orphans: {len(gone)} of {len(orphans)} gone after {fleet.heap.now - crashed_at:g} s"
    )
    report.add("lease", "s", [lease_ttl(_MAX_REQ_TIME)])
    if gone:
        report.add("orphans: gone after", "s", gone, "lease")
    for action in ("all", "get lease", "get", "destroy", "rejected"):
        report.add(f"orphans: {action}", "/s", fleet.rates(action, crashed_at))


def _observe_log() -> tuple[Counter[str], list[str]]:
    """Return failed reconciliations by error, and unexpected errors; discard the rest of the log."""
    failures: Counter[str] = Counter()
    errors: list[str] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event.get("log_format") == "reconciliation failed: {error}":
            failures[type(event["error"]).__name__] += 1
        if "log_failure" in event:
            errors.append(event["log_failure"].getTraceback())

    globalLogBeginner.beginLoggingTo([observe], redirectStandardIO=False, discardBuffer=True)
    return failures, errors


def main() -> None:
    """Measure and report."""
    coordinators, size = int(os.environ.get("COORDINATORS", "100")), int(os.environ.get("MACHINES", "100"))
    latency, boot = float(os.environ.get("LATENCY", "0.05")), float(os.environ.get("BOOT", "1"))
    report = measure(coordinators, size, latency, boot, float(os.environ.get("SECONDS", "320")))
    report.write()


if __name__ == "__main__":
    main()
