"""Machines in memory, in simulated time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.api import (
    EndedError,
    Lease,
    Machine,
    MachineConfig,
    NotFoundError,
    NotReadyError,
    RateLimitedError,
    State,
    WaitTimeoutError,
)
from bfaas.machines.emulator.backend import NullBackend
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from tests.support import machines_contract
from tests.support.machines_contract import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

EPOCH = 1_700_000_000.0


class MemoryMachinesContract(machines_contract.MachinesContract):
    def setUp(self) -> None:
        self.clock = Clock()
        self.api = EmulatedMachines(self.clock, self.wall, timing=Timing(boot=1.0, stop=0.5))

    def wall(self) -> float:
        return EPOCH + self.clock.seconds()

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def settle(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        deferred = Deferred.fromCoroutine(work)
        while not deferred.called:
            self.assertNotEqual([], self.clock.getDelayedCalls())
            self.clock.advance(0.25)
        return await deferred


class Recorded(NullBackend):
    """Bodies that are only written down; those of machines with a bad image do not boot."""

    def __init__(self) -> None:
        self.alive: dict[str, Callable[[], None]] = {}
        self.deeds: list[str] = []
        self.can_resume = True

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        self.deeds.append("boot")
        if config.image == "bad":
            raise OSError("no such image")
        self.alive[machine.id] = exited

    async def resume(self, machine_id: str) -> None:
        if not self.can_resume:
            raise OSError("no snapshot")

    async def kill(self, machine_id: str) -> None:
        self.deeds.append("kill")
        self.alive.pop(machine_id, None)


class MemoryCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.bodies = Recorded()
        self.machines = self.with_timing(Timing(boot=1.0, stop=0.5, stop_cooldown=0.4, tombstone_ttl=60.0))

    def with_timing(self, timing: Timing, *, rate_limited: bool = False) -> EmulatedMachines:
        return EmulatedMachines(
            self.clock, lambda: EPOCH + self.clock.seconds(), self.bodies, timing, rate_limited=rate_limited
        )

    def begin(self, work: Coroutine[Deferred[Any], Any, T]) -> Deferred[T]:
        return Deferred.fromCoroutine(work)

    def now(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Do what takes no time."""
        return self.successResultOf(self.begin(work))

    def refused(self, error: type[Exception], work: Coroutine[Deferred[Any], Any, Any]) -> str:
        return str(self.failureResultOf(self.begin(work), error).value)

    def create(self, name: str = "m", image: str = "i") -> tuple[Machine, str]:
        machine, lease = self.now(self.machines.create(name, "r", MachineConfig(image), 1000))
        return machine, lease.nonce

    def started(self) -> tuple[Machine, str]:
        machine, nonce = self.create()
        self.clock.pump([0.5, 0.5])
        self.assert_state(State.STARTED, machine)
        return machine, nonce

    def assert_state(self, state: State, machine: Machine) -> None:
        self.assertIs(state, self.now(self.machines.get(machine.id)).state)


class TimingTests(MemoryCase):
    def test_a_boot_takes_its_time_in_two_halves(self) -> None:
        machine, _ = self.create()

        self.assert_state(State.CREATED, machine)
        self.clock.advance(0.5)
        self.assert_state(State.STARTING, machine)
        self.assertEqual([], self.bodies.deeds)
        self.clock.advance(0.5)
        self.assert_state(State.STARTED, machine)
        self.assertEqual(["boot"], self.bodies.deeds)

    def test_after_a_stop_a_start_is_refused_for_a_rest(self) -> None:
        machine, nonce = self.started()
        self.now(self.machines.stop(machine.id, nonce))
        self.assert_state(State.STOPPING, machine)
        self.refused(NotReadyError, self.machines.start(machine.id, nonce))
        self.clock.advance(0.5)
        self.assert_state(State.STOPPED, machine)

        told = self.refused(NotReadyError, self.machines.start(machine.id, nonce))
        self.assertEqual("machine still active, refusing to start", told)
        self.clock.advance(0.4)
        self.now(self.machines.start(machine.id, nonce))

        self.clock.pump([0.5, 0.5])
        self.assert_state(State.STARTED, machine)

    def test_a_destroyed_machine_is_remembered_for_a_while(self) -> None:
        machine, nonce = self.started()
        self.now(self.machines.destroy(machine.id, nonce))

        self.assert_state(State.DESTROYED, machine)
        self.clock.advance(60)

        self.refused(NotFoundError, self.machines.get(machine.id))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_only_a_machine_that_runs_is_suspended(self) -> None:
        machine, nonce = self.create()

        self.refused(NotReadyError, self.machines.suspend(machine.id, nonce))
        self.refused(NotReadyError, self.machines.start(machine.id, nonce))

    def test_shutdown_leaves_no_body_and_no_timer(self) -> None:
        self.started()
        machine, nonce = self.create("other")
        self.now(self.machines.destroy(machine.id, nonce))

        self.now(self.machines.shutdown())

        self.assertEqual({}, self.bodies.alive)
        self.assertEqual([], self.clock.getDelayedCalls())


