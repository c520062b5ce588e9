"""Tests of the emulator's state, in simulated time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, succeed
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


class EmulatedMachinesContract(machines_contract.MachinesContract):
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


class RecordingBackend(NullBackend):
    """Records calls. Machines with the image "bad" cannot start."""

    def __init__(self) -> None:
        self.running: dict[str, Callable[[], None]] = {}
        self.calls: list[str] = []
        self.can_resume = True
        self.resuming: Deferred[None] = succeed(None)

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        self.calls.append("start")
        if config.image == "bad":
            raise OSError("no such image")
        self.running[machine.id] = exited

    async def resume(self, machine_id: str) -> None:
        await self.resuming
        if not self.can_resume:
            raise OSError("no snapshot")

    async def kill(self, machine_id: str) -> None:
        self.calls.append("kill")
        self.running.pop(machine_id, None)


class EmulatorTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.backend = RecordingBackend()
        self.machines = self.with_timing(Timing(boot=1.0, stop=0.5, stop_cooldown=0.4, tombstone_ttl=60.0))

    def with_timing(self, timing: Timing, *, rate_limited: bool = False) -> EmulatedMachines:
        return EmulatedMachines(
            self.clock, lambda: EPOCH + self.clock.seconds(), self.backend, timing, rate_limited=rate_limited
        )

    def call(self, work: Coroutine[Deferred[Any], Any, T]) -> Deferred[T]:
        return Deferred.fromCoroutine(work)

    def result(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Return the result of a call that takes no time."""
        return self.successResultOf(self.call(work))

    def error(self, error: type[Exception], work: Coroutine[Deferred[Any], Any, Any]) -> str:
        return str(self.failureResultOf(self.call(work), error).value)

    def create(self, name: str = "m", image: str = "i") -> tuple[Machine, str]:
        machine, lease = self.result(self.machines.create(name, "r", MachineConfig(image), 1000))
        return machine, lease.nonce

    def started(self) -> tuple[Machine, str]:
        machine, nonce = self.create()
        self.clock.pump([0.5, 0.5])
        self.assert_state(State.STARTED, machine)
        return machine, nonce

    def assert_state(self, state: State, machine: Machine) -> None:
        self.assertIs(state, self.result(self.machines.get(machine.id)).state)


class TimingTests(EmulatorTestCase):
    def test_boot_passes_through_created_and_starting(self) -> None:
        machine, _ = self.create()

        self.assert_state(State.CREATED, machine)
        self.clock.advance(0.5)
        self.assert_state(State.STARTING, machine)
        self.assertEqual([], self.backend.calls)
        self.clock.advance(0.5)
        self.assert_state(State.STARTED, machine)
        self.assertEqual(["start"], self.backend.calls)

    def test_start_is_rejected_during_the_cooldown_after_a_stop(self) -> None:
        machine, nonce = self.started()
        self.result(self.machines.stop(machine.id, nonce))
        self.assert_state(State.STOPPING, machine)
        self.error(NotReadyError, self.machines.start(machine.id, nonce))
        self.clock.advance(0.5)
        self.assert_state(State.STOPPED, machine)

        message = self.error(NotReadyError, self.machines.start(machine.id, nonce))
        self.assertEqual("machine still active, refusing to start", message)
        self.clock.advance(0.4)
        self.result(self.machines.start(machine.id, nonce))

        self.clock.pump([0.5, 0.5])
        self.assert_state(State.STARTED, machine)

    def test_destroyed_machine_is_readable_until_its_tombstone_expires(self) -> None:
        machine, nonce = self.started()
        self.result(self.machines.destroy(machine.id, nonce))

        self.assert_state(State.DESTROYED, machine)
        self.clock.advance(60)

        self.error(NotFoundError, self.machines.get(machine.id))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_new_machine_can_neither_be_suspended_nor_started(self) -> None:
        machine, nonce = self.create()

        self.error(NotReadyError, self.machines.suspend(machine.id, nonce))
        self.error(NotReadyError, self.machines.start(machine.id, nonce))

    def test_shutdown_leaves_no_process_and_no_timer(self) -> None:
        self.started()
        machine, nonce = self.create("other")
        self.result(self.machines.destroy(machine.id, nonce))

        self.result(self.machines.shutdown())

        self.assertEqual({}, self.backend.running)
        self.assertEqual([], self.clock.getDelayedCalls())


