"""
What really happens in a simulated world, and the invariants that must hold there.

The oracle sees the effects of calls on the machines and the requests that reach workers, never the state of
a coordinator. Violations are numbered as the guarantees in `docs/guarantees.md`.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bfaas.machines.api import Lease
from bfaas.machines.emulator.state import EmulatedMachines, _is_gone
from bfaas.pooling.config import pool_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.machines.api import Machine, MachineConfig
    from tests.simulation.nodes import Node
    from tests.simulation.world import World

MAX_CALLS_PER_MINUTE = 150
"""Limit of one coordinator's modifying API calls per minute, for each slot of its pool."""


EXIT_NOTICE_TIME = 6.0
"""Seconds after a boot within which a pool retires the machine if its worker exits before it responds."""

HANDOVER_TIME = 10.0
"""Seconds for which a machine whose lease was released is reserved for its pool's next instance."""


class InvariantError(AssertionError):
    """An invariant was violated."""


@dataclass(eq=False)
class Boot:
    """A machine's time from one start to the next stop."""

    number: int
    machine: Machine
    config: MachineConfig
    exited: Callable[[], None]
    listens_at: float
    requests: int = 0
    executions: int = 0
    stopping: bool = False
    ended: bool = False
    on_end: list[Callable[[], None]] = field(default_factory=list)

    def end(self) -> None:
        """End it, and fail the connections to it."""
        self.ended = True
        callbacks, self.on_end = self.on_end, []
        for callback in callbacks:
            callback()


@dataclass(eq=False)
class Record:
    """What the oracle knows about a machine."""

    machine: Machine
    creator: Node
    unknown_to_pool: bool = False
    """Its pool cannot know that it exists, and need not count it."""

    tampered: bool = False
    tampering_seen_by: set[Node] = field(default_factory=set)
    leased_by: Node | None = None
    released_at: float | None = None


