"""
What really happens in a simulated world, and what must never happen there.

The ledger sees the effects of calls on the machines and what reaches the workers, never what a coordinator
believes. What it checks is numbered as in `docs/promises.md`.
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

CALLS_A_MINUTE = 150
"""Calls that one coordinator makes in a minute at the most, for each place in its pool."""


NOTICED = 6.0
"""Seconds after a boot within which a pool gives up the machine if its worker ended before an answer."""

HANDED_OVER = 10.0
"""Seconds for which a machine is its pool's though its lease was given back: its next instance takes it."""


class BrokenPromiseError(AssertionError):
    """Something happened that must not."""


@dataclass(eq=False)
class Boot:
    """A machine's time from one start to the next stop."""

    number: int
    machine: Machine
    config: MachineConfig
    exited: Callable[[], None]
    listens_at: float
    asked: int = 0
    executed: int = 0
    stopping: bool = False
    over: bool = False
    lost: list[Callable[[], None]] = field(default_factory=list)

    def end(self) -> None:
        """Cut what is connected to it."""
        self.over = True
        lost, self.lost = self.lost, []
        for call in lost:
            call()


@dataclass(eq=False)
class Record:
    """What the ledger knows of a machine."""

    machine: Machine
    creator: Node
    nobody_knew: bool = False
    tampered: bool = False
    seen_tampered_by: set[Node] = field(default_factory=set)
    leased_by: Node | None = None
    released_at: float | None = None


