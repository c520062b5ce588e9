"""Deadlines: cancellation at the deadline and before it, and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from bfaas.deadline import Deadline, DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

T = TypeVar("T")


class DeadlineTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.cancelled: list[Deferred[Any]] = []
        self.work: Deferred[str] = Deferred(self.cancelled.append)

    def run_for(self, seconds: float, work: Coroutine[Any, Any, T] | Deferred[T]) -> Deferred[T]:
        return Deferred.fromCoroutine(Deadline(self.clock, seconds).run(work))

    def assert_no_timer(self) -> None:
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_work_that_ends_in_time_leaves_no_timer(self) -> None:
        waiting = self.run_for(2, self.work)
        self.clock.advance(1.9)
        self.assertNoResult(waiting)
        self.work.callback("done")
        self.assertEqual("done", self.successResultOf(waiting))
        self.assert_no_timer()

    def test_cancels_the_work_at_the_deadline(self) -> None:
        waiting = self.run_for(2.5, self.work)
        self.clock.advance(2.4)
        self.assertEqual([], self.cancelled)
        self.clock.advance(0.1)
        self.assertEqual([self.work], self.cancelled)
        error = self.failureResultOf(waiting, DeadlineExceededError).value
        self.assertEqual((2.5, "not done after 2.5 s"), (error.seconds, str(error)))
        self.assert_no_timer()

    def test_raises_errors_of_the_work(self) -> None:
        waiting = self.run_for(2, self.work)
        self.work.errback(ZeroDivisionError())
        self.failureResultOf(waiting, ZeroDivisionError)
        self.assert_no_timer()

    def test_cancelling_cancels_the_work_and_is_not_an_exceeded_deadline(self) -> None:
        waiting = self.run_for(2, self.work)
        waiting.cancel()
        self.assertEqual([self.work], self.cancelled)
        self.failureResultOf(waiting, CancelledError)
        self.assert_no_timer()

    def test_raises_errors_of_the_cleanup(self) -> None:
        async def work() -> None:
            try:
                await self.work
            finally:
                raise ZeroDivisionError

        waiting = self.run_for(2, work())
        self.clock.advance(2)
        self.failureResultOf(waiting, ZeroDivisionError)

    def test_waits_for_the_cleanup(self) -> None:
        cleaned: Deferred[None] = Deferred()

        async def work() -> None:
            try:
                await self.work
            finally:
                await cleaned

        waiting = self.run_for(2, work())
        self.clock.advance(2)
        self.assertNoResult(waiting)
        cleaned.callback(None)
        self.failureResultOf(waiting, DeadlineExceededError)

    def test_steps_share_the_time(self) -> None:
        deadline = Deadline(self.clock, 3)
        self.assertEqual(3, deadline.remaining)
        self.clock.advance(2)
        self.assertEqual(1, deadline.remaining)
        waiting = Deferred.fromCoroutine(deadline.run(self.work))
        self.clock.advance(1)
        self.failureResultOf(waiting, DeadlineExceededError)
        self.clock.advance(1)
        self.assertEqual(0, deadline.remaining)

    def test_raises_the_error_of_the_earliest_deadline(self) -> None:
        for outer, inner in ((1, 2), (2, 1)):
            work: Deferred[None] = Deferred()
            waiting = self.run_for(outer, Deadline(self.clock, inner).run(work))
            self.clock.advance(1)
            self.assertEqual(1, self.failureResultOf(waiting, DeadlineExceededError).value.seconds)
            self.assert_no_timer()