class OvertakenTests(MemoryCase):
    def test_a_boot_that_is_overtaken_by_a_stop_is_void(self) -> None:
        for seconds in (0, 0.6):
            with self.subTest(seconds=seconds):
                machine, nonce = self.create(f"m{seconds}")
                self.clock.advance(seconds)
                self.now(self.machines.stop(machine.id, nonce))
                self.clock.pump([0.5] * 4)

                self.assert_state(State.STOPPED, machine)
                self.assertEqual({}, self.bodies.alive)

    def test_a_start_that_is_overtaken_by_a_stop_is_void(self) -> None:
        machine, nonce = self.started()
        self.now(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5, 0.5])
        self.now(self.machines.start(machine.id, nonce))
        self.now(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5] * 4)

        self.assert_state(State.STOPPED, machine)
        self.assertEqual({}, self.bodies.alive)

    def test_what_is_overtaken_by_a_destruction_is_void(self) -> None:
        booting, nonce = self.create("booting")
        self.clock.advance(0.6)
        self.now(self.machines.destroy(booting.id, nonce))
        stopping, nonce = self.started()
        self.now(self.machines.stop(stopping.id, nonce))
        self.now(self.machines.destroy(stopping.id, nonce))
        self.clock.pump([0.5] * 4)

        self.assert_state(State.DESTROYED, booting)
        self.assert_state(State.DESTROYED, stopping)
        self.assertEqual({}, self.bodies.alive)


class BodyTests(MemoryCase):
    def test_a_machine_whose_body_does_not_boot_has_failed(self) -> None:
        machine, nonce = self.create(image="bad")
        self.clock.pump([0.5, 0.5])
        self.assert_state(State.FAILED, machine)

        self.now(self.machines.start(machine.id, nonce))
        self.clock.pump([0.5, 0.5])

        self.assertEqual(["boot", "boot"], self.bodies.deeds)
        self.assert_state(State.FAILED, machine)
        self.now(self.machines.stop(machine.id, nonce))
        self.clock.advance(0.5)
        self.assert_state(State.STOPPED, machine)

    def test_a_machine_whose_body_ends_by_itself_is_stopped(self) -> None:
        machine, _ = self.started()

        self.bodies.alive[machine.id]()
        self.clock.advance(0.5)

        self.assert_state(State.STOPPED, machine)
        self.assertEqual({}, self.bodies.alive)

    def test_a_suspended_machine_that_cannot_be_resumed_boots_anew(self) -> None:
        machine, nonce = self.started()
        self.now(self.machines.suspend(machine.id, nonce))
        before = self.bodies.alive[machine.id]
        self.bodies.deeds.clear()
        self.bodies.can_resume = False

        self.assertIs(False, self.now(self.machines.start(machine.id, nonce)))
        self.assert_state(State.STARTING, machine)
        before()  # the end of what was suspended is not the end of the machine
        self.clock.pump([0.5, 0.5])

        self.assert_state(State.STARTED, machine)
        self.assertEqual(["kill", "boot"], self.bodies.deeds)

    def test_a_suspended_machine_whose_body_ends_is_stopped(self) -> None:
        machine, nonce = self.started()
        self.now(self.machines.suspend(machine.id, nonce))

        self.bodies.alive[machine.id]()
        self.clock.advance(0.5)

        self.assert_state(State.STOPPED, machine)

    def test_the_end_of_a_body_of_before_is_no_news(self) -> None:
        machine, nonce = self.started()
        before = self.bodies.alive[machine.id]
        self.now(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5, 0.5])
        self.now(self.machines.start(machine.id, nonce))
        self.clock.pump([0.5, 0.5])

        before()

        self.assert_state(State.STARTED, machine)
        self.assertIn(machine.id, self.bodies.alive)


