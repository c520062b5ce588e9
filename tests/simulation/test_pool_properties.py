"""The pool's own interface, used in any order: hypothesis looks for the shortest way to break a promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from twisted.internet.defer import CancelledError

from bfaas.pool import Allocation, PoolClosedError
from bfaas.pooling.config import pool_of
from tests.simulation.world import SERVED_AGAIN, World

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from tests.simulation.nodes import Node

FAULTS = ("500", "429", "lost-answer", "hangs", "hangs-after", "zombie-call", "late-answer", "no-capacity")
POOLS = st.sampled_from(["p", "p-1"])

_kept: list[World] = []  # what waits in a crashed pool must not be collected: Python would run its clean-up


class Worlds(World):
    """A world in which nothing goes wrong but what a rule says of the next calls."""

    def __init__(self) -> None:
        super().__init__(1)
        self.rates, self.events, self.traits, self.how = {}, {}, set(), []
        self.coming: list[str] = []

    def strikes(self) -> frozenset[str]:
        return frozenset({self.coming.pop(0)} if self.coming else ())


class PoolMachine(RuleBasedStateMachine):
    """Two pools that share an app."""

    places = Bundle("places")

    @initialize(size=st.integers(1, 3))
    def begin(self, size: int) -> None:
        self.world = Worlds()
        _kept.append(self.world)
        self.size = size
        self.held: dict[Allocation, Node] = {}
        self.line: list[Deferred[Any]] = []
        for name in ("p", "p-1"):
            self.world._start_node(name, size)
        self.world._run(1.0)

    @rule(target=places, name=POOLS, client=st.sampled_from(["a", "b"]))
    def allocate(self, name: str, client: str) -> Any:
        """Ask for a machine, and note it when it comes."""
        node = self.world.latest(name)
        place: Deferred[Any] = node.pool.allocate(client)
        self.line.append(place)
        place.addCallbacks(lambda allocation: self._given(allocation, node), self._not_given)
        return place

    def _given(self, allocation: Allocation, node: Node) -> Allocation:
        """Nobody else has it; it is of that pool; it was wiped before, or is new; it is leased."""
        world, machine = self.world, allocation.machine
        boot = world.ledger.boots.get(machine.id)
        assert machine.id not in {held.machine.id for held in self.held}
        assert pool_of(machine.name) == node.pool_name
        if boot is not None:
            world.ledger.asked_to_run(node, boot)
        self.held[allocation] = node
        return allocation

    def _not_given(self, failure: Any) -> None:
        failure.trap(CancelledError, PoolClosedError)

    @rule(place=consumes(places))
    def give_up(self, place: Deferred[Any]) -> None:
        """Leave the line, or give the machine back."""
        place.cancel()
        allocation = place.result if place.called else None
        if isinstance(allocation, Allocation) and self.held.pop(allocation, None) is not None:
            allocation.release()

    @rule(seconds=st.sampled_from([0.03, 1.0, 25.0, 310.0]))
    def wait(self, seconds: float) -> None:
        self.world._run(seconds)

    @rule(faults=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=4))
    def trouble(self, faults: list[str]) -> None:
        self.world.coming += faults

    @rule(name=POOLS)
    def crash_and_start_again(self, name: str) -> None:
        node = self.world.latest(name)
        node.crash()
        self.held = {held: user for held, user in self.held.items() if user is not node}
        self.world._start_node(name, self.size)

    @rule(name=POOLS)
    def stand_still(self, name: str) -> None:
        node = self.world.latest(name)
        node.clock.pause()
        self.world._run(320.0)
        node.clock.resume()

    @rule(chance=st.randoms(use_true_random=False))
    def tamper(self, chance: Any) -> None:
        """Let a machine change its own metadata."""
        machines = self.world.machines.now()
        if machines:
            machine = chance.choice(machines)
            self.world.ledger.records[machine.id].tampered = True
            self.world.machines.set_metadata(machine.id, "pool_id", chance.choice(["p//i1", "p-1//i1", None]))

    @invariant()
    def nothing_is_broken(self) -> None:
        assert self.world.broken == []

    def teardown(self) -> None:
        """Give everything back: then every place serves again."""
        self.world.coming = []
        for place in self.line:
            place.cancel()
        for allocation in self.held:
            allocation.release()
        self.held = {}
        self.world._run(SERVED_AGAIN)
        self.world._check_service()
        self.world._check_end()
        assert self.world.broken == []


PoolMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
PoolTests = PoolMachine.TestCase
