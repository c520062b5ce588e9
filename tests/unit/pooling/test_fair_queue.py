from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.trial.unittest import SynchronousTestCase

from bfaas.pooling.fair_queue import FairQueue

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.python.failure import Failure


class ClosedError(Exception):
    """The error of a closed queue."""


class FairQueueTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.queue: FairQueue[int] = FairQueue()
        self.assigned: list[str] = []

    def enqueue(self, client: str, count: int = 1) -> list[Deferred[Any]]:
        """Add entries, whose assignments are recorded by client and number."""
        entries = [self.queue.enqueue(client) for _ in range(count)]
        for number, entry in enumerate(entries):
            entry.addCallback(partial(self._record, f"{client}{number}"))
        return entries

    def _record(self, name: str, _: int) -> None:
        self.assigned.append(name)

    def assign(self, count: int) -> list[str]:
        self.assigned.clear()
        for number in range(count):
            self.queue.assign(number)
        return self.assigned

    def test_one_client_is_served_first_in_first_out(self) -> None:
        self.enqueue("a", 3)

        self.assertEqual(["a0", "a1", "a2"], self.assign(3))

    def test_clients_are_served_round_robin(self) -> None:
        self.enqueue("a", 4)
        self.enqueue("b", 2)
        self.enqueue("c", 1)

        self.assertEqual(["a0", "b0", "c0", "a1", "b1", "a2", "a3"], self.assign(7))

    @given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(0, 12))
    def test_position_is_the_number_of_assignments_until_the_entry_has_its_resource(
        self, clients: list[str], assigned: int
    ) -> None:
        queue: FairQueue[int] = FairQueue()
        entries = [(client, queue.enqueue(client)) for client in clients]
        for number in range(min(assigned, len(entries))):
            queue.assign(number)
        queued = [(client, entry) for client, entry in entries if not entry.called]
        positions = [queue.position(client, entry) for client, entry in queued]
        for number in range(len(queue)):
            queue.assign(-number - 1)

        found = [-self.successResultOf(entry) for _, entry in queued]
        self.assertEqual(found, positions)

    def test_many_requests_of_one_client_delay_another_by_one(self) -> None:
        self.enqueue("many", 1000)
        self.assign(500)
        self.enqueue("one")

        self.assertEqual(["many500", "one0", "many501"], self.assign(3))

    def test_returning_client_is_last(self) -> None:
        self.enqueue("a")
        self.enqueue("b", 2)
        self.assign(1)
        self.enqueue("a")

        self.assertEqual(["b0", "a0", "b1"], self.assign(3))

    def test_cancelled_entry_leaves_the_queue(self) -> None:
        first, second, third = self.enqueue("a", 3)
        [other] = self.enqueue("b")
        for entry in (second, other):
            entry.cancel()
            self.failureResultOf(entry, CancelledError)

        self.assertEqual(2, len(self.queue))
        self.assertEqual(["a0", "a2"], self.assign(2))
        self.assertEqual(0, len(self.queue))
        for entry in (first, third):
            self.successResultOf(entry)

    def test_cancellation_keeps_the_clients_position(self) -> None:
        first, _ = self.enqueue("a", 2)
        self.enqueue("b")
        first.addErrback(lambda failure: failure.trap(CancelledError) and None)
        first.cancel()

        self.assertEqual(["a1", "b0"], self.assign(2))

    def test_callbacks_may_change_the_queue(self) -> None:
        [first] = self.enqueue("a")
        [second] = self.enqueue("b")
        second.addErrback(lambda failure: failure.trap(CancelledError) and None)
        first.addCallback(lambda _: second.cancel())
        first.addCallback(lambda _: self.enqueue("c"))

        self.assertEqual(["a0", "c0"], self.assign(2))

    def test_closed_queue_fails_all_entries_and_later_ones(self) -> None:
        entries = [*self.enqueue("a", 2), *self.enqueue("b")]
        late: list[Deferred[Any]] = []

        def enqueue_again(failure: Failure) -> Failure:
            late.append(self.queue.enqueue("a"))
            return failure

        entries[0].addErrback(enqueue_again)
        self.queue.close(ClosedError)

        for entry in [*entries, *late, *self.enqueue("c")]:
            self.failureResultOf(entry, ClosedError)
        self.assertEqual(0, len(self.queue))

    @given(
        st.lists(st.sampled_from(["enqueue a", "enqueue b", "enqueue c", "assign", "cancel 0", "cancel 3"]))
    )
    def test_behaves_like_a_list_of_lists(self, steps: list[str]) -> None:
        self.queue, self.assigned = FairQueue(), []
        model: list[list[str]] = []
        entries: dict[str, Deferred[Any]] = {}
        expected: list[str] = []
        for number, step in enumerate(steps):
            operation, _, which = step.partition(" ")
            waiting = [name for names in model for name in names]
            if operation == "enqueue":
                name = f"{which}{number}"
                entries[name] = self.queue.enqueue(which)
                entries[name].addCallback(partial(self._record, name))
                own = [names for names in model if names[0][0] == which]
                own[0].append(name) if own else model.append([name])
            elif operation == "assign" and model:
                names = model.pop(0)
                expected.append(names.pop(0))
                model += [names] if names else []
                self.queue.assign(number)
            elif operation == "cancel" and int(which) < len(waiting):
                name = waiting[int(which)]
                model = [rest for names in model if (rest := [other for other in names if other != name])]
                entries[name].addErrback(lambda failure: failure.trap(CancelledError) and None)
                entries[name].cancel()
            self.assertEqual(expected, self.assigned)
            self.assertEqual(sum(map(len, model)), len(self.queue))
