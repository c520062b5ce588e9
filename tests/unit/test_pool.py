from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.api import (
    CapacityError,
    LeaseHeldError,
    MachineConfig,
    NotFoundError,
    NotReadyError,
    RateLimitedError,
    RejectedError,
    State,
    UnavailableError,
    WaitTimeoutError,
)
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.pool import Allocation, Pool, PoolClosedError
from bfaas.pooling.config import PoolConfig, StepTimeouts, lease_ttl, pool_of
from bfaas.pooling.slot import Phase
from tests.support.faults import Fault, FaultyMachines, Hang, LoseResponse, Refuse, Slow, Twice

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bfaas.machines.api import Machine

EPOCH = 1_700_000_000.0
MAX_REQ_TIME = 10.0


class LostStart(Fault):
    """The start takes effect, but its response is lost, and the repeated call is rejected."""

    def __init__(self, clock: Clock, seconds: float, refusal: NotReadyError) -> None:
        self.clock, self.seconds, self.refusal = clock, seconds, refusal

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        await call()
        await deferLater(self.clock, self.seconds)
        raise self.refusal


class World:
    """The machines of one app, and pools that share it, on one clock."""

    def __init__(self, timing: Timing | None = None, *, limited: bool = False) -> None:
        self.clock = Clock()
        timing = timing or Timing(boot=1.0, stop=0.5, stop_cooldown=0.4)
        self.machines = EmulatedMachines(
            self.clock, lambda: EPOCH + self.clock.seconds(), timing=timing, rate_limited=limited
        )
        self.never_ready: set[str] = set()
        self.none_ready = False

    async def wait_until_ready(self, machine: Machine) -> None:
        if machine.id in self.never_ready or self.none_ready:
            await Deferred()

    def pool(
        self,
        name: str = "p",
        size: int = 2,
        image: str = "i",
        *,
        standby: int = 0,
        suspend_standby: bool = False,
        start: bool = True,
        **env: str,
    ) -> tuple[Pool, FaultyMachines]:
        api = FaultyMachines(self.machines)
        config = PoolConfig(
            name=name,
            size=size,
            region="r",
            template=MachineConfig(image, env),
            max_req_time=MAX_REQ_TIME,
            lease_ttl=lease_ttl(MAX_REQ_TIME),
            standby=standby,
            suspend_standby=suspend_standby,
        )
        pool = Pool(api, self, self.clock, Random(1), config)
        if start:
            pool.start()
        return pool, api

    def advance(self, seconds: float) -> None:
        # In steps, because a timer that fires may start another.
        self.clock.pump([0.05] * round(seconds / 0.05))


def crash(api: FaultyMachines) -> None:
    """Cut a pool off from its machines, as a crash does."""
    api.always["*"] = Hang()


class PoolCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool()

    def machines(self) -> list[Machine]:
        return self.successResultOf(Deferred.fromCoroutine(self.world.machines.list()))

    def states(self) -> list[State]:
        return sorted(machine.state for machine in self.machines())

    def start(self, work: Coroutine[Deferred[Any], Any, Any]) -> Deferred[Any]:
        return Deferred.fromCoroutine(work)

    def allocated(self, pool: Pool | None = None, within: float = 5) -> Allocation:
        entry = (pool or self.pool).allocate("c")
        self.world.advance(within)
        return self.successResultOf(entry)

    def close(self, pool: Pool | None = None, within: float = 60) -> None:
        closing = self.start((pool or self.pool).close())
        self.world.advance(within)
        self.successResultOf(closing)

    def assert_nothing_pending(self) -> None:
        self.world.advance(61)  # destroyed machines are remembered for a minute
        self.assertEqual([], self.world.clock.getDelayedCalls())