class Oracle:
    """The machines' backend, which simulates their boots, and the checker of the invariants."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.boots: dict[str, Boot] = {}
        self.records: dict[str, Record] = {}
        self.executions: Counter[str] = Counter()
        self.nonces: set[str] = set()
        self._boot_count = 0
        self._recent_calls: dict[Node, deque[float]] = {}
        self.calls = 0

    # The backend.

    def allocate_url(self) -> None:
        """Return no URL."""

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        world = self._world
        if world.fault("boot-fails"):
            raise OSError("no such image")
        if world.fault("stuck-starting"):
            await world.block_until_healed()
            raise OSError("the host gives up")
        self._boot_count += 1
        delay = 1e9 if world.fault("never-listens") else world.random.choice([0.0, 0.02, 0.5])
        if world.fault("listens-late"):
            delay = world.random.uniform(5, 25)
        boot = Boot(self._boot_count, machine, config, exited, world.clock.now + delay)
        self.boots[machine.id] = boot
        world.log("boot", machine.name, boot.number)
        if world.exits_at_boot or world.fault("exits-at-boot"):
            world.exits_at_boot = max(0, world.exits_at_boot - 1)
            boot.listens_at = world.clock.now + 1e9
            world.clock.call_later(world.random.uniform(0, 1), self.exit, boot)
            if not world.chaos:
                world.clock.call_later(EXIT_NOTICE_TIME, world.check_exit_noticed, boot)
        if world.fault("machine-exits"):
            world.clock.call_later(world.random.uniform(0, 40), self.exit, boot)

    async def kill(self, machine_id: str) -> None:
        world = self._world
        boot = self.boots.get(machine_id)
        if boot is not None:
            if not boot.stopping and world.fault("stuck-stopping"):
                boot.stopping = True
                await world.block_until_healed()
            boot.end()
            if self.boots.get(machine_id) is boot:
                del self.boots[machine_id]

    async def pause(self, machine_id: str) -> None:
        """Do nothing: requests reach started machines only."""

    async def resume(self, machine_id: str) -> None:
        """Do nothing, or lose the snapshot."""
        if self._world.fault("cold-resume"):
            raise OSError("no snapshot")

    def exit(self, boot: Boot) -> None:
        """End a machine's main process."""
        if not boot.ended:
            self._world.log("exit", boot.machine.name, boot.number)
            boot.end()
            boot.exited()

    # API calls.

    def on_call(self, node: Node, method: str) -> None:
        """Count a call, whether or not it takes effect."""
        self.calls += 1
        if method in ("wait", "get", "list"):
            return
        recent = self._recent_calls.setdefault(node, deque())
        recent.append(self._world.clock.now)
        while recent[0] < self._world.clock.now - 60:
            recent.popleft()
        if len(recent) > MAX_CALLS_PER_MINUTE * (node.size + 1):
            self.report(f"13: {node} calls {len(recent)} times a minute")

    def on_inspected(self, node: Node, machines: list[Machine]) -> None:
        """Record which tampered machines a reconciliation of a node has seen."""
        for machine in machines:
            record = self.records.get(machine.id)
            if record is not None and machine.metadata != record.machine.metadata:
                record.tampering_seen_by.add(node)

    def on_changed(
        self, node: Node, method: str, machine: Machine, lease: Lease | None, *, in_use: bool
    ) -> None:
        """Check a call that has changed a machine; `machine` and `lease` are from before the call."""
        record = self.records.get(machine.id)
        if record is None or not pool_of(machine.name):
            self.report(f"6: {node} does {method} to {machine.name}, which is no pool's")
            return
        if pool_of(machine.name) != node.pool_name and lease is not None:
            self.report(f"6: {node} does {method} to {machine.name}, whose lease is valid")
        if pool_of(machine.name) != node.pool_name and record.released_at is not None:
            seconds = self._world.clock.now - record.released_at
            if seconds < HANDOVER_TIME:
                self.report(f"6: {node} does {method} to {machine.name}, released {seconds:.1f} s ago")
        if method == "release_lease" and lease is not None:
            record.released_at = self._world.clock.now
        if method != "destroy" and pool_of(machine.name) != node.pool_name:
            self.report(f"6: {node} does {method} to {machine.name}, which is another pool's")
        if in_use and method in ("destroy", "stop", "release_lease") and not record.tampered:
            self.report(f"9: {node} does {method} to {machine.name}, which it has in use")

    def on_created(self, node: Node, machine: Machine) -> None:
        """Check that a new machine does not exceed its pool's size."""
        record = self.records[machine.id] = Record(machine, node, leased_by=node)
        record.unknown_to_pool = not node.alive  # a closing pool does not wait for late creations
        if not node.alive or node.overlaps:
            return
        count = sum(
            pool_of(other.name) == node.pool_name and not self.records[other.id].unknown_to_pool
            for other in self._world.machines.current()
        )
        if count > node.size:
            self.report(f"5: {node} has {count} machines, its size is {node.size}")

    def on_node_gone(self, node: Node) -> None:
        """Mark the machines that a node has created but that lists do not show yet as unknown."""
        for record in self.records.values():
            age = self._world.clock.now - record.machine.created_at + self._world.EPOCH
            if record.creator is node and age < self._world.LIST_LAG:
                record.unknown_to_pool = True

    # Requests.

    def on_run_requested(self, node: Node, boot: Boot) -> None:
        """Check a run that a coordinator sends to a worker."""
        world, machine = self._world, boot.machine
        record = self.records[machine.id]
        boot.requests += 1
        overlaps = node.overlaps
        if boot.requests > 1 and not overlaps:
            self.report(f"1: {machine.name} gets two requests in boot {boot.number}")
        if pool_of(machine.name) != node.pool_name:
            self.report(f"3: {node} uses {machine.name}")
        if machine.image != node.image:
            self.report(f"12: {node} uses {machine.name} of image {machine.image}")
        if node in record.tampering_seen_by:
            self.report(f"7: {node} uses {machine.name} though it knows that it was tampered with")
        lease = world.machines.lease_of(machine.id)
        remaining = lease.expires_at - world.wall() if lease else 0.0
        covered = record.leased_by is node and remaining >= node.settings.max_req_time
        if not covered and not overlaps and world.machines.find(machine.id) is not None:
            lessee = record.leased_by
            self.report(f"8: {node} uses {machine.name}, leased by {lessee} for {remaining:.1f} s more")

    def on_script_started(self, boot: Boot, request: str) -> None:
        """Check a script that starts on a machine."""
        boot.executions += 1
        self.executions[request] += 1
        if boot.executions > 1:
            self.report(f"1: {boot.machine.name} runs two scripts in boot {boot.number}")
        if self.executions[request] > 1:
            self.report(f"2: {request} is run twice")

    def report(self, violation: str) -> None:
        """Record a violation. An exception raised here could be caught by the code under test."""
        self._world.log("VIOLATION", violation)
        self._world.violations.append(violation)


class SimulatedMachines(EmulatedMachines):
    """The emulator's machines, with access to their state and faults of their own."""

    world: World

    def current(self) -> list[Machine]:
        """Return the machines that exist."""
        return [entry.machine for entry in self._entries.values() if not _is_gone(entry)]

    def find(self, machine_id: str) -> Machine | None:
        """Return a machine if it exists."""
        entry = self._entries.get(machine_id)
        return None if entry is None or _is_gone(entry) else entry.machine

    def lease_of(self, machine_id: str) -> Lease | None:
        """Return the current lease, if any."""
        entry = self._entries.get(machine_id)
        return None if entry is None else self._current_lease(entry)

    def lease_to_operator(self, machine_id: str, seconds: float) -> None:
        """Lease a machine with a nonce that no coordinator knows."""
        self._entries[machine_id].lease = Lease(self._hex(12), self._wall_clock() + seconds)

    def vanish(self, machine_id: str) -> None:
        """Destroy a machine as a failing host does."""
        entry = self._entries.get(machine_id)
        if entry is not None:
            entry.lease = None
            self._run_in_background(self._destroy(entry))

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        if machine_id in self._entries and self.world.fault("migrates"):
            self.migrate_at_start(machine_id)
        return await super().start(machine_id, nonce)

    async def _boot(self, entry: Any) -> None:
        if self.world.fault("stuck-created"):
            return
        await super()._boot(entry)
