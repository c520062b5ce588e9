"""The pool, over machines in memory, in simulated time, with faults."""

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
    """A start is done, its answer is lost, and the call that repeats it is refused."""

    def __init__(self, clock: Clock, seconds: float, refusal: NotReadyError) -> None:
        self.clock, self.seconds, self.refusal = clock, seconds, refusal

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        await call()
        await deferLater(self.clock, self.seconds)
        raise self.refusal


class World:
    """One app's machines, and pools that share it, on one clock."""

    def __init__(self, timing: Timing | None = None, *, limited: bool = False) -> None:
        self.clock = Clock()
        timing = timing or Timing(boot=1.0, stop=0.5, stop_cooldown=0.4)
        self.machines = EmulatedMachines(
            self.clock, lambda: EPOCH + self.clock.seconds(), timing=timing, rate_limited=limited
        )
        self.never_ready: set[str] = set()
        self.nobody_ready = False

    async def wait_until_ready(self, machine: Machine) -> None:
        if machine.id in self.never_ready or self.nobody_ready:
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
        settings = PoolConfig(
            name=name,
            size=size,
            region="r",
            template=MachineConfig(image, env),
            max_req_time=MAX_REQ_TIME,
            lease_ttl=lease_ttl(MAX_REQ_TIME),
            standby=standby,
            suspend_standby=suspend_standby,
        )
        pool = Pool(api, self, self.clock, Random(1), settings)
        if start:
            pool.start()
        return pool, api

    def advance(self, seconds: float) -> None:
        # In steps, since what falls due in one starts its own timers from there.
        self.clock.pump([0.05] * round(seconds / 0.05))


def crash(api: FaultyMachines) -> None:
    """Let a pool have no more effect on the world, and the world none on it."""
    api.always["*"] = Hang()


class PoolCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool()

    def machines(self) -> list[Machine]:
        return self.successResultOf(Deferred.fromCoroutine(self.world.machines.list()))

    def states(self) -> list[State]:
        return sorted(machine.state for machine in self.machines())

    def begin(self, work: Coroutine[Deferred[Any], Any, Any]) -> Deferred[Any]:
        return Deferred.fromCoroutine(work)

    def allocated(self, pool: Pool | None = None, within: float = 5) -> Allocation:
        place = (pool or self.pool).allocate("c")
        self.world.advance(within)
        return self.successResultOf(place)

    def close(self, pool: Pool | None = None, within: float = 60) -> None:
        closing = self.begin((pool or self.pool).close())
        self.world.advance(within)
        self.successResultOf(closing)

    def assert_nothing_pending(self) -> None:
        self.world.advance(61)  # the time for which destroyed machines are remembered
        self.assertEqual([], self.world.clock.getDelayedCalls())


