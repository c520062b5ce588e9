"""The line of those who wait: its order, its end, and what leaving it does."""

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
    """What a closed line fails with here."""


class LineTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.line: FairQueue[int] = FairQueue()
        self.started_at: list[str] = []

    def join(self, client: str, count: int = 1) -> list[Deferred[Any]]:
        """Take places; who is served is noted, as a letter and the number of the place."""
        places = [self.line.enqueue(client) for _ in range(count)]
        for number, place in enumerate(places):
            place.addCallback(partial(self._note, f"{client}{number}"))
        return places

    def _note(self, name: str, _: int) -> None:
        self.started_at.append(name)

    def serve(self, count: int) -> list[str]:
        self.started_at.clear()
        for number in range(count):
            self.line.assign(number)
        return self.started_at

    def test_one_client_is_served_in_the_order_in_which_it_came(self) -> None:
        self.join("a", 3)

        self.assertEqual(["a0", "a1", "a2"], self.serve(3))

    def test_clients_take_turns(self) -> None:
        self.join("a", 4)
        self.join("b", 2)
        self.join("c", 1)

        self.assertEqual(["a0", "b0", "c0", "a1", "b1", "a2", "a3"], self.serve(7))

    def test_a_thousand_requests_of_one_delay_anothers_by_one_turn(self) -> None:
        self.join("many", 1000)
        self.serve(500)
        self.join("one")

        self.assertEqual(["many500", "one0", "many501"], self.serve(3))

    def test_who_had_its_turn_and_comes_again_is_last(self) -> None:
        self.join("a")
        self.join("b", 2)
        self.serve(1)
        self.join("a")

        self.assertEqual(["b0", "a0", "b1"], self.serve(3))

    def test_who_leaves_takes_nothing_with_it(self) -> None:
        first, second, third = self.join("a", 3)
        [other] = self.join("b")
        for place in (second, other):
            place.cancel()
            self.failureResultOf(place, CancelledError)

        self.assertEqual(2, len(self.line))
        self.assertEqual(["a0", "a2"], self.serve(2))
        self.assertEqual(0, len(self.line))
        for place in (first, third):
            self.successResultOf(place)

    def test_leaving_keeps_a_clients_turn_for_its_other_requests(self) -> None:
        first, _ = self.join("a", 2)
        self.join("b")
        first.addErrback(lambda failure: failure.trap(CancelledError) and None)
        first.cancel()

        self.assertEqual(["a1", "b0"], self.serve(2))

    def test_who_is_served_may_join_or_leave_at_once(self) -> None:
        [first] = self.join("a")
        [second] = self.join("b")
        second.addErrback(lambda failure: failure.trap(CancelledError) and None)
        first.addCallback(lambda _: second.cancel())
        first.addCallback(lambda _: self.join("c"))

        self.assertEqual(["a0", "c0"], self.serve(2))

    def test_a_closed_line_fails_all_and_whoever_comes(self) -> None:
        places = [*self.join("a", 2), *self.join("b")]
        late: list[Deferred[Any]] = []

        def come_again(failure: Failure) -> Failure:
            late.append(self.line.enqueue("a"))
            return failure

        places[0].addErrback(come_again)
        self.line.close(ClosedError)

        for place in [*places, *late, *self.join("c")]:
            self.failureResultOf(place, ClosedError)
        self.assertEqual(0, len(self.line))

    @given(st.lists(st.sampled_from(["join a", "join b", "join c", "serve", "leave 0", "leave 3"])))
    def test_it_does_what_a_plain_list_of_lists_does(self, steps: list[str]) -> None:
        self.line, self.started_at = FairQueue(), []
        plain: list[list[str]] = []
        places: dict[str, Deferred[Any]] = {}
        expected: list[str] = []
        for number, step in enumerate(steps):
            what, _, which = step.partition(" ")
            waiting = [name for names in plain for name in names]
            if what == "join":
                name = f"{which}{number}"
                places[name] = self.line.enqueue(which)
                places[name].addCallback(partial(self._note, name))
                mine = [names for names in plain if names[0][0] == which]
                mine[0].append(name) if mine else plain.append([name])
            elif what == "serve" and plain:
                names = plain.pop(0)
                expected.append(names.pop(0))
                plain += [names] if names else []
                self.line.assign(number)
            elif what == "leave" and int(which) < len(waiting):
                name = waiting[int(which)]
                plain = [left for names in plain if (left := [other for other in names if other != name])]
                places[name].addErrback(lambda failure: failure.trap(CancelledError) and None)
                places[name].cancel()
            self.assertEqual(expected, self.started_at)
            self.assertEqual(sum(map(len, plain)), len(self.line))
