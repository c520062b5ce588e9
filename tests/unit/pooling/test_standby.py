from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from twisted.logger import capturedLogs

from bfaas.machines.api import RejectedError, State, UnavailableError
from bfaas.pooling.backoff import Backoff
from bfaas.pooling.scheduler import Inspected, Scheduler, StandbyAction
from bfaas.pooling.slot import Phase, Slot
from bfaas.pooling.standby import AFTER_REQUEST, Standby
from tests.support.faults import Refuse
from tests.unit.pooling.parts import PartsCase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twisted.internet.defer import Deferred


class FixedScheduler(Scheduler):
    """Returns an action that the test sets."""

    action = StandbyAction.WAIT

    def next_action(self, slot: Slot) -> StandbyAction:
        return self.action

    def reconcile(self, machines: Sequence[Inspected]) -> None:
        raise NotImplementedError

    def rebalance(self) -> None:
        """Do nothing."""


class StandbyTests(PartsCase):
    def setUp(self) -> None:
        super().setUp()
        self.scheduler = FixedScheduler()
        self.pause = Backoff(self.clock, self.backoff, self.scheduler.rebalance)
        self.standby_slot = self.ready_slot()

    def wait_for_work(self, *, suspend: bool) -> Deferred[bool]:
        standby = Standby(self.lifecycle, self.pause, self.scheduler, suspend_standby=suspend)
        waiting = self.start(standby.wait_for_work(self.standby_slot))
        self.advance(5)
        return waiting

    def change_action(self, action: StandbyAction, *, wanted: bool) -> None:
        self.scheduler.action = action
        self.standby_slot.wake(wanted=wanted)
        self.advance(5)

    def test_machine_that_is_needed_does_not_wait(self) -> None:
        for action, serves in ((StandbyAction.SERVE, True), (StandbyAction.RETIRE, False)):
            self.scheduler.action = action

            self.assertIs(serves, self.successResultOf(self.wait_for_work(suspend=True)))
        self.assertEqual(0, self.api.count("suspend"))

    def test_started_machine_waits_until_it_is_wanted(self) -> None:
        waiting = self.wait_for_work(suspend=False)
        self.assertNoResult(waiting)
        self.assertEqual((Phase.READY, [State.STARTED]), (self.standby_slot.phase, self.states()))

        self.change_action(StandbyAction.SERVE, wanted=True)

        self.assertIs(True, self.successResultOf(waiting))
        self.assert_no_timers()

    def test_suspended_machine_is_resumed_when_it_is_wanted(self) -> None:
        waiting = self.wait_for_work(suspend=True)
        self.assertNoResult(waiting)
        self.assertEqual((Phase.SUSPENDED, [State.SUSPENDED]), (self.standby_slot.phase, self.states()))

        self.change_action(StandbyAction.SERVE, wanted=True)

        self.assertIs(True, self.successResultOf(waiting))
        self.assertEqual((Phase.READY, [State.STARTED]), (self.standby_slot.phase, self.states()))

    def test_retired_machine_does_not_serve_and_causes_no_pause(self) -> None:
        for suspend in (False, True):
            self.scheduler.action = StandbyAction.WAIT
            waiting = self.wait_for_work(suspend=suspend)
            self.change_action(StandbyAction.RETIRE, wanted=False)

            self.assertIs(False, self.successResultOf(waiting))
            self.assertFalse(self.pause.active)

    def test_machine_that_stops_by_itself_does_not_serve_and_causes_a_pause(self) -> None:
        waiting = self.wait_for_work(suspend=False)
        self.result_of(self.machines.stop(self.standby_slot.machine.id, self.standby_slot.nonce), within=0.5)
        self.clock.advance(0)

        self.assertIs(False, self.successResultOf(waiting))
        self.assertTrue(self.pause.active)

    def test_stop_right_after_a_request_is_not_a_failure(self) -> None:
        waiting = self.wait_for_work(suspend=False)
        self.start(self.machines.stop(self.standby_slot.machine.id, self.standby_slot.nonce))
        self.clock.advance(0.5 - AFTER_REQUEST / 2)
        self.scheduler.action = StandbyAction.SERVE
        self.standby_slot.wake(wanted=True)
        self.assertIs(True, self.successResultOf(waiting))
        parked = self.standby_slot.park()  # as the pool does once the machine is stopped
        with capturedLogs() as logs:
            self.clock.advance(AFTER_REQUEST / 2)
            self.assertEqual([State.STOPPED], self.states())
            self.advance(5)

        self.assertNoResult(parked)
        self.assertEqual([], logs)
        self.assert_no_timers()

    def test_failed_suspension_causes_a_pause(self) -> None:
        self.api.next("suspend", Refuse(RejectedError("too much memory")))
        standby = Standby(self.lifecycle, self.pause, self.scheduler, suspend_standby=True)

        self.assertIs(False, self.result_of(standby.wait_for_work(self.standby_slot), within=0))
        self.assertTrue(self.pause.active)

    def test_lease_is_renewed_meanwhile(self) -> None:
        self.wait_for_work(suspend=False)
        for _ in range(5):
            self.advance(200)
            self.assertGreater(self.lease_left(self.standby_slot), 150)
        self.change_action(StandbyAction.RETIRE, wanted=False)

    def test_started_machine_is_probed_meanwhile(self) -> None:
        self.wait_for_work(suspend=False)
        self.advance(1000)
        pauses = [later - earlier for earlier, later in pairwise([*self.probed_at, self.clock.seconds()])]
        self.assertLess(max(pauses), self.config.lease_ttl / 2)
        self.change_action(StandbyAction.RETIRE, wanted=False)

    def test_suspended_machine_is_not_probed(self) -> None:
        self.wait_for_work(suspend=True)
        probed_at = list(self.probed_at)
        self.advance(1000)
        self.assertEqual(probed_at, self.probed_at)
        self.change_action(StandbyAction.RETIRE, wanted=False)

    def test_machine_whose_worker_does_not_respond_does_not_serve(self) -> None:
        waiting = self.wait_for_work(suspend=False)
        self.workers_ready = False
        self.advance(150)

        self.assertIs(False, self.successResultOf(waiting))

    def test_machine_without_a_lease_does_not_serve(self) -> None:
        waiting = self.wait_for_work(suspend=False)
        self.api.always["refresh_lease"] = Refuse(UnavailableError("500"))
        self.advance(300)

        self.assertIs(False, self.successResultOf(waiting))
