"""
Fly on one host with two coordinators under load, and real signals to all of its processes.

The invariants are checked from outside: in the responses to clients, in what coordinators send to workers, in
the list of the API, and in /proc.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import deferLater

from bfaas.machines.api import MachinesError, NotFoundError, State
from bfaas.pooling.config import pool_of
from bfaas.pooling.lifecycle import API_SETTLE_TIME
from bfaas.system import process_tree
from tests.e2e.coordinator import (
    PATIENCE,
    Running,
    command,
    marked,
    pause,
    reactor,
    send,
    start_program,
    stop,
    together,
)
from tests.e2e.faults import COORDINATOR_FAULTS, WORKER_FAULTS, Fault
from tests.e2e.fly import Fly, start_emulator, start_fly
from tests.e2e.load import WORK, DeliveryCounter, Outcome, run_script
from tests.support.network import free_port

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

SIZES = {"a": 2, "a-1": 2}
CLIENTS = 3  # of each pool

MAX_REQ_TIME = 1.5
LEASE = 10
RECONCILE_INTERVAL = 4.0

RECOVERY = API_SETTLE_TIME + 45.0
"""
Seconds for the recovery after a round. A creation with an unknown outcome, such as one that was requested
just before its coordinator was stopped, occupies its slot for the first part; a pool backs off up to 30 s
after failed starts.
"""

TOLERANCE = 10.0
"""Seconds that anything else may be late on a busy machine."""

_COORDINATOR = str(Path(__file__).with_name("coord_with_timing.py"))


class Chaos:
    """
    The programs, the faults injected into them, and the outcomes.

    `rng` chooses the scripts, and the times and targets of faults. `mark` is in the environment of every
    process that is started here, scripts included: as the region.
    """

    def __init__(self, fly: Fly, rng: random.Random, mark: str, state: Path) -> None:
        self.fly = fly
        self.coordinators: dict[str, Running] = {}
        self.faults: Counter[Fault] = Counter()
        self.outcomes: Counter[Outcome] = Counter()
        self.max_sizes: Counter[str] = Counter()
        self.slowest = 0.0
        self.history: list[str] = []
        self._deliveries = DeliveryCounter(fly.proxy_port)
        self._listener = reactor.listenTCP(0, self._deliveries, interface="127.0.0.1")
        self._rng = rng
        self._mark = mark
        self._state = state
        self._settings: dict[str, dict[str, str]] = {}
        self._programs = [fly.emulator]
        self._killed: list[Running] = []
        self._locks: defaultdict[str, DeferredLock] = defaultdict(DeferredLock)
        self._numbers = count()
        self._loaded = False
        self._began = reactor.seconds()

    # Programs.

    async def start_coordinator(self, pool: str, size: int) -> None:
        """Start a coordinator, or restart a killed one with its name and port."""
        if pool not in self._settings:
            self._settings[pool] = self.fly.settings(
                pool,
                size,
                WORKER_URL=f"http://127.0.0.1:{self._listener.getHost().port}",
                FLY_REGION=self._mark,
                MAXREQTIME=f"{MAX_REQ_TIME}s",
                MAXWAIT="4s",
                LEASE=str(LEASE),
                RECONCILE_INTERVAL=str(RECONCILE_INTERVAL),
            )
        port = self.coordinators[pool].port if pool in self.coordinators else free_port()
        running = await start_program([_COORDINATOR], port, self._settings[pool])
        self.coordinators[pool] = running
        self._programs.append(running)

    async def kill(self, running: Running) -> None:
        """Kill a program, and wait until it has ended."""
        self._killed.append(running)
        running.kill(signal.SIGKILL)
        await running.program.ended

    async def close(self) -> None:
        """Kill all programs that still run, and all processes that they started."""
        for running in self._programs:
            if not running.program.ended.called:
                await self.kill(running)
        for pid in self._stray_processes():
            send(pid, signal.SIGKILL)
        await self._listener.stopListening()

    # Faults.

    async def inject(self, fault: Fault) -> None:
        """Inject a fault; return when its cause, not yet its damage, is repaired."""
        await deferLater(reactor, self._rng.uniform(0.1, 1.5))
        pool = self._rng.choice(sorted(SIZES))
        coordinator = fault in COORDINATOR_FAULTS
        if fault in WORKER_FAULTS:
            await self._inject_into_worker(fault)
        else:
            # One fault at a time for each program.
            strike = (
                self._inject_into_coordinator(fault, pool) if coordinator else self._inject_into_api(fault)
            )
            lock = self._locks[pool if coordinator else "the API"]
            await lock.run(Deferred.fromCoroutine, strike)
        self.faults[fault] += 1

    async def _inject_into_coordinator(self, fault: Fault, pool: str) -> None:
        self._record(f"{fault.value}: {pool}")
        if fault is Fault.KILL_COORDINATOR:
            await self.kill(self.coordinators[pool])
            await deferLater(reactor, self._rng.choice((0.0, self._rng.uniform(0.0, 2.0))))
            await self.start_coordinator(pool, SIZES[pool])
        else:
            minimum, maximum = (
                (LEASE, LEASE + RECONCILE_INTERVAL) if fault is Fault.OUTLAST_LEASE else (0.1, 2.5)
            )
            await pause(self.coordinators[pool].pid, self._rng.uniform(minimum, maximum))

    async def _inject_into_api(self, fault: Fault) -> None:
        self._record(fault.value)
        if fault is Fault.KILL_API:
            await self.kill(self.fly.emulator)
            self._continue_orphans()
            await deferLater(reactor, self._rng.choice((0.0, self._rng.uniform(0.0, 2.0))))
            # It restarts without machines.
            port, proxy_port = self.fly.emulator.port, self.fly.proxy_port
            self.fly.emulator = await start_emulator(
                port, proxy_port, **_emulator_settings(self._mark, self._state)
            )
            self._programs.append(self.fly.emulator)
        else:
            await pause(self.fly.emulator.pid, self._rng.uniform(0.5, 3.5))

    async def _inject_into_worker(self, fault: Fault) -> None:
        pid = await self._busy_worker()
        self._record(f"{fault.value}: {pid}")
        if fault is Fault.PAUSE_WORKER:
            await pause(pid, self._rng.uniform(0.1, 1.0))
        else:
            send(pid, signal.SIGKILL if fault is Fault.KILL_WORKER else signal.SIGSTOP)

    def _continue_orphans(self) -> None:
        """Continue workers that outlive the API: without a sandbox they must detect its end."""
        if b"NO SANDBOX" in self.fly.emulator.program.output:
            for pid in self._stray_processes():
                send(pid, signal.SIGCONT)

    async def _busy_worker(self) -> int:
        """Wait for a worker whose script is running."""
        for _ in range(int(PATIENCE / 0.1)):
            if busy := [worker for worker in self.fly.emulator.workers() if process_tree.children(worker)]:
                return self._rng.choice(busy)
            await deferLater(reactor, 0.1)
        raise AssertionError("no script runs")

    def _record(self, what: str) -> None:
        self.history.append(f"{reactor.seconds() - self._began:.2f} s: {what}")

    # Load.

    async def round(self, faults: Iterable[Fault]) -> None:
        """Inject faults under load; then all pools must recover soon."""
        load = self._begin_load()
        try:
            await together(self.inject(fault) for fault in faults)
        finally:
            self._loaded = False
            await load
        started = reactor.seconds()
        await together(self._recover(pool) for pool in SIZES)
        await self._settle()
        self.slowest = max(self.slowest, reactor.seconds() - started)

    def _begin_load(self) -> Deferred[None]:
        self._loaded = True
        clients = [self._send_scripts(pool) for pool in SIZES for _ in range(CLIENTS)]
        return Deferred.fromCoroutine(together([*clients, self._watch()]))

    async def _send_scripts(self, pool: str) -> None:
        while self._loaded:
            outcome = await self.run(pool, self._rng.choice(WORK), self._rng.randrange(5))
            if outcome in (Outcome.CUT, Outcome.REJECTED):
                await deferLater(reactor, self._rng.uniform(0.1, 0.4))

    async def run(self, pool: str, work: str, code: int = 0) -> Outcome:
        """Send a script; return the outcome, which must be an allowed one."""
        number = next(self._numbers)
        outcome = await run_script(self.coordinators[pool], number, work, code, self._killed)
        assert self._deliveries.sent[number] <= 1, f"request {number} was sent to workers twice"
        self.outcomes[outcome] += 1
        return outcome

    # What must hold.

    async def _watch(self) -> None:
        while self._loaded:
            await self._check_sizes()
            await deferLater(reactor, 0.1)

    async def _check_sizes(self) -> set[State]:
        """Check in the list of the API that no pool exceeds its size; return the states of all machines."""
        try:
            machines = await self.fly.api.list()
        except MachinesError:
            return {State.UNKNOWN}
        sizes = Counter(pool_of(machine.name) or "" for machine in machines)
        for pool, size in sizes.items():
            assert size <= SIZES.get(pool, 0), f"{pool} has {size} machines"
        self.max_sizes |= sizes
        return {machine.state for machine in machines}

    async def _recover(self, pool: str) -> None:
        """Wait until a pool runs scripts again."""
        deadline = reactor.seconds() + RECOVERY
        while (outcome := await self.run(pool, "true")) is not Outcome.COMPLETE:
            assert reactor.seconds() < deadline, f"{pool} does not recover: {outcome.value}"
            await deferLater(reactor, 0.1)

    async def _settle(self) -> None:
        """Wait until every machine is stopped, and only our own programs run."""
        deadline = reactor.seconds() + RECOVERY
        while (left := self._stray_processes()) or await self._check_sizes() - {State.STOPPED}:
            assert reactor.seconds() < deadline, f"still there: {left or 'machines'}"
            await deferLater(reactor, 0.1)

    def _stray_processes(self) -> dict[int, str]:
        """
        Find all processes that our programs started.

        Orphans are found by their environment, descendants of a program in any case.
        """
        running = [running for running in self._programs if not running.program.ended.called]
        found = {process.pid for program in running for process in program.processes()}
        found |= marked(f"FLY_REGION={self._mark}")
        found -= {program.pid for program in running}
        return {pid: command(pid).replace(b"\0", b" ").decode(errors="replace") for pid in found}

    def history_and_output(self) -> str:
        """Return the last faults, and the last output of the programs."""
        outputs = [
            b"\n".join(running.program.output.splitlines()[-40:]).decode(errors="replace")
            for running in [*self.coordinators.values(), self.fly.emulator]
        ]
        return "\n\n".join(["\n".join(self.history[-10:]), *outputs])

    def summary(self) -> str:
        """Return the counts of faults and outcomes, in lines."""
        counted = [*self.faults.items(), *self.outcomes.items()]
        return "\n".join(
            [
                *(f"{number:6} {kind.value}" for kind, number in counted),
                f"recovered within {self.slowest:.1f} s; largest pools: {dict(self.max_sizes)}",
            ]
        )

    # The end.

    async def abandon(self) -> float:
        """
        Kill all coordinators under load. Another pool's coordinator destroys their machines, not too early.

        Returns the seconds between the end of its lease and the destruction of the last machine.
        """
        load = self._begin_load()
        await self._busy_worker()
        for pool in SIZES:
            await self.kill(self.coordinators[pool])
        self._loaded = False
        await load
        assert await self.fly.api.list()
        await self.start_coordinator("heir", 1)
        late = await self._wait_for_destruction()
        await self._settle()
        for running in (self.coordinators["heir"], self.fly.emulator):
            assert await stop(running) == 0, running.program.output.decode()
        assert not self._stray_processes()
        for running in self._programs:
            assert b"Traceback" not in running.program.output, running.program.output.decode()
        return late

    async def _wait_for_destruction(self) -> float:
        """Wait until all machines are destroyed, each in time; return the delay of the last in seconds."""
        ends: dict[str, float] = {}
        late = 0.0
        while True:
            here = {machine.id for machine in await self.fly.api.list()}
            now = time.time()
            for machine in ends.keys() - here:
                end = ends.pop(machine)
                assert now >= end, f"{machine} was destroyed {end - now:.1f} s before its lease's end"
                late = max(late, now - end)
            if not here:
                return late
            for machine in here - ends.keys():
                ends[machine] = await self._lease_end(machine)
            last = max(ends.values())
            assert now < last + 1.2 * RECONCILE_INTERVAL + TOLERANCE, (
                f"{here} still exist, {now - last:.1f} s late"
            )
            await deferLater(reactor, 0.1)

    async def _lease_end(self, machine_id: str) -> float:
        try:
            return (await self.fly.api.get_lease(machine_id)).expires_at
        except NotFoundError:
            return 0.0


def _emulator_settings(mark: str, state: Path) -> dict[str, str]:
    return {"FLY_REGION": mark, "TMPDIR": str(state)}


async def start_chaos(rng: random.Random, state: Path) -> Chaos:
    """Start the API; machines' homes are in the directory `state`."""
    mark = f"chaos-{os.getpid()}-{rng.randrange(1 << 30)}"
    return Chaos(await start_fly(**_emulator_settings(mark, state)), rng, mark, state)
