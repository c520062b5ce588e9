from __future__ import annotations

from random import Random

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.pooling.backoff import Backoff, JitteredBackoff


class JitteredBackoffTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.delays = JitteredBackoff(self.clock, Random(1))

    def sleep(self, seconds: float) -> Deferred[None]:
        return Deferred.fromCoroutine(self.delays.sleep(seconds))

    def test_delays_grow_from_a_moment_to_half_a_minute(self) -> None:
        self.assertTrue(0.025 <= self.delays.delay(0) <= 0.05)
        self.assertTrue(15.0 <= self.delays.delay(1000) <= 30.0)

    def test_sleep_takes_its_time(self) -> None:
        sleeping = self.sleep(2.0)
        self.clock.advance(1.9)
        self.assertNoResult(sleeping)
        self.clock.advance(0.1)
        self.successResultOf(sleeping)

    def test_cancelled_sleep_leaves_no_timer(self) -> None:
        sleeping = self.sleep(2.0)
        sleeping.cancel()

        self.failureResultOf(sleeping, CancelledError)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_expedite_ends_sleeps_and_shortens_later_ones(self) -> None:
        sleeping = [self.sleep(30.0), self.sleep(60.0)]
        self.delays.expedite()
        self.clock.advance(0)
        for each in sleeping:
            self.successResultOf(each)

        later, short = self.sleep(30.0), self.sleep(0.1)
        self.clock.advance(0.1)
        self.successResultOf(short)
        self.assertNoResult(later)
        self.clock.advance(0.4)
        self.successResultOf(later)


class BackoffTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.backoff = Backoff(self.clock, JitteredBackoff(self.clock, Random(1)), self.count)

    def count(self) -> None:
        self.calls += 1

    def fail_and_measure(self) -> float:
        """Fail once; return the seconds until the pause is over."""
        self.backoff.failed()
        started_at = self.clock.seconds()
        while self.backoff.active:
            self.clock.advance(0.005)
        return self.clock.seconds() - started_at

    def test_failure_starts_a_pause_that_ends_with_one_callback(self) -> None:
        self.assertFalse(self.backoff.active)
        self.backoff.failed()
        self.assertEqual((True, 0), (self.backoff.active, self.calls))
        self.clock.advance(0.05)
        self.assertEqual((False, 1), (self.backoff.active, self.calls))

    def test_pauses_grow_with_failures_in_a_row(self) -> None:
        pauses = [self.fail_and_measure() for _ in range(6)]

        self.assertEqual(sorted(pauses), pauses)
        self.assertGreater(pauses[-1], 0.7)

    def test_failures_during_a_pause_count_once(self) -> None:
        for _ in range(10):
            self.backoff.failed()
        self.clock.advance(0.05)

        self.assertEqual(1, self.calls)
        self.assertLessEqual(self.fail_and_measure(), 0.11)

    def test_success_makes_the_next_pause_short(self) -> None:
        for _ in range(6):
            self.fail_and_measure()
        self.backoff.succeeded()

        self.assertLessEqual(self.fail_and_measure(), 0.06)

    def test_closed_backoff_starts_no_pause_and_calls_nothing(self) -> None:
        self.backoff.failed()
        self.backoff.close()
        self.backoff.failed()
        self.clock.advance(60.0)

        self.assertEqual((False, 0), (self.backoff.active, self.calls))
        self.assertEqual([], self.clock.getDelayedCalls())
