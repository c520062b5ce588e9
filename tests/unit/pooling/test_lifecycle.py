from __future__ import annotations

from bfaas.machines.api import (
    CapacityError,
    EndedError,
    LeaseHeldError,
    MachineConfig,
    NotFoundError,
    RateLimitedError,
    State,
    UnavailableError,
)
from bfaas.pooling.lifecycle import (
    API_SETTLE_TIME,
    DestroyTimeoutError,
    LeaseLostError,
    WorkerUnresponsiveError,
)
from bfaas.pooling.slot import Phase
from tests.support.faults import Hang, LoseResponse, Refuse
from tests.unit.pooling.parts import PartsCase

DOWN = Refuse(UnavailableError("500"))


class CreateTests(PartsCase):
    def test_created_machine_is_leased_for_less_than_the_ttl(self) -> None:
        slot = self.slot()
        self.result_of(self.lifecycle.create(slot), within=0)

        self.assertEqual([slot.machine.id], [machine.id for machine in self.existing()])
        self.assertEqual("p//i", slot.machine.metadata["pool_id"])
        self.assertEqual(self.lease(slot).nonce, slot.nonce)
        self.assertEqual(self.config.safe_lease_ttl, slot.lease_end)

    def test_lost_response_leads_to_the_same_machine(self) -> None:
        slot = self.slot()
        self.api.next("create", LoseResponse())
        self.result_of(self.lifecycle.create(slot))

        self.assertEqual([slot.machine.id], [machine.id for machine in self.existing()])
        self.assertEqual(2, self.api.count("create"))
        self.assertIsNotNone(slot.create_unknown_since)

    def test_rejected_creation_is_an_error(self) -> None:
        for error in (CapacityError("full"), RateLimitedError("429")):
            self.api.next("create", Refuse(error))

            self.assertIs(error, self.error_of(self.lifecycle.create(self.slot())))
        self.assertEqual(2, self.api.count("create"))

    def test_rejection_after_a_lost_response_is_no_error_until_the_list_is_settled(self) -> None:
        slot = self.slot()
        self.api.next("create", DOWN)
        self.api.always["create"] = Refuse(CapacityError("full"))
        creating = self.start(self.lifecycle.create(slot))
        self.advance(API_SETTLE_TIME - 5)
        self.assertNoResult(creating)
        self.advance(40)

        self.failureResultOf(creating, CapacityError)


class StartTests(PartsCase):
    def test_worker_is_waited_for(self) -> None:
        slot = self.slot()
        self.result_of(self.lifecycle.create(slot), within=0)
        ready = self.start(self.lifecycle.wait_until_ready(slot))
        self.advance(0.9)
        self.assertNoResult(ready)
        self.advance(0.3)

        self.successResultOf(ready)
        self.assert_no_timers()

    def test_unresponsive_worker_is_an_error_after_a_timeout(self) -> None:
        slot = self.slot()
        self.workers_ready = False
        self.result_of(self.lifecycle.create(slot))
        waiting = self.start(self.lifecycle.wait_until_ready(slot))
        self.advance(self.config.timeouts.ready - 1)
        self.assertNoResult(waiting)
        self.advance(1)

        self.failureResultOf(waiting, WorkerUnresponsiveError)

    def test_machine_that_ends_before_its_worker_is_ready_is_an_error_at_once(self) -> None:
        slot = self.slot()
        self.workers_ready = False
        self.result_of(self.lifecycle.create(slot))
        waiting = self.start(self.lifecycle.wait_until_ready(slot))
        self.advance(2)
        self.result_of(self.machines.stop(slot.machine.id, slot.nonce), within=2)

        self.failureResultOf(waiting, EndedError)

    def test_close_ends_the_wait(self) -> None:
        slot = self.slot()
        self.workers_ready = False
        self.result_of(self.lifecycle.create(slot))
        waiting = self.start(self.lifecycle.wait_until_ready(slot))
        self.lifecycle.close()

        self.successResultOf(waiting)
        self.assert_no_timers()

    def test_stopped_machine_starts_with_an_extended_lease(self) -> None:
        slot = self.ready_slot()
        self.result_of(self.lifecycle.stop(slot))
        self.assertEqual([State.STOPPED], self.states())
        self.advance(200)
        self.result_of(self.lifecycle.start(slot))

        self.assertEqual([State.STARTED], self.states())
        self.assertGreater(self.lease_left(slot), 290)

    def test_lease_is_extended_about_once_per_minute(self) -> None:
        slot = self.ready_slot()
        for seconds, extensions in ((30, 0), (35, 1), (30, 1)):
            self.result_of(self.lifecycle.stop(slot))
            self.advance(seconds)
            self.result_of(self.lifecycle.start(slot))

            self.assertEqual(extensions, self.api.count("refresh_lease"))

    def test_start_right_after_a_stop_is_retried(self) -> None:
        slot = self.ready_slot()
        stopping = self.start(self.lifecycle.stop(slot))
        self.advance(0.5)
        self.successResultOf(stopping)
        self.result_of(self.lifecycle.start(slot), within=1)

        self.assertGreaterEqual(self.api.count("start"), 2)

    def test_lease_that_cannot_be_extended_is_an_error_if_it_is_too_short(self) -> None:
        slot = self.ready_slot()
        self.result_of(self.lifecycle.stop(slot))
        self.api.always["refresh_lease"] = DOWN
        self.result_of(self.lifecycle.start(slot))
        self.result_of(self.lifecycle.stop(slot))
        self.advance(220)

        self.assertIsInstance(self.error_of(self.lifecycle.start(slot)), UnavailableError)


