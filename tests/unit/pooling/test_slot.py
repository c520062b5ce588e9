from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.machines.api import Lease
from bfaas.pooling.slot import Phase, PhaseObserver, Slot


class SlotTests(SynchronousTestCase, PhaseObserver):
    def setUp(self) -> None:
        self.clock = Clock()
        self.changes: list[tuple[Phase, Phase, float]] = []
        self.slot = Slot("worker-p-1", self.clock, self)

    def observe_phase(self, old: Phase, new: Phase, seconds: float) -> None:
        self.changes.append((old, new, seconds))

    def test_new_slot_is_creating_since_now(self) -> None:
        self.clock.advance(3)
        slot = Slot("worker-p-2", self.clock, self)

        self.assertEqual((Phase.CREATING, 3.0), (slot.phase, slot.phase_since))

    def test_phase_changes_are_observed_with_their_durations(self) -> None:
        self.clock.advance(2)
        self.slot.transition_to(Phase.READY)
        self.clock.advance(5)
        self.slot.transition_to(Phase.RUNNING)

        self.assertEqual(
            [(Phase.CREATING, Phase.READY, 2.0), (Phase.READY, Phase.RUNNING, 5.0)], self.changes
        )
        self.assertEqual(7.0, self.slot.phase_since)

    def test_transition_to_the_same_phase_is_none(self) -> None:
        self.clock.advance(2)
        self.slot.transition_to(Phase.CREATING)

        self.assertEqual(([], 0.0), (self.changes, self.slot.phase_since))

    def test_wake_ends_park_with_whether_the_machine_is_wanted(self) -> None:
        for wanted in (True, False):
            parked = self.slot.park()
            self.assertNoResult(parked)
            self.slot.wake(wanted=wanted)

            self.assertIs(wanted, self.successResultOf(parked))

    def test_wake_does_nothing_to_a_slot_that_is_not_parked(self) -> None:
        self.slot.wake(wanted=True)
        parked = self.slot.park()
        self.assertNoResult(parked)
        self.slot.wake(wanted=True)
        self.slot.wake(wanted=False)

        self.assertIs(True, self.successResultOf(parked))

    def test_slot_without_a_machine_has_no_machine_and_no_nonce(self) -> None:
        self.assertRaises(RuntimeError, lambda: self.slot.machine)
        self.assertIsNone(self.slot.nonce)

    def test_nonce_is_that_of_the_lease(self) -> None:
        self.slot.lease = Lease("abc", 300.0)

        self.assertEqual("abc", self.slot.nonce)
