"""A coordinator in a simulated world: the real pool, app and worker client, on a clock of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from bfaas.coordinator.app import Coordinator
from bfaas.coordinator.run_tracker import RunTracker
from bfaas.coordinator.worker_client import WorkerClient
from bfaas.machines.fly import FlyMachines
from bfaas.pool import Pool
from bfaas.pooling.config import RECONCILE_INTERVAL, pool_config
from bfaas.settings import ApiSettings, CoordSettings, FlySettings
from bfaas.tokens import Signer, genkey
from tests.simulation.api_over_http import RoutesAgent
from tests.simulation.clock import NodeClock
from tests.simulation.fairness import FairnessChecker
from tests.simulation.network import Network
from tests.simulation.worker import WorkerAgent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.pooling.scheduler import Inspected
    from tests.simulation.client import Client
    from tests.simulation.world import World

_SIGNER = Signer(genkey().private)  # one key pair for all: generating more is slow


class _RecordedPool(Pool):
    """A pool whose oracle records what its reconciler found."""

    record: Callable[[list[Machine]], None]

    def reconcile(self, machines: Sequence[Inspected]) -> None:
        self.record([details for _, details in machines if details is not None])
        super().reconcile(machines)


class Node:
    """A coordinator from its start to its shutdown or crash."""

    def __init__(self, world: World, pool_name: str, number: int, *, size: int, image: str) -> None:
        random = world.random
        self._world = world
        self._name = f"{pool_name}#{number}"
        self.pool_name = pool_name
        self.size = size
        self.image = image
        rate = random.uniform(0.96, 1.04) if world.has("drift") else 1.0
        self._skew = random.uniform(-4, 4) if world.has("skew") else 0.0
        self.clock = NodeClock(world.clock, rate, origin=random.uniform(0, 1e6))
        self.settings = CoordSettings(
            max_req_time=world.max_req_time,
            fly=FlySettings(ApiSettings("workers", "http://api", "t"), image, "http://workers"),
            replay=False,
            signer=_SIGNER,
            machine_id=pool_name,
            region="ams",
            pool_size=size,
            standby=world.random.randint(0, size) if world.has("standby") else 0,
            standby_suspended=world.has("suspended-standby"),
            worker_cpus=1,
            worker_memory_mb=256,
            max_wait=world.max_wait,
            max_queue=world.max_queue,
            max_per_client=world.max_per_client,
            max_body=1 << 20,
            max_output=4096,
        )
        self.requests: dict[Client, None] = {}
        self.fairness = FairnessChecker(world, self)
        self.connections: list[Callable[[], None]] = []
        self.overlaps = False
        self.closing = False
        self.closed: Deferred[None] | None = None
        worker_client = WorkerClient(
            self.clock, "http://workers", self.settings.max_output, WorkerAgent(world, self)
        )
        network = Network(world, self)
        api: MachinesAPI = network
        if world.has("over-http"):
            agent = RoutesAgent(world, self, network)
            api = FlyMachines(self.clock, agent, Random(random.getrandbits(64)), "http://api", "workers", "t")
        self.pool = _RecordedPool(
            api,
            worker_client,
            self.clock,
            Random(random.getrandbits(64)),
            replace(
                pool_config(self.settings),
                reconcile_interval=40.0 if world.has("reconciles-often") else RECONCILE_INTERVAL,
            ),
        )
        if world.has("large"):
            self.pool._reconciler._MAX_PER_PASS = 2
        self.pool.record = partial(world.oracle.on_inspected, self)
        self.coordinator = Coordinator(
            self.clock,
            self.settings,
            self.pool,
            worker_client,
            self._wall_clock,
            RunTracker(self.clock, self._wall_clock, Random(0)),
            sandbox="none",
        )

    def __str__(self) -> str:
        return self._name

    def _wall_clock(self) -> float:
        return self._world.wall() + self._skew

    @property
    def alive(self) -> bool:
        """Whether it runs and accepts requests."""
        return not self.clock.dead and not self.closing

    @property
    def is_gone(self) -> bool:
        """Whether it has crashed or shut down."""
        return self.clock.dead or (self.closed is not None and bool(self.closed.called))

    def start(self) -> None:
        """Start the pool."""
        self.pool.start()

    def submit(self, client: Client) -> None:
        """Send a request to this coordinator."""
        in_progress = sum(other.address == client.address for other in self.requests)
        self.requests[client] = None
        self.fairness.on_queued(client)
        client.send()
        self.fairness.on_accepted(client, in_progress)
        self._check_positions()

    def _check_positions(self) -> None:
        """Check that each request in the queue has a place of its own."""
        positions = [
            self.pool.queue_position(run.client.key, entry)
            for run in self.coordinator._runs._active
            if (entry := run.queue_entry) is not None
        ]
        if sorted(positions) != list(range(1, self.pool.waiting + 1)):
            self._world.oracle.report(f"19: {self} has requests at the places {positions} of its queue")

    def on_served(self, request: str) -> None:
        """Record that a request has got a machine, even if the machine has stopped since."""
        for client in self.requests:
            if client.script.request == request:
                self.fairness.on_served(client)

    def on_dispatched(self, request: str, machine_id: str) -> Client | None:
        """Record that a request is sent to a machine; return its client."""
        for client in self.requests:
            if client.script.request == request:
                client.machine_id = machine_id
                return client
        return None

    def client_on(self, machine_id: object) -> Client | None:
        """Return the client of this coordinator's request on a machine, if any."""
        if self.clock.dead:
            return None
        return next((client for client in self.requests if client.machine_id == machine_id), None)

    def on_request_ended(self, client: Client) -> None:
        """Remove a request that has ended."""
        self.requests.pop(client, None)
        self.fairness.on_left_queue(client)

    def crash(self) -> None:
        """Crash, as by SIGKILL: all connections break."""
        self._world.log("crash", self)
        self.clock.dead = True
        self._world.oracle.on_node_gone(self)
        for client in list(self.requests):
            client.lose_coordinator()
        connections, self.connections = self.connections, []
        for close in connections:
            close()

    def close(self, *, destroy: bool = False) -> None:
        """Start an orderly shutdown, as the service does."""
        self._world.log("close", self)
        self.closing = True
        self.closed = Deferred.fromCoroutine(self._close(destroy=destroy))
        self.closed.addErrback(self._failed)
        self._world.clock.call_later(1.0, self._check_queue_rejected, self.clock.pauses)

    def _check_queue_rejected(self, pauses: int) -> None:
        """Check that all queued requests have been rejected."""
        waiting = [client.script.request for client in self.requests if client.machine_id is None]
        if waiting and not self.clock.dead and pauses == self.clock.pauses:
            self._world.oracle.report(f"14: {self} is closing, and {waiting[0]} still waits")

    async def _close(self, *, destroy: bool) -> None:
        closing = Deferred.fromCoroutine(self.pool.destroy() if destroy else self.pool.close())
        await self.coordinator.drain()
        await closing
        self._world.oracle.on_node_gone(self)

    def _failed(self, failure: Any) -> None:
        self._world.oracle.report(f"14: {self} fails to close: {failure.getTraceback()}")
