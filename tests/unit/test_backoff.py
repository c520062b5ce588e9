from __future__ import annotations

from random import Random

from twisted.trial.unittest import SynchronousTestCase

from bfaas.backoff import BackoffSchedule


class BackoffScheduleTests(SynchronousTestCase):
    schedule = BackoffSchedule(initial=0.1, maximum=5.0)

    def test_delay_doubles_up_to_the_maximum(self) -> None:
        delays = [self.schedule.delay(failures) for failures in range(8)]

        self.assertEqual([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], delays)

    def test_any_number_of_failures_has_a_delay(self) -> None:
        self.assertEqual(5.0, self.schedule.delay(10**6))

    def test_jitter_takes_off_up_to_a_half(self) -> None:
        random = Random(1)
        delays = [self.schedule.delay(3, random) for _ in range(1000)]

        self.assertTrue(all(0.4 <= delay <= 0.8 for delay in delays))
        self.assertLess(min(delays), 0.42)
        self.assertGreater(max(delays), 0.78)

    def test_factor_sets_the_growth(self) -> None:
        slow = BackoffSchedule(initial=1.0, maximum=10.0, factor=1.5)

        self.assertEqual([1.0, 1.5, 2.25], [slow.delay(failures) for failures in range(3)])