class VoidedTests(EmulatorTestCase):
    def test_stop_cancels_a_boot(self) -> None:
        for seconds in (0, 0.6):
            with self.subTest(seconds=seconds):
                machine, nonce = self.create(f"m{seconds}")
                self.clock.advance(seconds)
                self.result(self.machines.stop(machine.id, nonce))
                self.clock.pump([0.5] * 4)

                self.assert_state(State.STOPPED, machine)
                self.assertEqual({}, self.backend.running)

    def test_stop_cancels_a_start(self) -> None:
        machine, nonce = self.started()
        self.result(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5, 0.5])
        self.result(self.machines.start(machine.id, nonce))
        self.result(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5] * 4)

        self.assert_state(State.STOPPED, machine)
        self.assertEqual({}, self.backend.running)

    def test_destruction_cancels_a_boot_and_a_stop(self) -> None:
        booting, nonce = self.create("booting")
        self.clock.advance(0.6)
        self.result(self.machines.destroy(booting.id, nonce))
        stopping, nonce = self.started()
        self.result(self.machines.stop(stopping.id, nonce))
        self.result(self.machines.destroy(stopping.id, nonce))
        self.clock.pump([0.5] * 4)

        self.assert_state(State.DESTROYED, booting)
        self.assert_state(State.DESTROYED, stopping)
        self.assertEqual({}, self.backend.running)


class BackendTests(EmulatorTestCase):
    def test_machine_fails_if_its_process_cannot_start(self) -> None:
        machine, nonce = self.create(image="bad")
        self.clock.pump([0.5, 0.5])
        self.assert_state(State.FAILED, machine)

        self.result(self.machines.start(machine.id, nonce))
        self.clock.pump([0.5, 0.5])

        self.assertEqual(["start", "start"], self.backend.calls)
        self.assert_state(State.FAILED, machine)
        self.result(self.machines.stop(machine.id, nonce))
        self.clock.advance(0.5)
        self.assert_state(State.STOPPED, machine)

    def test_machine_stops_if_its_process_exits(self) -> None:
        machine, _ = self.started()

        self.backend.running[machine.id]()
        self.clock.advance(0.5)

        self.assert_state(State.STOPPED, machine)
        self.assertEqual({}, self.backend.running)

    def test_suspended_machine_boots_if_it_cannot_be_resumed(self) -> None:
        machine, nonce = self.started()
        self.result(self.machines.suspend(machine.id, nonce))
        exited = self.backend.running[machine.id]
        self.backend.calls.clear()
        self.backend.can_resume = False

        self.assertIs(False, self.result(self.machines.start(machine.id, nonce)))
        self.assert_state(State.STARTING, machine)
        exited()  # the exit of the suspended process does not stop the machine
        self.clock.pump([0.5, 0.5])

        self.assert_state(State.STARTED, machine)
        self.assertEqual(["kill", "start"], self.backend.calls)

    def test_destruction_cancels_a_resume(self) -> None:
        for can_resume in (False, True):
            machine, nonce = self.started()
            self.result(self.machines.suspend(machine.id, nonce))
            self.backend.can_resume = can_resume
            self.backend.resuming = Deferred()
            self.result(self.machines.start(machine.id, nonce))
            self.result(self.machines.destroy(machine.id, nonce))
            self.backend.calls.clear()

            self.backend.resuming.callback(None)
            self.clock.pump([0.5, 0.5])

            self.assert_state(State.DESTROYED, machine)
            self.assertEqual([], self.backend.calls)

    def test_suspended_machine_stops_if_its_process_exits(self) -> None:
        machine, nonce = self.started()
        self.result(self.machines.suspend(machine.id, nonce))

        self.backend.running[machine.id]()
        self.clock.advance(0.5)

        self.assert_state(State.STOPPED, machine)

    def test_exit_of_an_earlier_process_is_ignored(self) -> None:
        machine, nonce = self.started()
        exited = self.backend.running[machine.id]
        self.result(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5, 0.5])
        self.result(self.machines.start(machine.id, nonce))
        self.clock.pump([0.5, 0.5])

        exited()

        self.assert_state(State.STARTED, machine)
        self.assertIn(machine.id, self.backend.running)