class AllocationTests(PoolCase):
    def test_a_request_gets_a_started_machine_that_names_its_owner(self) -> None:
        allocation = self.allocated()

        [machine] = self.machines()
        self.assertEqual(allocation.machine.id, machine.id)
        self.assertEqual(State.STARTED, machine.state)
        self.assertEqual("p", pool_of(machine.name))
        self.assertEqual("p//i", machine.metadata["pool_id"])

    def test_a_released_machine_is_stopped_and_serves_again(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.assertEqual([State.STOPPED], self.states())

        second = self.allocated()

        self.assertEqual(first.machine.id, second.machine.id)
        self.assertEqual(1, self.api.count("create"))
        self.assertEqual(1, self.api.count("stop"))

    def test_requests_beyond_the_size_wait_their_turn(self) -> None:
        places = [self.pool.allocate("c") for _ in range(5)]
        self.world.advance(5)
        served = [self.successResultOf(place) for place in places[:2]]
        for place in places[2:]:
            self.assertNoResult(place)

        served[0].release()
        self.world.advance(5)
        third = self.successResultOf(places[2])
        self.assertNoResult(places[3])
        served[1].release()
        self.world.advance(5)

        self.assertEqual(served[0].machine.id, third.machine.id)
        self.assertEqual(served[1].machine.id, self.successResultOf(places[3]).machine.id)
        self.assertEqual(2, len(self.machines()))
        places[4].cancel()
        self.failureResultOf(places[4], CancelledError)

    def test_a_request_that_leaves_the_line_takes_nothing_with_it(self) -> None:
        place = self.pool.allocate("c")
        self.world.advance(0.2)
        place.cancel()
        self.failureResultOf(place, CancelledError)
        self.world.advance(5)

        self.assertEqual([State.STOPPED], self.states())
        self.assertEqual(1, self.pool.count(Phase.STOPPED))
        self.allocated()
        self.assertEqual(1, self.api.count("create"))

    def test_a_machine_is_released_once(self) -> None:
        allocation = self.allocated()
        allocation.release()

        self.assertRaises(RuntimeError, allocation.release)

    def test_next_in_line_counts_the_machines_that_have_to_come_free(self) -> None:
        self.assertEqual(0, self.pool.queue_depth_ahead)
        served = [self.allocated(), self.allocated()]
        self.assertEqual(1, self.pool.queue_depth_ahead)
        place = self.pool.allocate("c")

        self.assertEqual(2, self.pool.queue_depth_ahead)
        place.addErrback(lambda failure: failure.trap(CancelledError) and None)
        place.cancel()
        served[0].release()
        self.world.advance(5)
        self.assertEqual(0, self.pool.queue_depth_ahead)

    def test_clients_take_turns(self) -> None:
        served = [self.allocated(), self.allocated()]
        many = [self.pool.allocate("many") for _ in range(5)]
        one = self.pool.allocate("one")
        for allocation in served:
            allocation.release()
        self.world.advance(5)

        self.successResultOf(one)
        self.successResultOf(many[0])
        for place in many[1:]:
            self.assertNoResult(place)
            place.addErrback(lambda failure: failure.trap(CancelledError) and None)
            place.cancel()

    def test_the_expected_wait_follows_the_latest_turns(self) -> None:
        pool, _ = self.world.pool("q", size=1)
        self.assertEqual(0.0, pool.expected_wait)
        allocation = self.allocated(pool)
        for _ in range(30):
            allocation.release()
            self.world.advance(3)
            allocation = self.allocated(pool, within=2)

        # Two seconds of a start and a run, half a second of a stop.
        self.assertApproximates(2.5, pool.expected_wait, 0.2)
        places = [pool.allocate("c"), pool.allocate("d")]
        self.assertApproximates(3 * 2.5, pool.expected_wait, 0.6)
        for place in places:
            place.addErrback(lambda failure: failure.trap(CancelledError) and None)
            place.cancel()

    def test_more_machines_make_the_wait_shorter(self) -> None:
        allocations = [self.allocated() for _ in range(2)]
        self.world.advance(8)
        for allocation in allocations:
            allocation.release()
        self.world.advance(5)
        for _ in range(2):
            self.allocated()

        self.assertApproximates(6.5, self.pool.expected_wait, 2.5)  # half of a start, a run and a stop

    def test_nothing_is_expected_before_anything_is_known(self) -> None:
        for _ in range(2):
            self.allocated()
        places = [self.pool.allocate("c") for _ in range(6)]
        before = self.pool.expected_wait
        self.assertEqual(7, self.pool.queue_depth_ahead)
        self.world.advance(4)

        # Two machines have been in use for four more seconds: a turn takes so long at the least.
        self.assertApproximates(before + 7 / 2 * 4, self.pool.expected_wait, 0.1)
        self.world.advance(10 * MAX_REQ_TIME)
        self.assertEqual(7 / 2 * (MAX_REQ_TIME + StepTimeouts().stop), self.pool.expected_wait)
        for place in places:
            place.addErrback(lambda failure: failure.trap(CancelledError) and None)
            place.cancel()

    def test_one_long_turn_at_first_does_not_count_for_long(self) -> None:
        pool, _ = self.world.pool("q", size=1)
        allocation = self.allocated(pool)
        self.world.advance(MAX_REQ_TIME)
        for _ in range(9):
            allocation.release()
            self.world.advance(3)
            allocation = self.allocated(pool, within=2)

        self.assertLess(pool.expected_wait, 4)

    def test_a_turn_counts_as_a_request_of_full_length_and_a_stop_at_the_most(self) -> None:
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

    def test_a_start_is_tried_again_while_the_stop_is_not_over(self) -> None:
        first = self.allocated()
        place = self.pool.allocate("c")
        self.world.advance(5)
        second = self.successResultOf(place)
        waiting = self.pool.allocate("c")
        first.release()
        self.world.advance(5)

        self.assertEqual(first.machine.id, self.successResultOf(waiting).machine.id)
        # Three calls in a burst are all that the API takes.
        self.assertTrue(2 <= self.api.count("start") <= 3, self.api.count("start"))
        self.assertEqual(0, self.api.count("destroy"))
        second.release()


class TroubleTests(PoolCase):
    def test_none_is_known_of_once_the_pool_has_seen_its_machines(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(start=False)
        self.addCleanup(self.close)
        self.assertEqual("the pool has not listed its machines yet", self.pool.not_ready_reason)
        self.pool.start()
        self.world.advance(1)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_it_is_told_while_machines_cannot_be_made_and_no_longer(self) -> None:
        self.api.always["create"] = Refuse(CapacityError("full"))
        place = self.pool.allocate("c")
        self.world.advance(60)
        self.assertEqual("machines cannot be started", self.pool.not_ready_reason)

        del self.api.always["create"]
        self.world.advance(40)
        self.successResultOf(place)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_it_is_told_while_the_api_does_not_answer_and_no_machine_stands_by(self) -> None:
        for standby, trouble in ((0, "the Machines API is failing"), (1, None)):
            world = World()
            pool, api = world.pool(standby=standby)
            world.advance(5)
            api.always["list"] = Refuse(UnavailableError("down"))
            world.advance(400)
            self.assertEqual(trouble, pool.not_ready_reason)

            del api.always["list"]
            world.advance(60)
            self.assertIsNone(pool.not_ready_reason)
            self.begin(pool.close())
            world.advance(5)

    def test_it_is_told_as_soon_as_a_machine_fails_for_want_of_an_answer(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(2)
        self.api.always["*"] = Refuse(UnavailableError("down"))
        self.assertIsNone(self.pool.not_ready_reason)  # nobody has asked for anything
        places = [self.pool.allocate("c") for _ in range(2)]
        self.world.advance(1)
        self.assertEqual("the Machines API is failing", self.pool.not_ready_reason)

        del self.api.always["*"]
        self.world.advance(40)
        for place in places:
            self.successResultOf(place)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_a_machine_that_fails_by_itself_means_no_trouble_once_the_api_was_asked(self) -> None:
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

    def test_it_is_told_while_all_machines_failed_and_cannot_be_destroyed(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(2)
        self.api.always["start"] = self.api.always["destroy"] = Refuse(UnavailableError("broken"))
        places = [self.pool.allocate("c") for _ in range(2)]
        self.world.advance(60)
        self.assertEqual("machines cannot be started", self.pool.not_ready_reason)

        self.api.always.clear()
        self.world.advance(40)
        for place in places:
            self.successResultOf(place)
        self.assertIsNone(self.pool.not_ready_reason)

    def test_a_doubt_in_the_midst_of_a_sweep_is_looked_into_after_it(self) -> None:
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

    def test_a_sweep_that_loses_the_api_tells_so(self) -> None:
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

    def test_doubts_cost_a_list_each_and_fewer_the_more_there_are(self) -> None:
        other, others = self.world.pool("q")
        self.allocated(other).release()
        self.world.advance(2)
        self.assertEqual(1, self.api.count("list"))
        asked = self.api.count("get_lease")
        for _ in range(100):
            self.pool._reconciler.check_soon()
            self.world.advance(1)

        self.assertTrue(5 <= self.api.count("list") <= 20, self.api.count("list"))
        self.assertEqual(asked, self.api.count("get_lease"))
        self.assertIsNone(self.pool.not_ready_reason)
        self.assertEqual(1, others.count("list"))
        self.close(other)

    def test_a_worker_that_does_not_answer_is_no_doubt_of_the_api(self) -> None:
        first = self.allocated()
        first.release()
        self.world.never_ready.add(first.machine.id)
        self.world.advance(2)
        self.allocated(within=40)

        self.assertEqual(1, self.api.count("list"))


class StandbyTests(PoolCase):
    def standing_by(self, standby: int = 1, *, size: int = 2, suspend_standby: bool = False) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(size=size, standby=standby, suspend_standby=suspend_standby)
        self.addCleanup(self.end, self.pool)
        self.world.advance(5)

    def end(self, pool: Pool) -> None:
        # What looks after a machine that stands by must not be left to the garbage collector.
        self.begin(pool.close())
        self.world.advance(1)

    def test_a_machine_that_stands_by_is_given_at_once_and_without_a_call(self) -> None:
        self.standing_by()
        self.assertEqual([State.STARTED], self.states())
        calls = len(self.api.calls)

        place = self.pool.allocate("c")

        first = self.successResultOf(place)
        self.assertEqual(calls, len([call for call in self.api.calls if call[0] != "create"]))
        self.world.advance(5)
        self.assertEqual(1, self.pool.count(Phase.READY))
        self.assertNotEqual(first.machine.id, self.allocated(within=0).machine.id)

    def test_a_used_machine_is_stopped_before_it_stands_by_again(self) -> None:
        self.standing_by(size=1)
        first = self.allocated(within=0)
        waiting = self.pool.allocate("c")
        first.release()
        self.world.advance(0.3)
        self.assertNoResult(waiting)
        self.world.advance(5)

        self.assertEqual(first.machine.id, self.successResultOf(waiting).machine.id)
        self.assertEqual((1, 1), (self.api.count("stop"), self.api.count("create")))
        self.assertGreaterEqual(self.api.count("start"), 1)

    def test_no_more_machines_stand_by_than_should(self) -> None:
        self.standing_by(size=3)
        for allocation in [self.allocated(), self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(5)

        self.assertEqual([State.STARTED, State.STOPPED, State.STOPPED], self.states())

    def test_its_lease_is_kept_fresh(self) -> None:
        for suspend_standby in (False, True):
            self.standing_by(suspend_standby=suspend_standby)
            [machine] = self.machines()
            for _ in range(10):
                self.world.advance(150)
                lease = self.successResultOf(self.begin(self.world.machines.get_lease(machine.id)))
                self.assertGreater(lease.expires_at - EPOCH - self.world.clock.seconds(), 150)

            self.assertEqual([machine.id], [other.id for other in self.machines()])
            self.assertEqual(machine.id, self.allocated().machine.id)

    def test_it_is_never_without_a_lease_however_often_a_renewal_fails(self) -> None:
        self.standing_by()
        [machine] = self.machines()
        self.api.always["refresh_lease"] = Refuse(UnavailableError("down"))
        while machine.id in {other.id for other in self.machines()}:
            self.assertLess(self.world.clock.seconds(), 600)
            self.successResultOf(self.begin(self.world.machines.get_lease(machine.id)))
            self.world.advance(1)

        self.assertGreaterEqual(self.api.count("refresh_lease"), 3)

    def test_one_that_stops_by_itself_is_started_again_and_one_that_is_gone_replaced(self) -> None:
        self.standing_by()
        [machine] = self.machines()
        lease = self.successResultOf(self.begin(self.world.machines.get_lease(machine.id)))
        self.successResultOf(self.begin(self.world.machines.stop(machine.id, lease.nonce)))
        self.world.advance(5)
        self.assertEqual((1, [State.STARTED]), (self.pool.count(Phase.READY), self.states()))

        self.successResultOf(self.begin(self.world.machines.destroy(machine.id, lease.nonce)))
        self.world.advance(5)

        self.assertEqual((1, [State.STARTED]), (self.pool.count(Phase.READY), self.states()))
        self.assertNotEqual([machine.id], [other.id for other in self.machines()])

    def test_starts_that_fail_are_spaced_out_and_a_request_is_served_in_the_end(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(standby=2, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.always["create"] = Refuse(CapacityError("full"))
        self.pool.start()
        self.world.advance(120)
        self.assertLess(self.api.count("create"), 40)
        place = self.pool.allocate("c")
        del self.api.always["create"]
        self.world.advance(40)

        self.successResultOf(place)
        self.assertEqual(1, self.pool.count(Phase.READY))

    def test_suspensions_that_fail_are_spaced_out_and_requests_are_served_all_the_while(self) -> None:
        self.standing_by(suspend_standby=True)
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

    def test_suspensions_that_fail_hold_no_creation_back(self) -> None:
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

    def test_one_that_stops_by_itself_again_and_again_is_started_later_and_later(self) -> None:
        self.standing_by()
        for _ in range(600):
            self.world.advance(0.5)
            for machine in self.machines():
                if machine.state is State.STARTED:
                    lease = self.successResultOf(self.begin(self.world.machines.get_lease(machine.id)))
                    self.successResultOf(self.begin(self.world.machines.stop(machine.id, lease.nonce)))

        self.assertLess(self.api.count("refresh_lease"), 30)
        self.assertEqual(1, self.api.count("create"))

    def test_suspended_ones_are_thawed_for_a_request_and_never_frozen_after_one(self) -> None:
        self.standing_by(suspend_standby=True)
        self.assertEqual([State.SUSPENDED], self.states())

        first = self.allocated()
        self.assertEqual([State.STARTED, State.SUSPENDED], self.states())
        suspended = self.api.count("suspend")
        first.release()
        self.world.advance(5)

        self.assertEqual([State.STOPPED, State.SUSPENDED], self.states())
        self.assertEqual((2, 1), (suspended, self.api.count("stop")))

    def test_the_time_for_which_it_stands_by_is_no_part_of_a_turn(self) -> None:
        self.standing_by(size=1)
        for _ in range(30):
            self.allocated(within=2).release()
            self.world.advance(60)
        self.allocated(within=2)

        # A second of a start, two of a run, half a second of a stop.
        self.assertApproximates(3.5, self.pool.expected_wait, 0.2)

    def test_a_suspended_one_is_thawed_though_others_are_on_their_way(self) -> None:
        self.standing_by(2, size=3, suspend_standby=True)
        self.api.always["create"] = Slow(self.world.clock, 60)
        self.allocated()
        self.assertEqual(1, self.pool.count(Phase.CREATING))

        self.allocated()
        self.assertEqual([State.STARTED, State.STARTED], self.states())

    def test_one_that_is_suspended_goes_before_one_that_is_about_to_be(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(standby=2, suspend_standby=True, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.next("suspend", Slow(self.world.clock, 15))
        self.pool.start()
        self.world.advance(5)
        self.assertEqual([State.STARTED, State.SUSPENDED], self.states())

        self.allocated()

    def test_a_tampered_one_serves_nobody(self) -> None:
        self.standing_by()
        [machine] = self.machines()
        self.world.machines.set_metadata(machine.id, "pool_id", "q//i")
        self.world.advance(400)

        self.assertNotEqual(machine.id, self.allocated(within=0).machine.id)

    def test_close_stops_what_stands_by(self) -> None:
        for suspend_standby in (False, True):
            self.standing_by(2, suspend_standby=suspend_standby)
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

    def test_one_that_is_found_out_while_it_is_suspended_is_gone_at_once(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(standby=1, suspend_standby=True, start=False)
        self.addCleanup(self.end, self.pool)
        self.api.next("suspend", Slow(self.world.clock, 3.0))
        self.pool.start()
        self.world.advance(2)
        [tampered] = self.machines()
        for member in self.pool._slots:
            member.unusable = True  # as a sweep that comes in just now would have it
            member.wake(wanted=False)
        self.world.advance(10)

        self.assertNotIn(tampered.id, [machine.id for machine in self.machines()])


class LeaseTests(PoolCase):
    def test_a_lease_is_extended_at_allocation(self) -> None:
        self.allocated().release()
        self.world.advance(200)
        allocation = self.allocated()

        lease = self.successResultOf(self.begin(self.world.machines.get_lease(allocation.machine.id)))
        self.assertGreater(lease.expires_at - EPOCH - self.world.clock.seconds(), 290)

    def test_a_machine_is_used_with_what_is_left_of_its_lease(self) -> None:
        self.allocated().release()
        self.world.advance(200)
        self.api.always["refresh_lease"] = Refuse(UnavailableError("no"))

        self.allocated()

        self.assertEqual(1, self.api.count("create"))

    def test_a_machine_whose_lease_may_not_cover_a_request_is_replaced(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(270)
        self.api.always["refresh_lease"] = Hang()

        second = self.allocated(within=30)

        self.assertNotEqual(first.machine.id, second.machine.id)
        self.assertEqual(1, len(self.machines()))

    def test_an_idle_machine_goes_before_its_lease_does(self) -> None:
        self.allocated().release()
        self.world.advance(299)

        self.assertEqual([], self.machines())

    def test_a_machine_whose_lease_was_lost_is_not_used(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.api.next("refresh_lease", Refuse(LeaseHeldError("another's")))

        second = self.allocated()

        self.assertNotEqual(first.machine.id, second.machine.id)


class FailureTests(PoolCase):
    def test_a_create_whose_answer_is_lost_is_found_and_counted_once(self) -> None:
        self.api.next("create", LoseResponse())
        places = [self.pool.allocate("c"), self.pool.allocate("c"), self.pool.allocate("c")]
        self.world.advance(10)

        served = [self.successResultOf(place) for place in places[:2]]
        self.assertNoResult(places[2])
        self.assertEqual(2, len(self.machines()))
        self.assertEqual(2, len({allocation.machine.id for allocation in served}))
        names = [argument for method, argument in self.api.calls if method == "create"]
        self.assertEqual(2, len(set(names)))
        places[2].addErrback(lambda failure: failure.trap(CancelledError) and None)
        places[2].cancel()

    def test_a_create_that_was_done_keeps_its_place_whatever_comes_of_looking_for_it(self) -> None:
        troubles = (
            ("create", LoseResponse(), "get", Refuse(UnavailableError("500"))),
            ("create", LoseResponse(), "get_lease", Refuse(UnavailableError("500"))),
            ("create", LoseResponse(), "create", Refuse(CapacityError("full"))),
        )
        for first, fault, second, other in troubles:
            world = self.world = World()
            pool, api = world.pool(size=1)
            api.next(first, fault)
            api.next(second, other)
            place = pool.allocate("c")
            world.advance(20)

            self.assertEqual([self.successResultOf(place).machine.id], [m.id for m in self.machines()])

    def test_a_lost_create_that_is_done_after_its_machine_vanished_is_found(self) -> None:
        pool, api = self.world.pool("q", size=1)
        api.next("create", LoseResponse())
        first = self.allocated(pool, within=10)
        first.release()
        self.world.advance(2)
        [name] = [argument for method, argument in api.calls if method == "create"][:1]
        lease = self.successResultOf(self.begin(self.world.machines.get_lease(first.machine.id)))
        self.successResultOf(self.begin(self.world.machines.destroy(first.machine.id, lease.nonce)))
        self.successResultOf(self.begin(self.world.machines.create(name, "r", MachineConfig("i"), 300)))
        self.world.advance(100)

        second = self.allocated(pool, within=10)

        self.assertEqual([second.machine.id], [machine.id for machine in self.machines()])

    def test_failing_creates_keep_no_place_and_are_spaced_out(self) -> None:
        self.api.always["create"] = Refuse(CapacityError("full"))
        place = self.pool.allocate("c")
        self.world.advance(60)
        self.assertLess(self.api.count("create"), 25)
        self.assertGreater(self.api.count("create"), 5)
        del self.api.always["create"]
        self.world.advance(40)

        self.successResultOf(place)
        self.allocated()

    def test_at_the_limit_of_the_app_machines_are_asked_for_one_at_a_time(self) -> None:
        self.world = World(limited=True)
        self.pool, self.api = self.world.pool(size=20)
        self.world.advance(1)
        self.api.always["create"] = Slow(self.world.clock, 0.1)
        places = [self.pool.allocate("c") for _ in range(20)]
        self.world.advance(60)

        for place in places:
            self.successResultOf(place)
        # Three are done at once, and one a second after that; each place by itself would ask 600 times.
        self.assertLess(self.api.count("create"), 200)
        self.assertEqual(1, self.api.count("list"))  # nobody doubts that the API is well

    def test_a_create_at_the_limit_whose_first_answer_was_lost_keeps_its_place(self) -> None:
        self.api.next("create", LoseResponse(), *[Refuse(RateLimitedError("429"))] * 5)
        self.allocated(within=30)

        self.assertEqual(1, len(self.machines()))
        self.assertEqual(1, len({argument for method, argument in self.api.calls if method == "create"}))

    def test_a_creation_that_is_known_by_its_name_keeps_its_place_at_the_limit(self) -> None:
        self.world = World()
        self.pool, self.api = self.world.pool(size=1)
        self.world.advance(1)
        self.api.next("create", Twice())
        self.api.next("get", Refuse(RateLimitedError("429")))
        self.allocated(within=20)

        self.assertEqual(1, len(self.machines()))

    def test_a_machine_that_does_not_start_is_destroyed_and_another_tried(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.api.next("wait", Refuse(WaitTimeoutError("stuck")))

        second = self.allocated(within=10)

        self.assertNotEqual(first.machine.id, second.machine.id)
        self.assertEqual([second.machine.id], [machine.id for machine in self.machines()])

    def test_a_worker_that_never_answers_is_given_up(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.world.never_ready.add(first.machine.id)
        place = self.pool.allocate("c")
        self.world.advance(45)

        self.assertNotEqual(first.machine.id, self.successResultOf(place).machine.id)

    def end_by_itself(self, machine_id: str) -> None:
        """End a machine's body, as a worker that exits does."""
        self.world.machines._run_in_background(
            self.world.machines._stop(self.world.machines._entries[machine_id])
        )

    def test_a_worker_that_ends_while_its_machine_starts_is_given_up_at_once(self) -> None:
        for ends_after in (0.7, 1.2, 4.0):  # before it has started, and before its first answer
            self.world = World()
            self.pool, self.api = self.world.pool()
            self.world.nobody_ready = True
            place = self.pool.allocate("c")
            self.world.advance(ends_after)
            [machine] = self.machines()
            self.world.nobody_ready = False

            self.end_by_itself(machine.id)
            self.world.advance(4)

            second = self.successResultOf(place)
            self.assertNotEqual(machine.id, second.machine.id)
            self.assertEqual([second.machine.id], [machine.id for machine in self.machines()])

    def test_a_machine_that_cannot_boot_is_given_up_at_once(self) -> None:
        for state in (State.FAILED, State.LAUNCH_FAILED, State.STOPPED):
            first = self.allocated()
            first.release()
            self.world.advance(2)
            place = self.pool.allocate("c")
            self.world.advance(0.2)
            entry = self.world.machines._entries[first.machine.id]
            entry.generation += 1
            self.world.machines._set_state(entry, state)
            self.world.advance(3)

            second = self.successResultOf(place)
            self.assertNotEqual(first.machine.id, second.machine.id)
            second.release()
            self.world.advance(2)

    def test_a_worker_that_answers_promptly_costs_no_second_wait(self) -> None:
        self.allocated()

        self.assertEqual(1, self.api.count("wait"))

    def test_a_failing_api_does_not_end_the_wait_for_a_slow_worker(self) -> None:
        self.world.nobody_ready = True
        place = self.pool.allocate("c")
        self.world.advance(1.2)
        self.api.always["wait"] = Refuse(UnavailableError("500"))
        self.world.advance(10)
        self.assertNoResult(place)
        self.assertEqual(([State.STARTED], 1), (self.states(), self.api.count("create")))
        self.api.always.clear()
        place.addErrback(lambda failure: failure.trap(PoolClosedError) and None)
        self.close()
        self.assert_nothing_pending()

    def test_a_machine_that_migrates_as_it_starts_is_waited_for_under_its_new_version(self) -> None:
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

    def test_a_machine_that_was_started_by_a_call_whose_answer_was_lost_has_started(self) -> None:
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

    def test_an_image_that_cannot_be_pulled_yet_is_tried_again_until_it_can(self) -> None:
        # As right after a push, for some 15 s.
        self.api.always["create"] = Refuse(RejectedError("400 MANIFEST_UNKNOWN: manifest unknown"))
        place = self.pool.allocate("c")
        self.world.advance(15)
        self.assertNoResult(place)
        del self.api.always["create"]
        self.world.advance(15)

        self.successResultOf(place)

    def test_a_machine_is_not_used_again_until_its_stop_is_known(self) -> None:
        for fault in (Refuse(UnavailableError("500")), LoseResponse(), Hang()):
            first = self.allocated(within=40)
            self.api.next("stop", fault)
            first.release()
            self.world.advance(40)

            second = self.allocated()
            self.assertNotEqual(first.machine.id, second.machine.id)
            second.release()
            self.world.advance(2)

    def test_a_machine_that_is_not_destroyed_at_first_is_tried_again(self) -> None:
        first = self.allocated()
        self.api.next("stop", Refuse(WaitTimeoutError("stuck")))
        self.api.next("destroy", *[Refuse(UnavailableError("500"))] * 4)
        first.release()
        self.world.advance(20)

        self.assertEqual([], self.machines())
        self.assertEqual(5, self.api.count("destroy"))

    def test_a_machine_that_vanishes_is_replaced(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(2)
        self.api.next("start", Refuse(NotFoundError("gone")))

        self.assertNotEqual(first.machine.id, self.allocated().machine.id)

    def test_a_machine_that_somebody_destroyed_is_replaced_at_once(self) -> None:
        for refusal in (NotFoundError("gone"), NotReadyError("unable to start machine: 'destroyed'")):
            first = self.allocated()
            first.release()
            self.world.advance(2)
            lease = self.successResultOf(self.begin(self.world.machines.get_lease(first.machine.id)))
            self.successResultOf(self.begin(self.world.machines.destroy(first.machine.id, lease.nonce)))
            self.api.next("refresh_lease", Refuse(UnavailableError("500")))
            self.api.next("start", Refuse(refusal))

            second = self.allocated()

            self.assertNotEqual(first.machine.id, second.machine.id)
            second.release()
            self.world.advance(2)

    def test_every_call_may_hang_and_the_pool_recovers(self) -> None:
        for method in ("create", "refresh_lease", "start", "wait", "stop", "destroy"):
            self.api.next(method, Hang())
            for _ in range(2):
                allocation = self.allocated(within=250)
                allocation.release()
                self.world.advance(100)
        self.assertEqual(2, len([self.allocated(), self.allocated()]))


class EndTests(PoolCase):
    def test_close_leaves_every_machine_stopped_and_nothing_pending(self) -> None:
        busy, idle = self.allocated(), self.allocated()
        idle.release()
        self.world.advance(3)
        closing = self.begin(self.pool.close())
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
            places = [pool.allocate("c") for _ in range(3)]
            world.advance(moment * 0.05)
            closing = self.begin(pool.close())
            for place in places:
                if isinstance(place.result, Allocation):
                    place.result.release()
                else:
                    self.failureResultOf(place, PoolClosedError)
            world.advance(10)

            self.successResultOf(closing)
            self.assertEqual({State.STOPPED}, set(self.states()) or {State.STOPPED})
            self.assert_nothing_pending()

    def test_close_does_not_wait_for_a_machine_that_nobody_is_to_use(self) -> None:
        for method in ("wait", "probe"):
            self.setUp()
            if method == "wait":
                self.api.always["wait"] = Hang()
            place = self.pool.allocate("c")
            place.addErrback(lambda failure: failure.trap(PoolClosedError) and None)
            self.world.nobody_ready = method == "probe"
            self.world.advance(3)
            self.api.always.clear()
            self.close(within=3)

            self.assertEqual([State.STOPPED], self.states())
            self.assert_nothing_pending()

    def test_destroy_leaves_no_machine_and_nothing_pending(self) -> None:
        first, second = self.allocated(), self.allocated()
        second.release()
        first.release()
        self.api.next("destroy", Refuse(UnavailableError("500")))
        destroying = self.begin(self.pool.destroy())
        self.world.advance(10)

        self.successResultOf(destroying)
        self.assertEqual([], self.machines())
        self.assert_nothing_pending()

    def test_destroy_stops_no_machine_first(self) -> None:
        allocation = self.allocated()
        self.allocated().release()
        self.world.advance(2)
        destroying = self.begin(self.pool.destroy())
        self.world.advance(1)
        stops = self.api.count("stop")
        self.assertEqual([State.STARTED], self.states())  # the run goes on
        self.assertNoResult(destroying)

        allocation.release()
        self.world.advance(1)

        self.successResultOf(destroying)
        self.assertEqual(([], 1, stops), (self.machines(), stops, self.api.count("stop")))

    def test_destroy_ends_in_time_whatever_hangs(self) -> None:
        # A machine in each phase that takes calls, and one call or all of them without an answer.
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
                destroying = self.begin(pool.destroy())
                world.advance(MAX_REQ_TIME)
                allocation.release()
                world.advance(StepTimeouts().exit + 0.1)

                self.successResultOf(destroying)
                if method in ("create", "start", "wait", "stop", "suspend"):
                    self.assertEqual([], self.machines(), method)
                api.always.clear()
                world.advance(100)
                self.flushLoggedErrors()

    def test_destroy_goes_on_after_a_machine_that_makes_trouble(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(3)
        self.close()
        again, api = self.world.pool(start=False)
        api.next("destroy", Refuse(NotReadyError("412")))
        destroying = self.begin(again.destroy())
        self.world.advance(30)

        self.successResultOf(destroying)
        self.assertEqual([], self.machines())
        self.assertEqual(3, api.count("destroy"))

    def test_the_end_comes_in_the_middle_of_a_sweep(self) -> None:
        for method in ("list", "get", "get_lease", "release_lease", "acquire_lease", "stop", "wait"):
            world = self.world = World()
            before, _ = world.pool()
            self.allocated(before).release()
            world.advance(3)
            self.close(before)
            pool, api = world.pool(start=False)
            api.next(method, Hang())
            pool.start()
            ending = self.begin(pool.destroy())
            world.advance(120)

            self.successResultOf(ending)
            self.assertEqual([], self.machines(), method)
            self.assert_nothing_pending()

    def test_a_closed_pool_gives_out_nothing(self) -> None:
        self.close()

        self.failureResultOf(self.pool.allocate("c"), PoolClosedError)

    def test_the_end_comes_though_every_call_fails_or_hangs(self) -> None:
        for fault in (Refuse(UnavailableError("500")), Hang()):
            world = self.world = World()
            pool, api = world.pool()
            allocation = self.allocated(pool)
            pool.allocate("c").addErrback(lambda failure: failure.trap(PoolClosedError) and None)
            api.always["*"] = fault
            allocation.release()
            ending = self.begin(pool.destroy())
            world.advance(300)

            self.successResultOf(ending)
            self.assert_nothing_pending()
            self.flushLoggedErrors()


class CleaningTests(PoolCase):
    def test_the_next_instance_reclaims_what_the_last_one_left(self) -> None:
        self.allocated().release()
        self.world.advance(3)
        self.close()
        [left] = self.machines()
        again, api = self.world.pool()
        self.world.advance(3)

        allocation = self.allocated(again)

        self.assertEqual(left.id, allocation.machine.id)
        self.assertEqual(0, api.count("create"))

    def test_what_a_crash_left_running_is_wiped_before_it_is_used(self) -> None:
        crashed = self.allocated()
        crash(self.api)
        again, api = self.world.pool()

        allocation = self.allocated(again)

        self.assertEqual(crashed.machine.id, allocation.machine.id)
        self.assertEqual(1, api.count("stop"))
        self.assertEqual(0, api.count("create"))

    def test_a_name_with_dashes_is_reclaimed_and_not_mistaken(self) -> None:
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

    def test_live_machines_of_others_are_left_and_expired_ones_destroyed(self) -> None:
        self.allocated()
        crash(self.api)
        other, api = self.world.pool("q")
        self.world.advance(290)
        self.assertEqual(1, len(self.machines()))
        self.assertEqual(0, api.count("destroy"))
        self.world.advance(400)

        self.assertEqual([], self.machines())
        self.close(other)

    def test_three_machines_of_a_live_pool_speak_for_all_and_one_of_a_dead_pool_is_enough(self) -> None:
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

    def test_what_many_dead_pools_left_is_gone_within_a_period_however_slow_the_api(self) -> None:
        for number in range(600):
            name = f"worker-dead{number % 30}-{number:016x}"
            self.begin(self.world.machines.create(name, "r", MachineConfig("i"), 1))
        self.world.advance(3)
        other, api = self.world.pool("q", start=False)
        for method in ("get", "get_lease", "destroy"):
            api.always[method] = Slow(self.world.clock, 0.3)
        other.start()
        self.world.advance(280)

        self.assertEqual([], self.machines())
        self.assertIsNone(other.not_ready_reason)
        self.close(other)

    def test_many_machines_of_an_earlier_instance_are_looked_at_together(self) -> None:
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

    def test_one_that_cannot_be_looked_at_is_replaced_and_keeps_nobody_from_being_served(self) -> None:
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

    def test_one_that_is_known_is_not_judged_by_a_failure_of_the_api(self) -> None:
        pool, api = self.world.pool("s", standby=1)
        self.world.advance(5)
        [machine] = self.machines()
        api.always["get"] = Refuse(UnavailableError("500"))
        self.world.advance(400)

        self.assertEqual([machine.id], [other.id for other in self.machines()])
        self.assertEqual(1, pool.count(Phase.READY))
        self.close(pool)

    def test_changed_metadata_means_destroy_and_nobody_adopts(self) -> None:
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

    def test_a_machine_that_is_found_out_while_it_starts_serves_nobody(self) -> None:
        first = self.allocated()
        first.release()
        self.world.advance(238)
        self.world.machines.set_metadata(first.machine.id, "pool_id", None)
        place = self.pool.allocate("c")
        for member in self.pool._slots:
            member.unusable = True  # as a sweep that comes in just now would have it
        self.world.advance(10)

        self.assertNotEqual(first.machine.id, self.successResultOf(place).machine.id)

    def test_another_image_or_environment_means_another_machine(self) -> None:
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

    def test_a_smaller_pool_gives_up_what_is_too_much(self) -> None:
        for allocation in [self.allocated(), self.allocated()]:
            allocation.release()
        self.world.advance(3)
        self.close()
        again, _ = self.world.pool(size=1)
        self.world.advance(5)

        self.assertEqual(1, len(self.machines()))
        self.assertEqual(1, again.count(Phase.STOPPED))

    def test_one_machine_that_makes_trouble_does_not_stop_a_sweep(self) -> None:
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

    def test_the_list_may_be_stale(self) -> None:
        stale = self.allocated().machine
        crash(self.api)
        self.world.advance(301)
        fresh = self.successResultOf(
            self.begin(self.world.machines.acquire_lease(stale.id, 1000, "somebody is back"))
        )
        other, _ = self.world.pool("q")
        self.world.advance(3)

        self.assertEqual([stale.id], [machine.id for machine in self.machines()])
        self.assertEqual(12, len(fresh.nonce))
        self.close(other)

    def test_a_machine_whose_lease_changes_hands_is_left(self) -> None:
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

    def test_machines_that_are_no_pools_are_left_alone(self) -> None:
        self.successResultOf(self.begin(self.world.machines.create("postgres-1", "r", MachineConfig("i"), 0)))
        self.world.advance(700)

        self.assertEqual(1, len(self.machines()))

    def test_nothing_is_created_before_it_is_known_what_there_is(self) -> None:
        self.allocated().release()
        self.world.advance(3)
        self.close()
        again, api = self.world.pool(size=1, start=False)
        api.next("list", Hang(), Refuse(UnavailableError("500")))
        again.start()
        place = again.allocate("c")
        self.world.advance(15)
        self.assertNoResult(place)
        self.world.advance(15)

        self.successResultOf(place)
        self.assertEqual(0, api.count("create"))