class Ledger:
    """Gives machines bodies that are only told of, and keeps the books."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.boots: dict[str, Boot] = {}
        self.records: dict[str, Record] = {}
        self.executions: Counter[str] = Counter()
        self.nonces: set[str] = set()
        self._count = 0
        self._calls: dict[Node, deque[float]] = {}
        self.calls = 0

    # Bodies.

    def allocate_url(self) -> None:
        """Be nowhere."""

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        world = self._world
        if world.fault("boot-fails"):
            raise OSError("no such image")
        if world.fault("stuck-starting"):
            await world.stuck()
            raise OSError("the host gives up")
        self._count += 1
        delay = 1e9 if world.fault("never-listens") else world.random.choice([0.0, 0.02, 0.5])
        if world.fault("listens-late"):
            delay = world.random.uniform(5, 25)
        boot = Boot(self._count, machine, config, exited, world.clock.now + delay)
        self.boots[machine.id] = boot
        world.note("boot", machine.name, boot.number)
        if world.exits_at_boot or world.fault("exits-at-boot"):
            world.exits_at_boot = max(0, world.exits_at_boot - 1)
            boot.listens_at = world.clock.now + 1e9
            world.clock.call_later(world.random.uniform(0, 1), self.die, boot)
            if not world.chaos:
                world.clock.call_later(NOTICED, world.check_noticed, boot)
        if world.fault("body-dies"):
            world.clock.call_later(world.random.uniform(0, 40), self.die, boot)

    async def kill(self, machine_id: str) -> None:
        world = self._world
        boot = self.boots.get(machine_id)
        if boot is not None:
            if not boot.stopping and world.fault("stuck-stopping"):
                boot.stopping = True
                await world.stuck()
            boot.end()
            if self.boots.get(machine_id) is boot:
                del self.boots[machine_id]

    async def pause(self, machine_id: str) -> None:
        """Nothing reaches a machine that is not started, so there is nothing to do."""

    async def resume(self, machine_id: str) -> None:
        """Nothing was done, except that what was kept of it may be lost."""
        if self._world.fault("cold-resume"):
            raise OSError("no snapshot")

    def die(self, boot: Boot) -> None:
        """Let a machine's main process end by itself."""
        if not boot.over:
            self._world.note("exit", boot.machine.name, boot.number)
            boot.end()
            boot.exited()

    # Calls.

    def called(self, node: Node, method: str) -> None:
        """Count a call, whether it is to be done or not."""
        self.calls += 1
        if method in ("wait", "get", "list"):
            return
        recent = self._calls.setdefault(node, deque())
        recent.append(self._world.clock.now)
        while recent[0] < self._world.clock.now - 60:
            recent.popleft()
        if len(recent) > CALLS_A_MINUTE * (node.size + 1):
            self.broken(f"13: {node} calls {len(recent)} times a minute")

    def told(self, node: Node, machines: list[Machine]) -> None:
        """Note what a cleaning tells a node of tampered machines."""
        for machine in machines:
            record = self.records.get(machine.id)
            if record is not None and machine.metadata != record.machine.metadata:
                record.seen_tampered_by.add(node)

    def changed(self, node: Node, method: str, machine: Machine, lease: Lease | None, *, used: bool) -> None:
        """Check a call that changed a machine, which was as is told here before."""
        record = self.records.get(machine.id)
        if record is None or not pool_of(machine.name):
            self.broken(f"6: {node} does {method} to {machine.name}, which is no pool's")
            return
        if pool_of(machine.name) != node.pool_name and lease is not None:
            self.broken(f"6: {node} does {method} to {machine.name}, whose lease is alive")
        if pool_of(machine.name) != node.pool_name and record.released_at is not None:
            ago = self._world.clock.now - record.released_at
            if ago < HANDED_OVER:
                self.broken(f"6: {node} does {method} to {machine.name}, released {ago:.1f} s ago")
        if method == "release_lease" and lease is not None:
            record.released_at = self._world.clock.now
        if method != "destroy" and pool_of(machine.name) != node.pool_name:
            self.broken(f"6: {node} does {method} to {machine.name}, which is another's")
        if used and method in ("destroy", "stop", "release_lease") and not record.tampered:
            self.broken(f"9: {node} does {method} to {machine.name}, which it has in use")

    def created(self, node: Node, machine: Machine) -> None:
        """Check that there is room for a machine that was just made."""
        record = self.records[machine.id] = Record(machine, node, leased_by=node)
        record.nobody_knew = not node.alive  # who is about to end does not wait for what is done late
        if not node.alive or node.overlaps:
            return
        live = [
            other
            for other in self._world.machines.now()
            if pool_of(other.name) == node.pool_name and not self.records[other.id].nobody_knew
        ]
        if len(live) > node.size:
            self.broken(f"5: {node} has {len(live)} machines, its size is {node.size}")

    def died(self, node: Node) -> None:
        """Note what nobody can know of a node that has died: what it made that lists do not show yet."""
        for record in self.records.values():
            age = self._world.clock.now - record.machine.created_at + self._world.EPOCH
            if record.creator is node and age < self._world.LIST_LAG:
                record.nobody_knew = True

    # Requests.

    def asked_to_run(self, node: Node, boot: Boot) -> None:
        """Check a request that a coordinator sends to a worker."""
        world, machine = self._world, boot.machine
        record = self.records[machine.id]
        boot.asked += 1
        overlaps = node.overlaps
        if boot.asked > 1 and not overlaps:
            self.broken(f"1: {machine.name} is asked twice in boot {boot.number}")
        if pool_of(machine.name) != node.pool_name:
            self.broken(f"3: {node} uses {machine.name}")
        if machine.image != node.image:
            self.broken(f"12: {node} uses {machine.name} of image {machine.image}")
        if node in record.seen_tampered_by:
            self.broken(f"7: {node} uses {machine.name} though it knows that it was tampered with")
        lease = world.machines.lease_of(machine.id)
        left = lease.expires_at - world.wall() if lease else 0.0
        covered = record.leased_by is node and left >= node.settings.max_req_time
        if not covered and not overlaps and world.machines.find(machine.id) is not None:
            self.broken(f"8: {node} uses {machine.name}, leased by {record.leased_by} for {left:.1f} s more")

    def executes(self, boot: Boot, request: str) -> None:
        """Check a script that begins to run."""
        boot.executed += 1
        self.executions[request] += 1
        if boot.executed > 1:
            self.broken(f"1: {boot.machine.name} runs twice in boot {boot.number}")
        if self.executions[request] > 1:
            self.broken(f"2: {request} is run twice")

    def broken(self, promise: str) -> None:
        """Fail: raised here, it may end up as anybody's failure, so it is kept as well."""
        self._world.note("BROKEN", promise)
        self._world.broken.append(promise)


class SimMachines(EmulatedMachines):
    """The API's rules, with what a world needs to see of them."""

    world: World

    def now(self) -> list[Machine]:
        """Tell the machines that there are."""
        return [entry.machine for entry in self._entries.values() if not _is_gone(entry)]

    def find(self, machine_id: str) -> Machine | None:
        """Tell one that there is."""
        entry = self._entries.get(machine_id)
        return None if entry is None or _is_gone(entry) else entry.machine

    def lease_of(self, machine_id: str) -> Lease | None:
        """Tell the lease in force, if any."""
        entry = self._entries.get(machine_id)
        return None if entry is None else self._current_lease(entry)

    def lend(self, machine_id: str, seconds: float) -> None:
        """Lease a machine to an operator, who looks into what was left."""
        self._entries[machine_id].lease = Lease(self._hex(12), self._wall() + seconds)

    def vanish(self, machine_id: str) -> None:
        """Destroy a machine, as a host that burns down does."""
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