class StopTests(PartsCase):
    def test_stop_returns_when_it_is_confirmed(self) -> None:
        slot = self.ready_slot()
        stopping = self.start(self.lifecycle.stop(slot))
        self.advance(0.4)
        self.assertNoResult(stopping)
        self.advance(0.2)

        self.successResultOf(stopping)
        self.assertEqual([State.STOPPED], self.states())

    def test_suspension_and_resumption(self) -> None:
        slot = self.ready_slot()
        self.assertIs(True, self.result_of(self.lifecycle.suspend(slot)))
        self.assertEqual([State.SUSPENDED], self.states())
        self.result_of(self.lifecycle.resume(slot))

        self.assertEqual([State.STARTED], self.states())

    def test_failed_suspension_is_reported(self) -> None:
        slot = self.ready_slot()
        self.api.next("suspend", DOWN)

        self.assertIs(False, self.result_of(self.lifecycle.suspend(slot)))


class AdoptTests(PartsCase):
    def test_adopted_machine_gets_a_new_nonce(self) -> None:
        left = self.ready_slot()
        slot = self.slot(phase=Phase.ADOPTING)
        slot.known_machine = left.machine
        self.result_of(self.lifecycle.adopt(slot))

        self.assertNotEqual(left.nonce, slot.nonce)
        self.assertEqual(self.lease(slot).nonce, slot.nonce)
        late = self.error_of(self.machines.stop(left.machine.id, left.nonce))
        self.assertIsInstance(late, LeaseHeldError)

    def test_machine_without_a_lease_is_not_adopted(self) -> None:
        left = self.ready_slot()
        self.advance(301)
        slot = self.slot(phase=Phase.ADOPTING)
        slot.known_machine = left.machine

        self.assertIsInstance(self.error_of(self.lifecycle.adopt(slot)), NotFoundError)


class DestroyTests(PartsCase):
    def test_destruction_is_retried_until_it_succeeds(self) -> None:
        slot = self.ready_slot()
        self.api.next("destroy", DOWN, DOWN, Hang())
        self.result_of(self.lifecycle.destroy(slot), within=30)

        self.assertEqual(([], 4), (self.existing(), self.api.count("destroy")))

    def test_machine_that_is_gone_is_destroyed(self) -> None:
        slot = self.ready_slot()
        self.result_of(self.machines.destroy(slot.machine.id, slot.nonce))

        self.result_of(self.lifecycle.destroy(slot))

    def test_expired_lease_is_no_obstacle(self) -> None:
        slot = self.ready_slot()
        self.advance(301)
        self.result_of(self.lifecycle.destroy(slot))

        self.assertEqual([], self.existing())

    def test_machine_that_another_client_leased_is_left(self) -> None:
        slot = self.ready_slot()
        self.advance(301)
        self.result_of(self.machines.acquire_lease(slot.machine.id, 300, "another client"))

        self.assertIsInstance(self.error_of(self.lifecycle.destroy(slot)), LeaseLostError)
        self.assertEqual([slot.machine.id], [machine.id for machine in self.existing()])

    def test_unadopted_machine_is_destroyed_with_its_present_lease(self) -> None:
        left = self.ready_slot()
        slot = self.slot(phase=Phase.ADOPTING)
        slot.known_machine = left.machine
        self.result_of(self.lifecycle.destroy(slot))

        self.assertEqual([], self.existing())

    def test_late_duplicate_is_destroyed_too(self) -> None:
        slot = self.slot()
        self.api.next("create", LoseResponse())
        self.result_of(self.lifecycle.create(slot))
        destroying = self.start(self.lifecycle.destroy(slot))
        self.advance(1)
        self.assertEqual([], self.existing())
        self.result_of(self.machines.create(slot.name, "r", MachineConfig("i"), 0))
        self.advance(API_SETTLE_TIME)
        self.successResultOf(destroying)

        self.assertEqual([], self.existing())

    def test_closing_pool_gives_up_after_a_timeout(self) -> None:
        slot = self.ready_slot()
        self.api.always["destroy"] = DOWN
        self.lifecycle.close()
        destroying = self.start(self.lifecycle.destroy(slot))
        self.advance(self.config.timeouts.destroy - 1)
        self.assertNoResult(destroying)
        self.advance(2)

        self.failureResultOf(destroying, DestroyTimeoutError)