class WaitTests(MemoryCase):
    def test_a_wait_that_is_cancelled_or_has_ended_leaves_nothing(self) -> None:
        machine, _ = self.started()
        cancelled, late = (
            self.begin(self.machines.wait(machine, State.STOPPED, seconds)) for seconds in (10, 5)
        )
        cancelled.cancel()
        self.clock.advance(5)

        self.failureResultOf(cancelled, CancelledError)
        told = str(self.failureResultOf(late, WaitTimeoutError).value)
        self.assertEqual("stopped, currently started", told)
        self.assertEqual([], self.machines._entries[machine.id].watchers)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_the_end_of_a_machine_ends_the_wait_for_its_start(self) -> None:
        machine, nonce = self.create()
        waiting = self.begin(self.machines.wait(machine, State.STARTED, 10))
        self.now(self.machines.stop(machine.id, nonce))
        self.assertNoResult(waiting)
        self.clock.advance(0.5)

        for ended in (waiting, self.begin(self.machines.wait(machine, State.STARTED, 10))):
            told = str(self.failureResultOf(ended, EndedError).value)
            self.assertEqual("started, currently stopped", told)

    def test_a_version_of_before_reaches_no_state(self) -> None:
        machine, nonce = self.started()
        self.now(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5, 0.5])
        self.machines.migrate_at_start(machine.id)

        self.assertIs(True, self.now(self.machines.start(machine.id, nonce)))
        stale = self.begin(self.machines.wait(machine, State.STARTED, 10))
        after = self.now(self.machines.get(machine.id))
        waiting = self.begin(self.machines.wait(after, State.STARTED, 10))
        self.clock.pump([0.5, 0.5])

        self.successResultOf(waiting)
        self.assertNoResult(stale)
        self.assertNotEqual(machine.instance_id, after.instance_id)
        self.clock.advance(10)
        self.failureResultOf(stale, WaitTimeoutError)

    def test_all_who_wait_are_told(self) -> None:
        machine, nonce = self.started()
        stopped = [self.begin(self.machines.wait(machine, State.STOPPED, 10)) for _ in range(2)]
        suspended = self.begin(self.machines.wait(machine, State.SUSPENDED, 10))
        self.now(self.machines.stop(machine.id, nonce))
        for waiting in (*stopped, suspended):
            self.assertNoResult(waiting)
        self.clock.advance(0.5)
        for waiting in stopped:
            self.successResultOf(waiting)

        self.now(self.machines.destroy(machine.id, nonce))

        self.failureResultOf(suspended, NotFoundError)


class RateTests(MemoryCase):
    def setUp(self) -> None:
        super().setUp()
        self.machines = self.with_timing(Timing(), rate_limited=True)

    def test_three_calls_at_once_and_one_a_second_are_let_through(self) -> None:
        (machine, nonce), *_ = [self.create(name) for name in "abc"]
        self.refused(RateLimitedError, self.machines.create("d", "r", CONFIG, 0))
        for _ in range(3):
            self.now(self.machines.stop(machine.id, nonce))
            self.now(self.machines.list())
        self.refused(RateLimitedError, self.machines.stop(machine.id, nonce))
        self.refused(RateLimitedError, self.machines.list())
        self.clock.advance(1)

        self.create("d")
        self.refused(RateLimitedError, self.machines.create("e", "r", CONFIG, 0))
        self.clock.advance(100)
        for name in "efg":
            self.create(name)
        self.refused(RateLimitedError, self.machines.create("h", "r", CONFIG, 0))

    def test_limits_are_of_each_machine_and_wider_for_looks(self) -> None:
        (one, _), (two, nonce) = self.create("one"), self.create("two")
        for _ in range(10):
            self.now(self.machines.get(one.id))
        self.refused(RateLimitedError, self.machines.get(one.id))
        self.now(self.machines.get(two.id))
        self.clock.advance(0.2)
        self.now(self.machines.get(one.id))
        for _ in range(3):
            lease: Lease = self.now(self.machines.get_lease(two.id))
        self.refused(RateLimitedError, self.machines.get_lease(two.id))

        self.assertEqual(nonce, lease.nonce)
        self.now(self.machines.get_lease(one.id))
