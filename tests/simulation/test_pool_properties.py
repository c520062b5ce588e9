"""Properties of the pool's interface, used in any order: Hypothesis shrinks violations to short examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from twisted.internet.defer import CancelledError

from bfaas.pool import Allocation, PoolClosedError
from bfaas.pooling.config import pool_of
from tests.simulation.world import RECOVERY_TIME, World

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from tests.simulation.nodes import Node

FAULTS = (
    "500",
    "429",
    "lost-response",
    "hangs",
    "hangs-after-execution",
    "late-execution",
    "late-response",
    "no-capacity",
)
POOLS = st.sampled_from(["p", "p-1"])

_worlds: list[World] = []  # keeps the coroutines of crashed pools: collecting them would run their cleanup


class ScriptedWorld(World):
    """A world without faults, except those that a rule sets for the next calls."""

    def __init__(self) -> None:
        super().__init__(1)
        self.rates, self.events, self.traits, self.script_faults = {}, {}, set(), []
        self.next_faults: list[str] = []

    def call_faults(self) -> frozenset[str]:
        return frozenset({self.next_faults.pop(0)} if self.next_faults else ())


class PoolMachine(RuleBasedStateMachine):
    """Two pools that share an app."""

    requests = Bundle("requests")

    @initialize(size=st.integers(1, 3))
    def start(self, size: int) -> None:
        self.world = ScriptedWorld()
        _worlds.append(self.world)
        self.size = size
        self.allocations: dict[Allocation, Node] = {}
        self.all_requests: list[Deferred[Any]] = []
        for name in ("p", "p-1"):
            self.world._start_node(name, size)
        self.world._advance(1.0)

    @rule(target=requests, name=POOLS, client=st.sampled_from(["a", "b"]))
    def allocate(self, name: str, client: str) -> Any:
        """Request a machine; check it when it is allocated."""
        node = self.world.latest(name)
        request: Deferred[Any] = node.pool.allocate(client)
        self.all_requests.append(request)
        request.addCallbacks(lambda allocation: self._on_allocated(allocation, node), self._on_failed)
        return request

    def _on_allocated(self, allocation: Allocation, node: Node) -> Allocation:
        """Check that the machine is not allocated yet, is the pool's, new or stopped before, and leased."""
        world, machine = self.world, allocation.machine
        boot = world.oracle.boots.get(machine.id)
        assert machine.id not in {other.machine.id for other in self.allocations}
        assert pool_of(machine.name) == node.pool_name
        if boot is not None:
            world.oracle.on_run_requested(node, boot)
        self.allocations[allocation] = node
        return allocation

    def _on_failed(self, failure: Any) -> None:
        failure.trap(CancelledError, PoolClosedError)

    @rule(request=consumes(requests))
    def cancel_or_release(self, request: Deferred[Any]) -> None:
        """Leave the queue, or release the machine."""
        request.cancel()
        allocation = request.result if request.called else None
        if isinstance(allocation, Allocation) and self.allocations.pop(allocation, None) is not None:
            allocation.release()

    @rule(seconds=st.sampled_from([0.03, 1.0, 25.0, 310.0]))
    def wait(self, seconds: float) -> None:
        self.world._advance(seconds)

    @rule(faults=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=4))
    def inject_faults(self, faults: list[str]) -> None:
        self.world.next_faults += faults

    @rule(name=POOLS)
    def crash_and_restart(self, name: str) -> None:
        node = self.world.latest(name)
        node.crash()
        self.allocations = {held: owner for held, owner in self.allocations.items() if owner is not node}
        self.world._start_node(name, self.size)

    @rule(name=POOLS)
    def pause(self, name: str) -> None:
        node = self.world.latest(name)
        node.clock.pause()
        self.world._advance(320.0)
        node.clock.resume()

    @rule(chance=st.randoms(use_true_random=False))
    def tamper(self, chance: Any) -> None:
        """Change a machine's metadata, as a script on it can."""
        machines = self.world.machines.current()
        if machines:
            machine = chance.choice(machines)
            self.world.oracle.records[machine.id].tampered = True
            self.world.machines.set_metadata(machine.id, "pool_id", chance.choice(["p//i1", "p-1//i1", None]))

    @invariant()
    def no_violation(self) -> None:
        assert self.world.violations == []

    def teardown(self) -> None:
        """Release everything, and check that every slot serves again."""
        self.world.next_faults = []
        for request in self.all_requests:
            request.cancel()
        for allocation in self.allocations:
            allocation.release()
        self.allocations = {}
        self.world._advance(RECOVERY_TIME)
        self.world._check_service()
        self.world._check_shutdown()
        assert self.world.violations == []


PoolMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
PoolTests = PoolMachine.TestCase