class WaitTests(EmulatorTestCase):
    def test_ended_wait_leaves_no_watcher_and_no_timer(self) -> None:
        machine, _ = self.started()
        cancelled, expired = (
            self.call(self.machines.wait(machine, State.STOPPED, seconds)) for seconds in (10, 5)
        )
        cancelled.cancel()
        self.clock.advance(5)

        self.failureResultOf(cancelled, CancelledError)
        message = str(self.failureResultOf(expired, WaitTimeoutError).value)
        self.assertEqual("stopped, currently started", message)
        self.assertEqual([], self.machines._entries[machine.id].watchers)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_stop_ends_a_wait_for_a_start(self) -> None:
        machine, nonce = self.create()
        waiting = self.call(self.machines.wait(machine, State.STARTED, 10))
        self.result(self.machines.stop(machine.id, nonce))
        self.assertNoResult(waiting)
        self.clock.advance(0.5)

        for wait in (waiting, self.call(self.machines.wait(machine, State.STARTED, 10))):
            message = str(self.failureResultOf(wait, EndedError).value)
            self.assertEqual("started, currently stopped", message)

    def test_wait_ignores_states_of_other_versions(self) -> None:
        machine, nonce = self.started()
        self.result(self.machines.stop(machine.id, nonce))
        self.clock.pump([0.5, 0.5])
        self.machines.migrate_at_start(machine.id)

        self.assertIs(True, self.result(self.machines.start(machine.id, nonce)))
        stale_wait = self.call(self.machines.wait(machine, State.STARTED, 10))
        current = self.result(self.machines.get(machine.id))
        waiting = self.call(self.machines.wait(current, State.STARTED, 10))
        self.clock.pump([0.5, 0.5])

        self.successResultOf(waiting)
        self.assertNoResult(stale_wait)
        self.assertNotEqual(machine.instance_id, current.instance_id)
        self.clock.advance(10)
        self.failureResultOf(stale_wait, WaitTimeoutError)

    def test_state_change_ends_every_wait_for_it(self) -> None:
        machine, nonce = self.started()
        stopped = [self.call(self.machines.wait(machine, State.STOPPED, 10)) for _ in range(2)]
        suspended = self.call(self.machines.wait(machine, State.SUSPENDED, 10))
        self.result(self.machines.stop(machine.id, nonce))
        for waiting in (*stopped, suspended):
            self.assertNoResult(waiting)
        self.clock.advance(0.5)
        for waiting in stopped:
            self.successResultOf(waiting)

        self.result(self.machines.destroy(machine.id, nonce))

        self.failureResultOf(suspended, NotFoundError)


class RateTests(EmulatorTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.machines = self.with_timing(Timing(), rate_limited=True)

    def test_one_call_a_second_and_bursts_of_three_are_allowed(self) -> None:
        (machine, nonce), *_ = [self.create(name) for name in "abc"]
        self.error(RateLimitedError, self.machines.create("d", "r", CONFIG, 0))
        for _ in range(3):
            self.result(self.machines.stop(machine.id, nonce))
            self.result(self.machines.list())
        self.error(RateLimitedError, self.machines.stop(machine.id, nonce))
        self.error(RateLimitedError, self.machines.list())
        self.clock.advance(1)

        self.create("d")
        self.error(RateLimitedError, self.machines.create("e", "r", CONFIG, 0))
        self.clock.advance(100)
        for name in "efg":
            self.create(name)
        self.error(RateLimitedError, self.machines.create("h", "r", CONFIG, 0))

    def test_each_machine_has_its_limits_and_get_has_higher_ones(self) -> None:
        (one, _), (two, nonce) = self.create("one"), self.create("two")
        for _ in range(10):
            self.result(self.machines.get(one.id))
        self.error(RateLimitedError, self.machines.get(one.id))
        self.result(self.machines.get(two.id))
        self.clock.advance(0.2)
        self.result(self.machines.get(one.id))
        for _ in range(3):
            lease: Lease = self.result(self.machines.get_lease(two.id))
        self.error(RateLimitedError, self.machines.get_lease(two.id))

        self.assertEqual(nonce, lease.nonce)
        self.result(self.machines.get_lease(one.id))
