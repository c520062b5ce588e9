"""A coordinator in a simulated world: the real pool, coordinator and proxy, on a clock of its own."""

from __future__ import annotations

from dataclasses import replace
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
from tests.simulation.clock import NodeClock
from tests.simulation.fairness import Fairness
from tests.simulation.http import ApiAgent
from tests.simulation.network import Network
from tests.simulation.worker import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.machines.api import MachinesAPI
    from bfaas.pooling.reconciler import Inspected
    from tests.simulation.client import Client
    from tests.simulation.world import World

_SIGNER = Signer(genkey().private)  # one pair for all: what a ticket says is what counts here


class Node:
    """A coordinator from its start to its end or its crash."""

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
            standby_suspended=world.has("suspended"),
            worker_cpus=1,
            worker_memory_mb=256,
            max_wait=world.max_wait,
            max_queue=world.max_queue,
            max_per_client=world.max_per_client,
            max_body=1 << 20,
            max_output=4096,
        )
        self.requests: dict[Client, None] = {}
        self.fairness = Fairness(world, self)
        self.connections: list[Callable[[], None]] = []
        self.overlaps = False
        self.closing = False
        self.closed: Deferred[None] | None = None
        proxy = WorkerClient(self.clock, "http://workers", self.settings.max_output, Workers(world, self))
        network = Network(world, self)
        api: MachinesAPI = network
        if world.has("over-http"):
            agent = ApiAgent(world, self, network)
            api = FlyMachines(self.clock, agent, Random(random.getrandbits(64)), "http://api", "workers", "t")
        self.pool = Pool(
            api,
            proxy.wait_until_ready,
            self.clock,
            Random(random.getrandbits(64)),
            replace(
                pool_config(self.settings),
                reconcile_interval=40.0 if world.has("cleans-often") else RECONCILE_INTERVAL,
            ),
        )
        if world.has("large"):
            self.pool._reconciler._MAX_PER_SWEEP = 2
        on_own_machines = self.pool._reconciler._on_own_machines

        def told(machines: list[Inspected]) -> None:
            world.ledger.told(self, [seen for _, seen in machines if seen is not None])
            on_own_machines(machines)

        self.pool._reconciler._on_own_machines = told
        self.coordinator = Coordinator(
            self.clock,
            self.settings,
            self.pool,
            proxy,
            self._wall,
            RunTracker(self.clock, self._wall, Random(0)),
        )

    def __str__(self) -> str:
        return self._name

    def _wall(self) -> float:
        return self._world.wall() + self._skew

    @property
    def alive(self) -> bool:
        """It runs, and takes requests."""
        return not self.clock.dead and not self.closing

    @property
    def is_gone(self) -> bool:
        """It has crashed, or ended in order."""
        return self.clock.dead or (self.closed is not None and bool(self.closed.called))

    def start(self) -> None:
        """Begin."""
        self.pool.start()

    def take(self, client: Client) -> None:
        """Take a request."""
        under_way = sum(other.address == client.address for other in self.requests)
        self.requests[client] = None
        self.fairness.joins(client)
        client.send()
        self.fairness.is_taken(client, under_way)

    def serves(self, request: str) -> None:
        """Note that a request has a machine, whatever has become of that."""
        for client in self.requests:
            if client.script.request == request:
                self.fairness.is_served(client)

    def begins(self, request: str, machine_id: str) -> Client | None:
        """Note that a request is sent to a machine."""
        for client in self.requests:
            if client.script.request == request:
                client.machine_id = machine_id
                return client
        return None

    def user_of(self, machine_id: object) -> Client | None:
        """Tell the request of its own that is on a machine."""
        on_it = [client for client in self.requests if client.machine_id == machine_id]
        return on_it[0] if on_it and not self.clock.dead else None

    def forget(self, client: Client) -> None:
        """Let a request go that has ended."""
        self.requests.pop(client, None)
        self.fairness.leaves(client)

    def crash(self) -> None:
        """Die, as by SIGKILL: nothing is said any more, and all connections break."""
        self._world.note("crash", str(self))
        self.clock.dead = True
        self._world.ledger.died(self)
        for client in list(self.requests):
            client.cut()
        connections, self.connections = self.connections, []
        for close in connections:
            close()

    def close(self, *, destroy: bool = False) -> None:
        """Begin to end in order, as the service does."""
        self._world.note("close", str(self))
        self.closing = True
        self.closed = Deferred.fromCoroutine(self._close(destroy=destroy))
        self.closed.addErrback(self._failed)
        self._world.clock.call_later(1.0, self._check_told, self.clock.pauses)

    def _check_told(self, pauses: int) -> None:
        """Whoever was in line has been told by now that nothing will come of it."""
        waiting = [client.script.request for client in self.requests if client.machine_id is None]
        if waiting and not self.clock.dead and pauses == self.clock.pauses:
            self._world.ledger.broken(f"14: {self} is closing, and {waiting[0]} still waits")

    async def _close(self, *, destroy: bool) -> None:
        closing = Deferred.fromCoroutine(self.pool.destroy() if destroy else self.pool.close())
        await self.coordinator.drain()
        await closing
        self._world.ledger.died(self)

    def _failed(self, failure: Any) -> None:
        self._world.ledger.broken(f"14: {self} fails to close: {failure.getTraceback()}")