class AllocationTests(PoolCase):
    def test_request_gets_a_started_machine_of_this_pool(self) -> None:
        allocation = self.allocated()

        [machine] = self.machines()
        self.assertEqual(allocation.machine.id, machine.id)
        self.assertEqual(State.STARTED, machine.state)
        self.assertEqual("p", pool_of(machine.name))
        self.assertEqual("p//i", machine.metadata["pool_id"])

    def test_released_machine_is_stopped_and_reused(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.assertEqual([State.STOPPED], self.states())

        second = self.allocated()

        self.assertEqual(first.machine.id, second.machine.id)
        self.assertEqual(1, self.api.count("create"))
        self.assertEqual(1, self.api.count("stop"))

    def test_requests_beyond_the_size_wait(self) -> None:
        entries = [self.pool.allocate("c") for _ in range(5)]
        self.world.advance(5)
        served = [self.successResultOf(entry) for entry in entries[:2]]
        for entry in entries[2:]:
            self.assertNoResult(entry)

        served[0].release()
        self.world.advance(5)
        third = self.successResultOf(entries[2])
        self.assertNoResult(entries[3])
        served[1].release()
        self.world.advance(5)

        self.assertEqual(served[0].machine.id, third.machine.id)
        self.assertEqual(served[1].machine.id, self.successResultOf(entries[3]).machine.id)
        self.assertEqual(2, len(self.machines()))
        entries[4].cancel()
        self.failureResultOf(entries[4], CancelledError)

    def test_cancelled_request_leaves_the_queue(self) -> None:
        entry = self.pool.allocate("c")
        self.world.advance(0.2)
        entry.cancel()
        self.failureResultOf(entry, CancelledError)
        self.world.advance(5)

        self.assertEqual([State.STOPPED], self.states())
        self.assertEqual(1, self.pool.count(Phase.STOPPED))
        self.allocated()
        self.assertEqual(1, self.api.count("create"))

    def test_machine_is_released_once(self) -> None:
        allocation = self.allocated()
        allocation.release()

        self.assertRaises(RuntimeError, allocation.release)

    def test_queue_depth_ahead_counts_machines_that_must_become_free(self) -> None:
        self.assertEqual(0, self.pool.queue_depth_ahead)
        served = [self.allocated(), self.allocated()]
        self.assertEqual(1, self.pool.queue_depth_ahead)
        entry = self.pool.allocate("c")

        self.assertEqual(2, self.pool.queue_depth_ahead)
        entry.addErrback(lambda failure: failure.trap(CancelledError) and None)
        entry.cancel()
        served[0].release()
        self.world.advance(5)
        self.assertEqual(0, self.pool.queue_depth_ahead)

    def test_clients_are_served_round_robin(self) -> None:
        served = [self.allocated(), self.allocated()]
        many = [self.pool.allocate("many") for _ in range(5)]
        one = self.pool.allocate("one")
        for allocation in served:
            allocation.release()
        self.world.advance(5)

        self.successResultOf(one)
        self.successResultOf(many[0])
        for entry in many[1:]:
            self.assertNoResult(entry)
            entry.addErrback(lambda failure: failure.trap(CancelledError) and None)
            entry.cancel()

    def test_expected_wait_follows_the_latest_turnarounds(self) -> None:
        pool, _ = self.world.pool("q", size=1)
        self.assertEqual(0.0, pool.expected_wait)
        allocation = self.allocated(pool)
        for _ in range(30):
            allocation.release()
            self.world.advance(3)
            allocation = self.allocated(pool, within=2)

        # Two seconds for a start and a run, half a second for a stop.
        self.assertApproximates(2.5, pool.expected_wait, 0.2)
        entries = [pool.allocate("c"), pool.allocate("d")]
        self.assertApproximates(3 * 2.5, pool.expected_wait, 0.6)
        for entry in entries:
            entry.addErrback(lambda failure: failure.trap(CancelledError) and None)
            entry.cancel()

    def test_more_machines_shorten_the_expected_wait(self) -> None:
        allocations = [self.allocated() for _ in range(2)]
        self.world.advance(8)
        for allocation in allocations:
            allocation.release()
        self.world.advance(5)
        for _ in range(2):
            self.allocated()

        self.assertApproximates(
            6.5, self.pool.expected_wait, 2.5
        )  # half the time of a start, a run and a stop

    def test_expected_wait_before_the_first_turnaround_is_the_time_in_use(self) -> None:
        for _ in range(2):
            self.allocated()
        entries = [self.pool.allocate("c") for _ in range(6)]
        before = self.pool.expected_wait
        self.assertEqual(7, self.pool.queue_depth_ahead)
        self.world.advance(4)

        # Two machines have been in use for four more seconds, which is the least that a turnaround takes.
        self.assertApproximates(before + 7 / 2 * 4, self.pool.expected_wait, 0.1)
        self.world.advance(10 * MAX_REQ_TIME)
        self.assertEqual(7 / 2 * (MAX_REQ_TIME + StepTimeouts().stop), self.pool.expected_wait)
        for entry in entries:
            entry.addErrback(lambda failure: failure.trap(CancelledError) and None)
            entry.cancel()

    def test_long_first_turnaround_is_soon_outweighed(self) -> None:
        pool, _ = self.world.pool("q", size=1)
        allocation = self.allocated(pool)
        self.world.advance(MAX_REQ_TIME)
        for _ in range(9):
            allocation.release()
            self.world.advance(3)
            allocation = self.allocated(pool, within=2)

        self.assertLess(pool.expected_wait, 4)

    def test_turnaround_counts_for_a_full_run_and_a_stop_at_most(self) -> None:
        pool, _ = self.world.pool("q", size=1)
        for _ in range(30):
            self.allocated(pool).release()
            self.world.advance(3)
            allocation = self.allocated(pool)
            self.world.advance(200)
            allocation.release()
            self.world.advance(100)
        self.allocated(pool)

        self.assertGreater(pool.expected_wait, 0.5 * MAX_REQ_TIME)
        self.assertLessEqual(pool.expected_wait, MAX_REQ_TIME + StepTimeouts().stop)

    def test_start_is_retried_during_the_cooldown_after_a_stop(self) -> None:
        first = self.allocated()
        entry = self.pool.allocate("c")
        self.world.advance(5)
        second = self.successResultOf(entry)
        waiting = self.pool.allocate("c")
        first.release()
        self.world.advance(5)

        self.assertEqual(first.machine.id, self.successResultOf(waiting).machine.id)
        # The API accepts bursts of three calls.
        self.assertTrue(2 <= self.api.count("start") <= 3, self.api.count("start"))
        self.assertEqual(0, self.api.count("destroy"))
        second.release()


class ReadinessTests(PoolCase):
    def test_ready_once_the_machines_are_listed(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(start=False)
        self.addCleanup(self.close)
        self.assertEqual("the pool has not listed its machines yet", self.pool.not_ready_reason)
        self.pool.start()
        self.world.advance(1)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_not_ready_while_creations_fail(self) -> None:
        self.api.always["create"] = Refuse(CapacityError("full"))
        entry = self.pool.allocate("c")
        self.world.advance(60)
        self.assertEqual("machines cannot be started", self.pool.not_ready_reason)

        del self.api.always["create"]
        self.world.advance(40)
        self.successResultOf(entry)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_not_ready_while_the_api_fails_unless_a_machine_is_in_standby(self) -> None:
        for standby, reason in ((0, "the Machines API is failing"), (1, None)):
            world = World()
            pool, api = world.pool(standby=standby)
            world.advance(5)
            api.always["list"] = Refuse(UnavailableError("down"))
            world.advance(400)
            self.assertEqual(reason, pool.not_ready_reason)

            del api.always["list"]
            world.advance(60)
            self.assertIsNone(pool.not_ready_reason)
            self.start(pool.close())
            world.advance(5)

    def test_not_ready_as_soon_as_a_machine_gets_no_response(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(2)
        self.api.always["*"] = Refuse(UnavailableError("down"))
        self.assertIsNone(self.pool.not_ready_reason)  # no call was made
        entries = [self.pool.allocate("c") for _ in range(2)]
        self.world.advance(1)
        self.assertEqual("the Machines API is failing", self.pool.not_ready_reason)

        del self.api.always["*"]
        self.world.advance(40)
        for entry in entries:
            self.successResultOf(entry)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_ready_after_a_machine_failed_and_the_api_answered(self) -> None:
        self.world.never_ready.add(self.allocated().machine.id)
        self.allocated().release()
        lists = self.api.count("list")
        self.world.advance(2)
        self.api.next("start", Hang())
        waiting = self.pool.allocate("c")
        self.world.advance(60)

        self.assertEqual(lists + 1, self.api.count("list"))
        self.assertIsNone(self.pool.not_ready_reason)
        self.successResultOf(waiting)

    def test_not_ready_while_failed_machines_occupy_all_slots(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(2)
        self.api.always["start"] = self.api.always["destroy"] = Refuse(UnavailableError("broken"))
        entries = [self.pool.allocate("c") for _ in range(2)]
        self.world.advance(60)
        self.assertEqual("machines cannot be started", self.pool.not_ready_reason)

        self.api.always.clear()
        self.world.advance(40)
        for entry in entries:
            self.successResultOf(entry)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_check_requested_during_reconciliation_follows_it(self) -> None:
        self.allocated().release()
        self.world.advance(2)
        other, others = self.world.pool("q", start=False)
        others.always["get_lease"] = Slow(self.world.clock, 5.0)
        other.start()
        self.world.advance(1)
        other._reconciler.check_soon()
        self.world.advance(10)

        self.assertIsNone(other.not_ready_reason)
        self.assertEqual(2, others.count("list"))
        self.close(other)

    def test_not_ready_after_reconciliation_lost_the_api(self) -> None:
        self.allocated().release()
        self.world.advance(2)
        other, others = self.world.pool("q", start=False)
        others.always["get_lease"] = Refuse(UnavailableError("gone"))
        others.next("list", Slow(self.world.clock, 1.0), *[Refuse(UnavailableError("gone"))] * 9)
        other.start()
        self.world.advance(2)
        self.assertEqual("the Machines API is failing", other.not_ready_reason)
        self.world.advance(60)
        self.assertIsNone(other.not_ready_reason)
        self.close(other)

    def test_repeated_checks_are_backed_off_and_list_only(self) -> None:
        other, others = self.world.pool("q")
        self.allocated(other).release()
        self.world.advance(2)
        self.assertEqual(1, self.api.count("list"))
        calls = self.api.count("get_lease")
        for _ in range(100):
            self.pool._reconciler.check_soon()
            self.world.advance(1)

        self.assertTrue(5 <= self.api.count("list") <= 20, self.api.count("list"))
        self.assertEqual(calls, self.api.count("get_lease"))
        self.assertIsNone(self.pool.not_ready_reason)
        self.assertEqual(1, others.count("list"))
        self.close(other)

    def test_unresponsive_worker_causes_no_check_of_the_api(self) -> None:
        first = self.allocated()
        first.release()
        self.world.never_ready.add(first.machine.id)
        self.world.advance(2)
        self.allocated(within=40)

        self.assertEqual(1, self.api.count("list"))


class StandbyTests(PoolCase):
    def start_standby(self, standby: int = 1, *, size: int = 2, suspend_standby: bool = False) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(size=size, standby=standby, suspend_standby=suspend_standby)
        self.addCleanup(self.end, self.pool)
        self.world.advance(5)

    def end(self, pool: Pool) -> None:
        # A monitor of a standby machine must not be left to the garbage collector.
        self.start(pool.close())
        self.world.advance(1)

    def test_standby_machine_is_allocated_at_once_without_a_call(self) -> None:
        self.start_standby()
        self.assertEqual([State.STARTED], self.states())
        calls = len(self.api.calls)

        entry = self.pool.allocate("c")

        first = self.successResultOf(entry)
        self.assertEqual(calls, len(self.api.calls))
        self.world.advance(5)
        self.assertEqual(1, self.pool.count(Phase.READY))
        self.assertNotEqual(first.machine.id, self.allocated(within=0).machine.id)

    def test_used_machine_is_stopped_before_standby(self) -> None:
        self.start_standby(size=1)
        first = self.allocated(within=0)
        waiting = self.pool.allocate("c")
        first.release()
        self.world.advance(0.3)
        self.assertNoResult(waiting)
        self.world.advance(5)

        self.assertEqual(first.machine.id, self.successResultOf(waiting).machine.id)
        self.assertEqual((1, 1), (self.api.count("stop"), self.api.count("create")))
        self.assertGreaterEqual(self.api.count("start"), 1)

    def test_surplus_machines_are_stopped(self) -> None:
        self.start_standby(size=3)
        for allocation in [self.allocated(), self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(5)

        self.assertEqual([State.STARTED, State.STOPPED, State.STOPPED], self.states())

    def test_lease_of_a_standby_machine_is_renewed(self) -> None:
        for suspend_standby in (False, True):
            self.start_standby(suspend_standby=suspend_standby)
            [machine] = self.machines()
            for _ in range(10):
                self.world.advance(150)
                lease = self.successResultOf(self.start(self.world.machines.get_lease(machine.id)))
                self.assertGreater(lease.expires_at - EPOCH - self.world.clock.seconds(), 150)

            self.assertEqual([machine.id], [other.id for other in self.machines()])
            self.assertEqual(machine.id, self.allocated().machine.id)

    def test_standby_machine_is_leased_until_it_is_destroyed(self) -> None:
        self.start_standby()
        [machine] = self.machines()
        self.api.always["refresh_lease"] = Refuse(UnavailableError("down"))
        while machine.id in {other.id for other in self.machines()}:
            self.assertLess(self.world.clock.seconds(), 600)
            self.successResultOf(self.start(self.world.machines.get_lease(machine.id)))
            self.world.advance(1)

        self.assertGreaterEqual(self.api.count("refresh_lease"), 3)

    def test_standby_machine_that_ends_is_replaced(self) -> None:
        self.start_standby()
        [machine] = self.machines()
        lease = self.successResultOf(self.start(self.world.machines.get_lease(machine.id)))
        self.successResultOf(self.start(self.world.machines.stop(machine.id, lease.nonce)))
        self.world.advance(5)
        self.assertEqual((1, [State.STARTED]), (self.pool.count(Phase.READY), self.states()))

        self.successResultOf(self.start(self.world.machines.destroy(machine.id, lease.nonce)))
        self.world.advance(5)

        self.assertEqual((1, [State.STARTED]), (self.pool.count(Phase.READY), self.states()))
        self.assertNotEqual([machine.id], [other.id for other in self.machines()])

    def test_failing_creations_for_standby_are_backed_off(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(standby=2, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.always["create"] = Refuse(CapacityError("full"))
        self.pool.start()
        self.world.advance(120)
        self.assertLess(self.api.count("create"), 40)
        entry = self.pool.allocate("c")
        del self.api.always["create"]
        self.world.advance(40)

        self.successResultOf(entry)
        self.assertEqual(1, self.pool.count(Phase.READY))

    def test_failing_suspensions_are_backed_off_and_requests_served(self) -> None:
        self.start_standby(suspend_standby=True)
        self.allocated().release()
        self.api.always["suspend"] = Refuse(RejectedError("it has too much memory"))
        self.world.advance(5)
        for _ in range(20):
            self.world.advance(57)
            suspended, created = self.api.count("suspend"), self.api.count("create")
            self.allocated(within=5).release()
            self.assertLess(created, 5)

        self.world.advance(120)
        self.assertLess(self.api.count("suspend") - suspended, 20)

    def test_failing_suspensions_do_not_delay_creations(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(size=4, standby=1, suspend_standby=True, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.always["suspend"] = Refuse(RejectedError("it has too much memory"))
        self.pool.start()
        self.world.advance(120)
        self.assertLess(self.api.count("create"), 4)

        for _ in range(4):
            self.allocated(within=2)
        self.assertEqual(4, self.api.count("create"))

    def test_standby_machine_that_keeps_stopping_is_backed_off(self) -> None:
        self.start_standby()
        for _ in range(600):
            self.world.advance(0.5)
            for machine in self.machines():
                if machine.state is State.STARTED:
                    lease = self.successResultOf(self.start(self.world.machines.get_lease(machine.id)))
                    self.successResultOf(self.start(self.world.machines.stop(machine.id, lease.nonce)))

        self.assertLess(self.api.count("refresh_lease"), 30)
        self.assertEqual(1, self.api.count("create"))

    def test_used_machine_is_stopped_and_never_suspended(self) -> None:
        self.start_standby(suspend_standby=True)
        self.assertEqual([State.SUSPENDED], self.states())

        first = self.allocated()
        self.assertEqual([State.STARTED, State.SUSPENDED], self.states())
        suspended = self.api.count("suspend")
        first.release()
        self.world.advance(5)

        self.assertEqual([State.STOPPED, State.SUSPENDED], self.states())
        self.assertEqual((2, 1), (suspended, self.api.count("stop")))

    def test_time_in_standby_is_no_part_of_a_turnaround(self) -> None:
        self.start_standby(size=1)
        for _ in range(30):
            self.allocated(within=2).release()
            self.world.advance(60)
        self.allocated(within=2)

        # A second for a start, two for a run, half a second for a stop.
        self.assertApproximates(3.5, self.pool.expected_wait, 0.2)

    def test_suspended_machine_is_resumed_while_others_are_created(self) -> None:
        self.start_standby(2, size=3, suspend_standby=True)
        self.api.always["create"] = Slow(self.world.clock, 60)
        self.allocated()
        self.assertEqual(1, self.pool.count(Phase.CREATING))

        self.allocated()
        self.assertEqual([State.STARTED, State.STARTED], self.states())

    def test_suspended_machine_is_preferred_to_one_being_suspended(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(standby=2, suspend_standby=True, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.next("suspend", Slow(self.world.clock, 15))
        self.pool.start()
        self.world.advance(5)
        self.assertEqual([State.STARTED, State.SUSPENDED], self.states())

        self.allocated()

    def test_tampered_standby_machine_is_not_used(self) -> None:
        self.start_standby()
        [machine] = self.machines()
        self.world.machines.set_metadata(machine.id, "pool_id", "q//i")
        self.world.advance(400)

        self.assertNotEqual(machine.id, self.allocated(within=0).machine.id)

    def test_close_stops_standby_machines(self) -> None:
        for suspend_standby in (False, True):
            self.start_standby(2, suspend_standby=suspend_standby)
            self.close(within=5)

            self.assertEqual([State.STOPPED, State.STOPPED], self.states())
            self.assert_nothing_pending()

    def test_close_at_any_moment_of_a_suspension(self) -> None:
        for method in ("suspend", "wait"):
            for moment in range(24):
                self.world = World()
                self.pool, self.api = self.world.pool(standby=1, suspend_standby=True, start=False)
                self.addCleanup(self.end, self.pool)
                slow = Slow(self.world.clock, 0.5)
                self.api.next(method, *([slow] if method == "suspend" else [Fault(), slow]))
                self.pool.start()
                self.world.advance(0.5 + moment * 0.05)
                self.close(within=5)

                self.assertEqual([State.STOPPED], self.states())
                self.assert_nothing_pending()

    def test_machine_found_unusable_during_suspension_is_destroyed(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(standby=1, suspend_standby=True, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.next("suspend", Slow(self.world.clock, 3.0))
        self.pool.start()
        self.world.advance(2)
        [tampered] = self.machines()
        for slot in self.pool._slots:
            slot.unusable = True  # as a reconciliation at this moment would set it
            slot.wake(wanted=False)
        self.world.advance(10)

        self.assertNotIn(tampered.id, [machine.id for machine in self.machines()])


class LeaseTests(PoolCase):
    def test_lease_is_extended_at_allocation(self) -> None:
        self.allocated().release()
        self.world.advance(200)
        allocation = self.allocated()

        lease = self.successResultOf(self.start(self.world.machines.get_lease(allocation.machine.id)))
        self.assertGreater(lease.expires_at - EPOCH - self.world.clock.seconds(), 290)

    def test_machine_is_used_with_the_rest_of_its_lease(self) -> None:
        self.allocated().release()
        self.world.advance(200)
        self.api.always["refresh_lease"] = Refuse(UnavailableError("no"))

        self.allocated()

        self.assertEqual(1, self.api.count("create"))

    def test_machine_whose_lease_does_not_cover_a_request_is_replaced(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(270)
        self.api.always["refresh_lease"] = Hang()

        second = self.allocated(within=30)

        self.assertNotEqual(first.machine.id, second.machine.id)
        self.assertEqual(1, len(self.machines()))

    def test_stopped_machine_is_destroyed_before_its_lease_expires(self) -> None:
        self.allocated().release()
        self.world.advance(299)

        self.assertEqual([], self.machines())

    def test_machine_whose_lease_was_lost_is_not_used(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(60)
        self.api.next("refresh_lease", Refuse(LeaseHeldError("another's")))

        second = self.allocated()

        self.assertNotEqual(first.machine.id, second.machine.id)


class FailureTests(PoolCase):
    def test_creation_with_a_lost_response_counts_once(self) -> None:
        self.api.next("create", LoseResponse())
        entries = [self.pool.allocate("c"), self.pool.allocate("c"), self.pool.allocate("c")]
        self.world.advance(10)

        served = [self.successResultOf(entry) for entry in entries[:2]]
        self.assertNoResult(entries[2])
        self.assertEqual(2, len(self.machines()))
        self.assertEqual(2, len({allocation.machine.id for allocation in served}))
        names = [argument for method, argument in self.api.calls if method == "create"]
        self.assertEqual(2, len(set(names)))
        entries[2].addErrback(lambda failure: failure.trap(CancelledError) and None)
        entries[2].cancel()

    def test_creation_keeps_its_slot_while_the_machine_is_searched_for(self) -> None:
        cases = (
            ("create", LoseResponse(), "get", Refuse(UnavailableError("500"))),
            ("create", LoseResponse(), "get_lease", Refuse(UnavailableError("500"))),
            ("create", LoseResponse(), "create", Refuse(CapacityError("full"))),
        )
        for first, fault, second, other in cases:
            world = self.world = World()
            pool, api = world.pool(size=1)
            api.next(first, fault)
            api.next(second, other)
            entry = pool.allocate("c")
            world.advance(20)

            self.assertEqual([self.successResultOf(entry).machine.id], [m.id for m in self.machines()])

    def test_late_duplicate_of_a_vanished_machine_is_destroyed(self) -> None:
        pool, api = self.world.pool("q", size=1)
        api.next("create", LoseResponse())
        first = self.allocated(pool, within=10)
        first.release()
        self.world.advance(2)
        [name] = [argument for method, argument in api.calls if method == "create"][:1]
        lease = self.successResultOf(self.start(self.world.machines.get_lease(first.machine.id)))
        self.successResultOf(self.start(self.world.machines.destroy(first.machine.id, lease.nonce)))
        self.successResultOf(self.start(self.world.machines.create(name, "r", MachineConfig("i"), 300)))
        self.world.advance(100)

        second = self.allocated(pool, within=10)

        self.assertEqual([second.machine.id], [machine.id for machine in self.machines()])

    def test_failing_creations_keep_no_slot_and_are_backed_off(self) -> None:
        self.api.always["create"] = Refuse(CapacityError("full"))
        entry = self.pool.allocate("c")
        self.world.advance(60)
        self.assertLess(self.api.count("create"), 25)
        self.assertGreater(self.api.count("create"), 5)
        del self.api.always["create"]
        self.world.advance(40)

        self.successResultOf(entry)
        self.allocated()

    def test_machines_are_created_one_at_a_time_at_the_rate_limit(self) -> None:
        self.world = World(limited=True)
        self.pool, self.api = self.world.pool(size=20)
        self.world.advance(1)
        self.api.always["create"] = Slow(self.world.clock, 0.1)
        entries = [self.pool.allocate("c") for _ in range(20)]
        self.world.advance(60)

        for entry in entries:
            self.successResultOf(entry)
        # Three calls succeed at once, and one a second after that. Twenty independent slots would make 600.
        self.assertLess(self.api.count("create"), 200)
        self.assertEqual(1, self.api.count("list"))  # no check of the API

    def test_creation_with_a_lost_response_keeps_its_slot_at_the_rate_limit(self) -> None:
        self.api.next("create", LoseResponse(), *[Refuse(RateLimitedError("429"))] * 5)
        self.allocated(within=30)

        self.assertEqual(1, len(self.machines()))
        self.assertEqual(1, len({argument for method, argument in self.api.calls if method == "create"}))

    def test_creation_known_by_its_name_keeps_its_slot_at_the_rate_limit(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(size=1)
        self.world.advance(1)
        self.api.next("create", Twice())
        self.api.next("get", Refuse(RateLimitedError("429")))
        self.allocated(within=20)

        self.assertEqual(1, len(self.machines()))

    def test_machine_that_does_not_start_is_replaced(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.api.next("wait", Refuse(WaitTimeoutError("stuck")))

        second = self.allocated(within=10)

        self.assertNotEqual(first.machine.id, second.machine.id)
        self.assertEqual([second.machine.id], [machine.id for machine in self.machines()])

    def test_machine_with_an_unresponsive_worker_is_replaced(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.world.never_ready.add(first.machine.id)
        entry = self.pool.allocate("c")
        self.world.advance(45)

        self.assertNotEqual(first.machine.id, self.successResultOf(entry).machine.id)

    def end_by_itself(self, machine_id: str) -> None:
        """End a machine as the exit of its worker does."""
        self.world.machines._run_in_background(
            self.world.machines._stop(self.world.machines._entries[machine_id])
        )

    def test_machine_whose_worker_ends_during_the_start_is_replaced_at_once(self) -> None:
        for ends_after in (0.7, 1.2, 4.0):  # before the start, and before the worker is ready
            self.world = World()
            self.pool, self.api = self.world.pool()
            self.world.none_ready = True
            entry = self.pool.allocate("c")
            self.world.advance(ends_after)
            [machine] = self.machines()
            self.world.none_ready = False

            self.end_by_itself(machine.id)
            self.world.advance(4)

            second = self.successResultOf(entry)
            self.assertNotEqual(machine.id, second.machine.id)
            self.assertEqual([second.machine.id], [machine.id for machine in self.machines()])

    def test_machine_that_cannot_boot_is_replaced_at_once(self) -> None:
        for state in (State.FAILED, State.LAUNCH_FAILED, State.STOPPED):
            first = self.allocated()
            first.release()
            self.world.advance(2)
            entry = self.pool.allocate("c")
            self.world.advance(0.2)
            emulated = self.world.machines._entries[first.machine.id]
            emulated.generation += 1
            self.world.machines._set_state(emulated, state)
            self.world.advance(3)

            second = self.successResultOf(entry)
            self.assertNotEqual(first.machine.id, second.machine.id)
            second.release()
            self.world.advance(2)

    def test_prompt_worker_costs_no_second_wait(self) -> None:
        self.allocated()

        self.assertEqual(1, self.api.count("wait"))

    def test_failing_api_does_not_end_the_wait_for_a_slow_worker(self) -> None:
        self.world.none_ready = True
        entry = self.pool.allocate("c")
        self.world.advance(1.2)
        self.api.always["wait"] = Refuse(UnavailableError("500"))
        self.world.advance(10)
        self.assertNoResult(entry)
        self.assertEqual(([State.STARTED], 1), (self.states(), self.api.count("create")))
        self.api.always.clear()
        entry.addErrback(lambda failure: failure.trap(PoolClosedError) and None)
        self.close()
        self.assert_nothing_pending()

    def test_migrating_machine_is_waited_for_under_its_new_version(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.world.machines.migrate_at_start(first.machine.id)

        second = self.allocated(within=3)

        self.assertEqual(first.machine.id, second.machine.id)
        self.assertNotEqual(first.machine.instance_id, second.machine.instance_id)
        second.release()
        self.world.advance(2)
        self.assertEqual([State.STOPPED], self.states())
        self.assertEqual(first.machine.id, self.allocated().machine.id)

    def test_start_with_a_lost_response_counts(self) -> None:
        for refusal in ("unable to start machine from current state: 'started'", "still attempting to start"):
            for seconds in (0.0, 0.3):
                first = self.allocated()
                first.release()
                self.world.advance(2)
                self.api.next("start", LostStart(self.world.clock, seconds, NotReadyError(refusal)))
                self.world.machines.migrate_at_start(first.machine.id)

                second = self.allocated(within=3)

                self.assertEqual(first.machine.id, second.machine.id)
                second.release()
                self.world.advance(2)
        self.assertEqual(1, self.api.count("create"))

    def test_image_that_is_not_available_yet_is_retried(self) -> None:
        # This happens for some 15 s after a push.
        self.api.always["create"] = Refuse(RejectedError("400 MANIFEST_UNKNOWN: manifest unknown"))
        entry = self.pool.allocate("c")
        self.world.advance(15)
        self.assertNoResult(entry)
        del self.api.always["create"]
        self.world.advance(15)

        self.successResultOf(entry)

    def test_machine_is_not_reused_before_its_stop_is_confirmed(self) -> None:
        for fault in (Refuse(UnavailableError("500")), LoseResponse(), Hang()):
            first = self.allocated(within=40)
            self.api.next("stop", fault)
            first.release()
            self.world.advance(40)

            second = self.allocated()
            self.assertNotEqual(first.machine.id, second.machine.id)
            second.release()
            self.world.advance(2)

    def test_failing_destruction_is_retried(self) -> None:
        first = self.allocated()
        self.api.next("stop", Refuse(WaitTimeoutError("stuck")))
        self.api.next("destroy", *[Refuse(UnavailableError("500"))] * 4)
        first.release()
        self.world.advance(20)

        self.assertEqual([], self.machines())
        self.assertEqual(5, self.api.count("destroy"))

    def test_vanished_machine_is_replaced(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.api.next("start", Refuse(NotFoundError("gone")))

        self.assertNotEqual(first.machine.id, self.allocated().machine.id)

    def test_destroyed_machine_is_replaced_at_once(self) -> None:
        for refusal in (NotFoundError("gone"), NotReadyError("unable to start machine: 'destroyed'")):
            first = self.allocated()
            first.release()
            self.world.advance(2)
            lease = self.successResultOf(self.start(self.world.machines.get_lease(first.machine.id)))
            self.successResultOf(self.start(self.world.machines.destroy(first.machine.id, lease.nonce)))
            self.api.next("refresh_lease", Refuse(UnavailableError("500")))
            self.api.next("start", Refuse(refusal))

            second = self.allocated()

            self.assertNotEqual(first.machine.id, second.machine.id)
            second.release()
            self.world.advance(2)

    def test_pool_recovers_from_hanging_calls(self) -> None:
        for method in ("create", "refresh_lease", "start", "wait", "stop", "destroy"):
            self.api.next(method, Hang())
            for _ in range(2):
                allocation = self.allocated(within=250)
                allocation.release()
                self.world.advance(100)
        self.assertEqual(2, len([self.allocated(), self.allocated()]))


class ShutdownTests(PoolCase):
    def test_close_stops_all_machines_and_leaves_no_timers(self) -> None:
        busy, idle = self.allocated(), self.allocated()
        idle.release()
        self.world.advance(3)
        closing = self.start(self.pool.close())
        self.world.advance(5)
        self.assertNoResult(closing)
        busy.release()
        self.world.advance(5)

        self.successResultOf(closing)
        self.assertEqual([State.STOPPED, State.STOPPED], self.states())
        self.assert_nothing_pending()

    def test_close_at_any_moment_of_a_start(self) -> None:
        for moment in range(40):
            world = self.world = World()
            pool, _ = world.pool()
            entries = [pool.allocate("c") for _ in range(3)]
            world.advance(moment * 0.05)
            closing = self.start(pool.close())
            for entry in entries:
                if isinstance(entry.result, Allocation):
                    entry.result.release()
                else:
                    self.failureResultOf(entry, PoolClosedError)
            world.advance(10)

            self.successResultOf(closing)
            self.assertEqual({State.STOPPED}, set(self.states()) or {State.STOPPED})
            self.assert_nothing_pending()

    def test_close_does_not_wait_for_readiness(self) -> None:
        for method in ("wait", "probe"):
            self.setUp()
            if method == "wait":
                self.api.always["wait"] = Hang()
            entry = self.pool.allocate("c")
            entry.addErrback(lambda failure: failure.trap(PoolClosedError) and None)
            self.world.none_ready = method == "probe"
            self.world.advance(3)
            self.api.always.clear()
            self.close(within=3)

            self.assertEqual([State.STOPPED], self.states())
            self.assert_nothing_pending()

    def test_destroy_leaves_no_machines_and_no_timers(self) -> None:
        first, second = self.allocated(), self.allocated()
        second.release()
        first.release()
        self.api.next("destroy", Refuse(UnavailableError("500")))
        destroying = self.start(self.pool.destroy())
        self.world.advance(10)

        self.successResultOf(destroying)
        self.assertEqual([], self.machines())
        self.assert_nothing_pending()

    def test_destroy_does_not_stop_machines_first(self) -> None:
        allocation = self.allocated()
        self.allocated().release()
        self.world.advance(2)
        destroying = self.start(self.pool.destroy())
        self.world.advance(1)
        stops = self.api.count("stop")
        self.assertEqual([State.STARTED], self.states())  # the run continues
        self.assertNoResult(destroying)

        allocation.release()
        self.world.advance(1)

        self.successResultOf(destroying)
        self.assertEqual(([], 1, stops), (self.machines(), stops, self.api.count("stop")))

    def test_destroy_ends_in_time_when_calls_hang(self) -> None:
        # There is a machine in each phase that makes calls, and one call or all of them hang.
        for method in ("*", "create", "start", "wait", "stop", "suspend", "destroy", "list", "get_lease"):
            for waits in (0.5, 3.0):
                world = self.world = World()
                before, _ = world.pool(size=1)
                self.allocated(before).release()
                world.advance(3)
                pool, api = world.pool(size=4, standby=2, suspend_standby=True)
                world.advance(2)
                allocation = self.allocated(pool, within=10)
                api.always[method] = Hang()
                pool.allocate("c").addErrback(lambda failure: failure.trap(PoolClosedError) and None)
                world.advance(waits)
                destroying = self.start(pool.destroy())
                world.advance(MAX_REQ_TIME)
                allocation.release()
                world.advance(StepTimeouts().exit + 0.1)

                self.successResultOf(destroying)
                if method in ("create", "start", "wait", "stop", "suspend"):
                    self.assertEqual([], self.machines(), method)
                api.always.clear()
                world.advance(100)
                self.flushLoggedErrors()

    def test_destroy_continues_after_a_failed_call(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(3)
        self.close()
        again, api = self.world.pool(start=False)
        api.next("destroy", Refuse(NotReadyError("412")))
        destroying = self.start(again.destroy())
        self.world.advance(30)

        self.successResultOf(destroying)
        self.assertEqual([], self.machines())
        self.assertEqual(3, api.count("destroy"))

    def test_destroy_during_reconciliation(self) -> None:
        for method in ("list", "get", "get_lease", "release_lease", "acquire_lease", "stop", "wait"):
            world = self.world = World()
            before, _ = world.pool()
            self.allocated(before).release()
            world.advance(3)
            self.close(before)
            pool, api = world.pool(start=False)
            api.next(method, Hang())
            pool.start()
            ending = self.start(pool.destroy())
            world.advance(120)

            self.successResultOf(ending)
            self.assertEqual([], self.machines(), method)
            self.assert_nothing_pending()

    def test_closed_pool_allocates_nothing(self) -> None:
        self.close()

        self.failureResultOf(self.pool.allocate("c"), PoolClosedError)

    def test_destroy_ends_when_every_call_fails_or_hangs(self) -> None:
        for fault in (Refuse(UnavailableError("500")), Hang()):
            world = self.world = World()
            pool, api = world.pool()
            allocation = self.allocated(pool)
            pool.allocate("c").addErrback(lambda failure: failure.trap(PoolClosedError) and None)
            api.always["*"] = fault
            allocation.release()
            ending = self.start(pool.destroy())
            world.advance(300)

            self.successResultOf(ending)
            self.assert_nothing_pending()
            self.flushLoggedErrors()


class ReconciliationTests(PoolCase):
    def test_next_instance_adopts_stopped_machines(self) -> None:
        self.allocated().release()
        self.world.advance(3)
        self.close()
        [left] = self.machines()
        again, api = self.world.pool()
        self.world.advance(3)

        allocation = self.allocated(again)

        self.assertEqual(left.id, allocation.machine.id)
        self.assertEqual(0, api.count("create"))

    def test_machine_left_running_by_a_crash_is_stopped_before_use(self) -> None:
        crashed = self.allocated()
        crash(self.api)
        again, api = self.world.pool()

        allocation = self.allocated(again)

        self.assertEqual(crashed.machine.id, allocation.machine.id)
        self.assertEqual(1, api.count("stop"))
        self.assertEqual(0, api.count("create"))

    def test_pool_name_with_dashes_is_not_confused_with_its_prefix(self) -> None:
        one, _ = self.world.pool("a-b")
        self.allocated(one).release()
        self.world.advance(3)
        self.close(one)
        other, _ = self.world.pool("a")
        self.world.advance(3)
        self.assertEqual(0, other.count(Phase.STOPPED))
        again, _ = self.world.pool("a-b")
        self.world.advance(3)

        self.assertEqual(1, again.count(Phase.STOPPED))

    def test_machines_of_other_pools_are_destroyed_when_their_leases_expire(self) -> None:
        self.allocated()
        crash(self.api)
        other, api = self.world.pool("q")
        self.world.advance(290)
        self.assertEqual(1, len(self.machines()))
        self.assertEqual(0, api.count("destroy"))
        self.world.advance(400)

        self.assertEqual([], self.machines())
        self.close(other)

    def test_sample_of_three_machines_decides_about_a_pool(self) -> None:
        crowd, theirs = self.world.pool("r", size=12)
        for _ in range(12):
            self.allocated(crowd)
        other, api = self.world.pool("q", start=False)
        other.start()
        self.world.advance(5)
        self.assertEqual(3, api.count("get_lease"))

        crash(theirs)
        self.world.advance(301 + 1.2 * 300)
        self.assertEqual([], self.machines())
        self.assertEqual(0, self.api.count("destroy"))
        self.close(other)

    def test_machines_of_many_dead_pools_are_destroyed_in_one_interval(self) -> None:
        for number in range(600):
            name = f"worker-dead{number % 30}-{number:016x}"
            self.start(self.world.machines.create(name, "r", MachineConfig("i"), 1))
        self.world.advance(3)
        other, api = self.world.pool("q", start=False)
        for method in ("get", "get_lease", "destroy"):
            api.always[method] = Slow(self.world.clock, 0.3)
        other.start()
        self.world.advance(280)

        self.assertEqual([], self.machines())
        self.assertIsNone(other.not_ready_reason)
        self.close(other)

    def test_own_machines_are_inspected_concurrently(self) -> None:
        before, _ = self.world.pool("many", size=40)
        for allocation in [self.allocated(before) for _ in range(40)]:
            allocation.release()
        self.close(before)
        again, api = self.world.pool("many", size=40, start=False)
        api.always["get"] = Slow(self.world.clock, 0.5)
        again.start()
        self.allocated(again, within=5).release()

        self.assertEqual(40, api.count("get"))
        self.close(again)

    def test_machine_that_cannot_be_inspected_is_replaced(self) -> None:
        first, second = self.allocated(), self.allocated()
        first.release()
        second.release()
        self.world.advance(2)
        self.close()
        again, api = self.world.pool(start=False)
        api.next("get", Refuse(UnavailableError("500")), Refuse(UnavailableError("500")))
        again.start()
        served = self.allocated(again)
        self.world.advance(5)
        self.assertEqual([served.machine.id], [machine.id for machine in self.machines()])
        self.assertNotIn(served.machine.id, {first.machine.id, second.machine.id})

    def test_known_machine_is_kept_when_its_inspection_fails(self) -> None:
        pool, api = self.world.pool("s", standby=1)
        self.world.advance(5)
        [machine] = self.machines()
        api.always["get"] = Refuse(UnavailableError("500"))
        self.world.advance(400)

        self.assertEqual([machine.id], [other.id for other in self.machines()])
        self.assertEqual(1, pool.count(Phase.READY))
        self.close(pool)

    def test_machine_with_changed_metadata_is_destroyed_by_its_pool_only(self) -> None:
        for value in (None, "q//i", "p//j"):
            world = self.world = World()
            pool, _ = world.pool()
            other, others = world.pool("q")
            allocation = self.allocated(pool)
            world.machines.set_metadata(allocation.machine.id, "pool_id", value)
            world.advance(2)
            self.assertEqual(0, others.count("destroy"))
            allocation.release()
            world.advance(400)
            self.assertEqual([], self.machines())
            self.close(pool)
            self.close(other)

    def test_machine_found_unusable_during_its_start_does_not_serve(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(238)
        self.world.machines.set_metadata(first.machine.id, "pool_id", None)
        entry = self.pool.allocate("c")
        for slot in self.pool._slots:
            slot.unusable = True  # as a reconciliation at this moment would set it
        self.world.advance(10)

        self.assertNotEqual(first.machine.id, self.successResultOf(entry).machine.id)

    def test_machine_of_another_template_is_replaced(self) -> None:
        for other in ({"image": "new"}, {"PUBLIC": "another key"}):
            world = self.world = World()
            before, _ = world.pool()
            self.allocated(before).release()
            world.advance(3)
            self.close(before)
            [old] = self.machines()
            again, _ = world.pool(**other)  # type: ignore[arg-type]
            world.advance(3)

            allocation = self.allocated(again)

            self.assertNotEqual(old.id, allocation.machine.id)
            self.assertEqual([allocation.machine.id], [machine.id for machine in self.machines()])

    def test_smaller_pool_destroys_surplus_machines(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(3)
        self.close()
        again, _ = self.world.pool(size=1)
        self.world.advance(5)

        self.assertEqual(1, len(self.machines()))
        self.assertEqual(1, again.count(Phase.STOPPED))

    def test_failed_call_does_not_stop_reconciliation(self) -> None:
        crash(self.api)
        for name in ("a", "b"):
            pool, crashing = self.world.pool(name)
            self.allocated(pool)
            crash(crashing)
        self.world.advance(301)
        other, api = self.world.pool("q", start=False)
        api.next("get", Refuse(UnavailableError("500")))
        other.start()
        self.world.advance(20)
        self.assertEqual(1, len(self.machines()))
        self.world.advance(400)

        self.assertEqual([], self.machines())
        self.close(other)

    def test_machine_leased_again_is_left(self) -> None:
        stale = self.allocated().machine
        crash(self.api)
        self.world.advance(301)
        fresh = self.successResultOf(self.start(self.world.machines.acquire_lease(stale.id, 1000, "adopted")))
        other, _ = self.world.pool("q")
        self.world.advance(3)

        self.assertEqual([stale.id], [machine.id for machine in self.machines()])
        self.assertEqual(12, len(fresh.nonce))
        self.close(other)

    def test_machine_being_adopted_is_left(self) -> None:
        first = self.allocated()
        crash(self.api)
        again, api = self.world.pool(start=False)
        api.next("acquire_lease", Slow(self.world.clock, 2.0))
        again.start()
        other, others = self.world.pool("q", start=False)
        self.world.advance(0.1)
        other.start()
        self.world.advance(30)

        self.assertEqual(2, others.count("get_lease"))
        self.assertEqual(0, others.count("destroy"))
        self.assertEqual([first.machine.id], [machine.id for machine in self.machines()])
        self.close(again)
        self.close(other)

    def test_machines_of_no_pool_are_left(self) -> None:
        self.successResultOf(self.start(self.world.machines.create("postgres-1", "r", MachineConfig("i"), 0)))
        self.world.advance(700)

        self.assertEqual(1, len(self.machines()))

    def test_nothing_is_created_before_the_machines_are_listed(self) -> None:
        self.allocated().release()
        self.world.advance(3)
        self.close()
        again, api = self.world.pool(size=1, start=False)
        api.next("list", Hang(), Refuse(UnavailableError("500")))
        again.start()
        entry = again.allocate("c")
        self.world.advance(15)
        self.assertNoResult(entry)
        self.world.advance(15)

        self.successResultOf(entry)
        self.assertEqual(0, api.count("create"))
