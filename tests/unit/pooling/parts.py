"""What the tests of the pool's parts have in common: an emulated app and one pool's configuration."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.api import MachineConfig, State
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.pooling.backoff import JitteredBackoff
from bfaas.pooling.config import PoolConfig
from bfaas.pooling.lifecycle import MachineLifecycle
from bfaas.pooling.slot import NullPhaseObserver, Phase, Slot
from tests.support.faults import FaultyMachines

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from bfaas.machines.api import Lease, Machine

T = TypeVar("T")

EPOCH = 1_700_000_000.0


class PartsCase(SynchronousTestCase):
    """Machines that boot in 1 s and stop in 0.5 s, on a clock that `advance` moves."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.machines = EmulatedMachines(
            self.clock, self.wall, timing=Timing(boot=1.0, stop=0.5, stop_cooldown=0.4)
        )
        self.api = FaultyMachines(self.machines)
        self.config = PoolConfig("p", 2, "r", MachineConfig("i"), max_req_time=10.0, lease_ttl=300)
        self.backoff = JitteredBackoff(self.clock, Random(1))
        self.lifecycle = MachineLifecycle(self.api, self, self.clock, self.backoff, self.config)
        self.workers_ready = True
        self.probed_at: list[float] = []

    def wall(self) -> float:
        return EPOCH + self.clock.seconds()

    async def wait_until_ready(self, machine: Machine) -> None:
        """Implement the readiness probe."""
        self.probed_at.append(self.clock.seconds())
        if not self.workers_ready:
            await Deferred()

    def advance(self, seconds: float) -> None:
        # In steps, because a timer that fires may start another.
        self.clock.pump([0.05] * round(seconds / 0.05))

    def start(self, work: Coroutine[Any, Any, T]) -> Deferred[T]:
        return Deferred.fromCoroutine(work)

    def result_of(self, work: Coroutine[Any, Any, T], within: float = 5.0) -> T:
        started = self.start(work)
        self.advance(within)
        return self.successResultOf(started)

    def error_of(self, work: Coroutine[Any, Any, Any], within: float = 5.0) -> Exception:
        started = self.start(work)
        self.advance(within)
        error = self.failureResultOf(started).value
        assert isinstance(error, Exception)
        return error

    def slot(self, name: str = "worker-p-1", phase: Phase = Phase.CREATING) -> Slot:
        return Slot(name, self.clock, NullPhaseObserver(), phase)

    def ready_slot(self, name: str = "worker-p-1") -> Slot:
        """Return a slot whose machine has started."""
        slot = self.slot(name)
        self.result_of(self.lifecycle.create(slot))
        self.result_of(self.lifecycle.wait_until_ready(slot))
        return slot

    def existing(self) -> list[Machine]:
        return self.result_of(self.machines.list(), within=0)

    def states(self) -> list[State]:
        return sorted(machine.state for machine in self.existing())

    def lease(self, slot: Slot) -> Lease:
        return self.result_of(self.machines.get_lease(slot.machine.id), within=0)

    def lease_left(self, slot: Slot) -> float:
        """Return the seconds for which the machine is leased."""
        return self.lease(slot).expires_at - self.wall()

    def assert_no_timers(self) -> None:
        self.advance(61)  # destroyed machines are remembered for a minute
        self.assertEqual([], self.clock.getDelayedCalls())
