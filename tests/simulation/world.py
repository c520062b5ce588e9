"""
A simulated world (coordinators, the machines of one app, workers and clients) and one episode in it.

An episode has phases: first chaos, in which a random choice of faults occurs; then healing, after which there
are no more faults; then everything must work, and nothing may be left over. All randomness comes from the
seed, so that an episode can be replayed.
"""

from __future__ import annotations

import gc
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogLevel, formatEvent, globalLogPublisher
from zope.interface import provider

from bfaas.machines.api import State
from bfaas.machines.emulator.state import Timing
from bfaas.pooling.config import RECONCILE_INTERVAL, pool_of
from bfaas.pooling.slot import Phase
from tests.simulation.client import Client, Sender
from tests.simulation.clock import HeapClock, NodeClock
from tests.simulation.nodes import Node
from tests.simulation.oracle import InvariantError, Oracle, SimulatedMachines
from tests.simulation.worker import Script

if TYPE_CHECKING:
    from twisted.logger import LogEvent

    from bfaas.machines.api import Machine
    from tests.simulation.oracle import Boot

CALL_FAULTS = {
    "500": 0.2,
    "garbage": 0.1,
    "reset": 0.1,
    "429": 0.2,
    "lost-response": 0.2,
    "late-execution": 0.5,
    "hangs": 0.1,
    "hangs-after-execution": 0.1,
    "late-call": 0.1,
    "late-response": 0.1,
    "no-capacity": 0.5,
    "stale-list": 0.5,
    "hidden-when-new": 0.3,
    "conflict-without-id": 0.5,
    "crash-at-response": 0.02,
    "pause-at-response": 0.02,
    "lease-taken": 1.0,
}
"""Faults of API calls, with their maximal probability for each call."""

HTTP_FAULTS = {"http-reset": 0.1, "http-html": 0.1, "http-truncated": 0.1, "http-wrong-json": 0.1}
"""Faults of HTTP responses of the API, with their maximal probability."""

MACHINE_FAULTS = {
    "boot-fails": 0.1,
    "stuck-created": 0.1,
    "stuck-starting": 0.1,
    "stuck-stopping": 0.1,
    "never-listens": 0.1,
    "listens-late": 0.2,
    "machine-exits": 0.3,
    "probe-hangs": 0.2,
    "probe-fails": 0.2,
    "exits-at-boot": 0.1,
    "migrates": 0.3,
    "cold-resume": 1.0,
}
"""Faults of machines and their workers, with their maximal probability at each opportunity."""

EVENTS = {
    "crash": 300.0,
    "restart": 400.0,
    "pause": 400.0,
    "outage": 400.0,
    "unauthorized": 500.0,
    "vanish": 300.0,
    "deploy": 600.0,
}
"""Faults that occur at random moments, with the mean number of seconds between two."""

TRAITS = {
    "drift": 0.2,
    "skew": 0.2,
    "overlap": 0.2,
    "rate-limits": 0.1,
    "resized": 0.3,
    "new-image": 0.3,
    "standby": 0.5,
    "suspended-standby": 0.3,
    "reconciles-often": 0.4,
    "over-http": 0.1,
    "long-pauses": 0.1,
    "large": 0.1,
}
"""Properties of a whole world, with their probability."""

SCRIPT_FAULTS = (
    "no-response",
    "status-500",
    "status-303",
    "status-401",
    "wrong-worker-header",
    "endless",
    "aborts-connection",
    "no-exit",
    "kills-machine",
    "malformed-events",
    "two-exits",
    "floods",
    "tampers",
)
"""Behaviors of scripts and workers other than `well-behaved`."""

FAULTS = (*CALL_FAULTS, *HTTP_FAULTS, *MACHINE_FAULTS, *EVENTS, *TRAITS, *SCRIPT_FAULTS)
"""All faults by name. `World.fault_counts` counts each where it occurs."""

RECOVERY_TIME = 1.2 * RECONCILE_INTERVAL + 45.0
"""Seconds after the last fault within which a pool serves as many requests at once as it has slots."""

READY_TIME = 200.0
"""Seconds after the last fault within which coordinators report that they are ready."""

CLEANUP_TIME = 300.0 + 1.2 * RECONCILE_INTERVAL + 60.0
"""Seconds after the last fault within which orphaned machines are destroyed."""

SHUTDOWN_TIME = 250.0
"""Seconds that the shutdown of a coordinator may take, whatever the faults."""


class World:
    """One app, its coordinators and clients on one clock, and the faults that occur."""

    EPOCH = 1_700_000_000.0
    LIST_LAG = 5.0

    def __init__(self, seed: int, fault_counts: Counter[str] | None = None, *, trace: bool = False) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.fault_counts: Counter[str] = Counter() if fault_counts is None else fault_counts
        self.outcomes: Counter[str] = Counter()
        self.trace: list[str] | None = [] if trace else None
        self.violations: list[str] = []
        self.clock = HeapClock()
        self.chaos = True
        self.outage = False
        self.unauthorized = False
        self.exits_at_boot = 0
        """Number of the next boots whose worker exits before it responds."""
        self._blocked: list[Deferred[None]] = []
        self._choose_faults()
        self.sizes = [4, 5] if self.has("large") else [1, 2, 3]
        self.max_req_time = random.choice([2.0, 5.0, 20.0])
        self.max_queue = random.choice([3, 100, 100])
        # A generator of its own: the choice of senders does not change the rest of an episode.
        self._sender_random = Random(f"senders {seed}")
        self.max_per_client = self._sender_random.choice([3, 20, 20])
        self.worker_deadline = random.random() < 0.7
        self.reusable_workers = random.random() < 0.3  # workers accept any number of runs
        self.duration = random.uniform(200.0, 1000.0)
        timing = Timing(
            boot=random.choice([0.1, 1.0, 3.0]),
            stop=random.choice([0.0, 0.5]),
            stop_cooldown=random.choice([0.0, 1.0]),
            tombstone_ttl=random.choice([0.0, 60.0]),
        )
        is_fast = timing.boot < 2.0 and not self.has("rate-limits")
        self.max_wait = random.choice([5.0, 30.0]) if is_fast else 30.0
        self.oracle = Oracle(self)
        self.machines = SimulatedMachines(
            NodeClock(self.clock),
            self.wall,
            self.oracle,
            timing,
            Random(seed),
            rate_limited=self.has("rate-limits"),
        )
        self.machines.world = self
        self.nodes: list[Node] = []
        self._node_count = 0
        self._request_count = 0
        self._lists: list[tuple[float, list[Machine]]] = []

    def __str__(self) -> str:
        faults = (*self.rates, *self.events, *sorted(self.traits), *self.script_faults)
        return f"seed {self.seed}: {' '.join(faults)}"

    def _choose_faults(self) -> None:
        """Choose some of the faults, so that each occurs without the others in some worlds."""
        random = self.random
        probability = random.choice([0.0, 0.1, 0.3, 0.6, 0.9])
        self.rates = {
            name: random.random() ** 2 * maximum
            for name, maximum in {**CALL_FAULTS, **MACHINE_FAULTS}.items()
            if random.random() < probability
        }
        self.traits = {name for name, chance in TRAITS.items() if random.random() < chance}
        if "over-http" in self.traits:
            self.rates |= {
                name: random.random() * maximum
                for name, maximum in HTTP_FAULTS.items()
                if random.random() < 0.5
            }
        if "long-pauses" in self.traits:
            self.rates["pause-at-response"] = CALL_FAULTS["pause-at-response"] / 2
        self._call_rates = {name: self.rates[name] for name in CALL_FAULTS if name in self.rates}
        self.events = {name: interval for name, interval in EVENTS.items() if random.random() < probability}
        self.script_faults = [name for name in SCRIPT_FAULTS if random.random() < probability]

    # For the parts of the world.

    def wall(self) -> float:
        """Return the true time, in seconds since the epoch."""
        return self.EPOCH + self.clock.now

    def has(self, trait: str) -> bool:
        """Return whether this world has a trait."""
        if trait in self.traits:
            self.fault_counts[trait] += 1
        return trait in self.traits

    def fault(self, name: str) -> bool:
        """Return whether a fault occurs here and now, and count it."""
        rate = self.rates.get(name)
        if rate is None or not self.chaos or self.random.random() >= rate:
            return False
        self.fault_counts[name] += 1
        return True

    def call_faults(self) -> frozenset[str]:
        """Choose the faults of an API call."""
        if not self.chaos:
            return frozenset()
        return frozenset([name for name, rate in self._call_rates.items() if self.random.random() < rate])

    def latency(self) -> float:
        """Choose a network latency, in seconds."""
        return self.random.uniform(0.002, 0.05)

    def block_until_healed(self) -> Deferred[None]:
        """Wait until the chaos ends."""
        blocked: Deferred[None] = Deferred()
        self._blocked.append(blocked)
        return blocked

    def stale_list(self) -> list[Machine]:
        """Return the list of machines at a moment in the last `LIST_LAG` seconds."""
        moment = self.clock.now - self.random.uniform(0, self.LIST_LAG)
        lists = [machines for recorded_at, machines in self._lists if recorded_at <= moment]
        return lists[-1] if lists else []

    def may_lose_workers(self, client: Client) -> bool:
        """Return whether a worker can disappear during this client's run."""
        faults = {"machine-exits", "vanish", "overlap", "pause", "pause-at-response"}
        if "over-http" in self.traits:
            faults |= {"late-execution", "late-call"}  # a stop that was retried may be executed twice
        if client.script.behavior not in ("well-behaved", "floods") or client.node.overlaps:
            return True
        return not faults.isdisjoint({*self.rates, *self.events, *self.traits})

    def log(self, *words: object) -> None:
        """Add a line to the history, if one is kept."""
        if self.trace is not None:
            self.trace.append(f"{self.clock.now:9.3f}  {' '.join(map(str, words))}")

    # An episode.

    def run_episode(self) -> None:
        """Run all phases. Raises `InvariantError`."""
        if self.seed % 64 == 0:
            gc.collect()  # the garbage of earlier worlds
            gc.freeze()
        observer = self._log_observer()
        globalLogPublisher.addObserver(observer)
        try:
            self._start()
            self._advance(self.duration)
            self._heal()
            self._advance(READY_TIME)
            self._check_ready()
            self._advance(RECOVERY_TIME - READY_TIME)
            self._check_standby()
            self._check_refill()
            self._check_service()
            self._check_migration()
            self._check_exits_at_boot()
            self._check_succession()
            self._advance(max(0.0, self._healed_at + CLEANUP_TIME - self.clock.now))
            self._check_no_orphans()
            self._check_shutdown()
            if self.seed % 64 == 0:
                gc.collect()  # logs unhandled errors in Deferreds
        finally:
            globalLogPublisher.removeObserver(observer)
        if self.violations:
            raise InvariantError(self.violations[0])

    def _advance(self, seconds: float) -> None:
        """Advance the time, in steps that are short enough to stop soon after a violation."""
        end = self.clock.now + seconds
        while self.clock.now < end and not self.violations:
            self.clock.run_until(min(end, self.clock.now + 20.0))
        if self.violations:
            raise InvariantError(self.violations[0])

    def _start(self) -> None:
        if "stale-list" in self.rates:
            self._record_list()
        for number in range(self.random.choice([1, 1, 2, 3])):
            name = ("p", "p-1", "q")[number]
            self._start_node(name, self.random.choice(self.sizes))
        for node in self.nodes:
            self._schedule(self.random.uniform(0, 5), self._send_requests, node.pool_name)
        for event, interval in self.events.items():
            self._schedule(self.random.expovariate(1 / interval), self._inject, event)

    def _schedule(self, seconds: float, call: Any, *arguments: Any) -> None:
        """Call something later, unless the chaos has ended by then."""

        def call_in_chaos() -> None:
            if self.chaos:
                call(*arguments)

        self.clock.call_later(seconds, call_in_chaos)

    def _record_list(self) -> None:
        self._lists = [*self._lists[-10:], (self.clock.now, self.machines.current())]
        self._schedule(0.5, self._record_list)

    def _start_node(self, pool_name: str, size: int, image: str = "i1") -> Node:
        self._node_count += 1
        node = Node(self, pool_name, self._node_count, size=size, image=image)
        others = [other for other in self.nodes if other.pool_name == pool_name and not other.is_gone]
        for other in [*others, node] if others else []:
            other.overlaps = True
        self.nodes.append(node)
        self.log("start", node, "size", size)
        node.start()
        return node

    def latest(self, pool_name: str) -> Node:
        """Return the most recent coordinator of a pool."""
        return [node for node in self.nodes if node.pool_name == pool_name][-1]

    # Requests.

    def _send_requests(self, pool_name: str) -> None:
        """Send requests at random intervals, sometimes many at once."""
        random = self.random
        sender_random = self._sender_random
        only_sender = sender_random.choice([None, None, *Sender])
        for _ in range(random.choice([1, 1, 1, 2, 8])):
            sender = only_sender or sender_random.choice(list(Sender))
            self._schedule(random.expovariate(2.0), self._send_random_request, pool_name, sender)
        mean_interval = random.choice([5.0, 60.0, 300.0])
        self._schedule(random.expovariate(1 / mean_interval), self._send_requests, pool_name)

    def _send_random_request(self, pool_name: str, sender: Sender) -> None:
        node, random = self.latest(pool_name), self.random
        if not node.alive:
            return
        if node.clock.paused:
            node.clock.when_resumed(lambda: self._send_random_request(pool_name, sender))
            return
        misbehaves = bool(self.script_faults) and random.random() < 0.4
        behavior = random.choice(self.script_faults) if misbehaves else "well-behaved"
        lines = random.choice([1, 5] if misbehaves else [0, 1, 5, 12])
        duration = random.choice([0.1, 0.5, 1.0, 1.5]) * self.max_req_time
        client = self._send(node, lines, duration / (lines + 1), random.randrange(256), behavior, sender)
        if random.random() < 0.15:
            self._schedule(random.expovariate(1 / self.max_req_time), client.disconnect)
        if random.random() < 0.1:
            self._schedule(random.uniform(0, 5), client.pause)
            self._schedule(random.uniform(5, 60), client.resume)

    def _send(
        self,
        node: Node,
        lines: int,
        pause: float,
        code: int,
        behavior: str = "well-behaved",
        sender: Sender = Sender.HOST,
    ) -> Client:
        self._request_count += 1
        script = Script(f"r{self._request_count}", lines, pause, code, behavior)
        self.fault_counts[behavior] += 1
        self.log("request", script.request, "to", node, behavior, sender.name)
        reason = node.pool.not_ready_reason
        if reason is not None and node.pool.count(Phase.READY):
            self.oracle.report(f"23: {node} has a machine ready, but reports: {reason}")
        client = Client(self, node, script, sender, raw=self.random.random() < 0.2)
        node.submit(client)
        return client

    # Events.

    def _inject(self, event: str) -> None:
        self._schedule(self.random.expovariate(1 / EVENTS[event]), self._inject, event)
        self.fault_counts[event] += 1
        random = self.random
        if event in ("outage", "unauthorized"):
            self.outage = self.outage or event == "outage"
            self.unauthorized = self.unauthorized or event == "unauthorized"
            self._schedule(random.uniform(5, 120), self._end_outage)
        elif event == "vanish":
            if machines := self.machines.current():
                self.machines.vanish(random.choice(machines).id)
        elif alive := [node for node in self.nodes if node.alive]:
            for node in alive if event == "deploy" else [random.choice(alive)]:
                if event == "pause":
                    self.pause(node)
                else:
                    self.replace(node, crash=event == "crash")

    def _end_outage(self) -> None:
        self.outage = self.unauthorized = False

    def pause(self, node: Node) -> None:
        """Pause a coordinator for a while, as by SIGSTOP. A long pause outlasts leases."""
        if not node.clock.paused:
            self.log("pause", node)
            node.clock.pause()
            maximum = 600.0 if self.has("long-pauses") else self.random.choice([1.0, 20.0, 150.0, 500.0])
            self._schedule(maximum * self.random.random(), node.clock.resume)

    def replace(self, node: Node, *, crash: bool) -> None:
        """End a coordinator; usually start another of its pool, possibly with another size or image."""
        random = self.random
        size = random.choice(self.sizes) if self.has("resized") else node.size
        image = random.choice(["i1", "i2"]) if self.has("new-image") else node.image
        if self.has("overlap") and random.random() < 0.5:
            self._start_node(node.pool_name, size, image)
        elif crash and random.random() < 0.7:
            delay = random.choice([0.0, 5.0, 100.0, 500.0])
            self._schedule(delay, self._start_successor, node.pool_name, size, image)
        if crash:
            node.crash()
            return
        if random.random() < 0.3 and not node.clock.paused:
            self._send(node, 1, 0.0, 0)  # just before the shutdown
        node.close(destroy=random.random() < 0.3)
        assert node.closed is not None
        self.clock.call_later(SHUTDOWN_TIME, self._check_closed, node)
        node.closed.addCallback(
            lambda _: self._schedule(
                random.uniform(0, 20), self._start_successor, node.pool_name, size, image
            )
        )

    def _start_successor(self, pool_name: str, size: int, image: str) -> None:
        if not self.latest(pool_name).alive:
            self._start_node(pool_name, size, image)

    def _check_closed(self, node: Node) -> None:
        if not node.clock.pauses and not node.is_gone:
            self.oracle.report(f"14: {node} is not closed after {SHUTDOWN_TIME:g} s")

    # After the chaos.

    def _heal(self) -> None:
        self.log("healed")
        self.chaos = False
        self._healed_at = self.clock.now
        self._end_outage()
        blocked, self._blocked = self._blocked, []
        for deferred in blocked:
            deferred.callback(None)
        for node in self.nodes:
            node.clock.resume()
        if not any(node.alive for node in self.nodes):
            self._start_node("p", 2)

    def _settled_nodes(self) -> list[Node]:
        """Return the coordinators for which all guarantees hold: without another of the same name."""
        return [node for node in self.nodes if node.alive and not node.overlaps]

    def _check_service(self) -> None:
        """Check that every slot of every pool serves."""
        clients = [client for node in self._settled_nodes() for client in self._send_to_all_slots(node)]
        self._advance(self.max_wait + self.max_req_time + 1)
        for client in clients:
            if client.outcome != "exit 0 None":
                self.oracle.report(f"11: {client.script.request} after the faults: {client.outcome}")

    def _check_migration(self) -> None:
        """Check that requests are served by machines that are migrated to another host as they start."""
        for machine in self.machines.current():
            if machine.state is State.STOPPED:
                self.machines.migrate_at_start(machine.id)
        self._check_service()

    def _check_exits_at_boot(self) -> None:
        """Send requests to machines whose workers exit at boot; `check_exit_noticed` checks the rest."""
        nodes = self._settled_nodes()
        self.exits_at_boot = len(nodes)
        for node in nodes:
            self._send(node, 1, 0.1, 0)
        self._advance(self.max_wait + self.max_req_time + 1)
        self.exits_at_boot = 0

    def check_exit_noticed(self, boot: Boot) -> None:
        """Check that no pool still waits for a worker that has exited, unless its machine was restarted."""
        if self.oracle.boots.get(boot.machine.id, boot) is not boot:
            return
        waiting = (Phase.CREATING, Phase.STARTING, Phase.RESUMING)
        for node in self._settled_nodes():
            for slot in node.pool._slots:
                known = slot.known_machine
                if slot.phase in waiting and known is not None and known.id == boot.machine.id:
                    self.oracle.report(f"24: {node} waits for {slot.name}, whose worker has exited")

    def _send_to_all_slots(self, node: Node) -> list[Client]:
        """Send as many requests as a pool has slots; warm standbys must serve without delay."""
        ready = node.pool.count(Phase.READY)
        clients = [
            self._send(node, 2, 0.1, 0)
            for _ in range(min(node.size, self.max_queue + 1, self.max_per_client))
        ]
        for client in clients[:ready]:
            if client.machine_id is None:
                self.oracle.report(f"22: {client.script.request} is queued with {ready} warm standbys")
        return clients

    def _check_ready(self) -> None:
        """Check that coordinators are ready, now or, if a machine is just being destroyed, in a second."""
        not_ready = [node for node in self._settled_nodes() if node.pool.not_ready_reason]
        self._advance(1.0 if not_ready else 0.0)
        for node in not_ready:
            if node.pool.not_ready_reason:
                self.oracle.report(f"23: {node}: {node.pool.not_ready_reason}")

    def _check_standby(self) -> None:
        """Check the number of warm standbys; no request may be queued, and all pools must be ready."""
        self._check_ready()
        for node in self._settled_nodes():
            if node.pool.waiting:
                self.oracle.report(f"11: {node.pool.waiting} requests are still queued at {node}")
            ready = node.pool.count(Phase.READY) + node.pool.count(Phase.SUSPENDED)
            if ready != node.settings.standby:
                self.oracle.report(f"22: {node} has {ready} machines ready, of {node.settings.standby}")

    def _check_refill(self) -> None:
        """Check that a warm standby that is in use is replaced by another."""
        nodes = [node for node in self._settled_nodes() if 0 < node.settings.standby < node.size]
        for node in nodes:
            self._send(node, 20, 0.1, 0)
        self._advance(1.0)
        phases = (Phase.READY, Phase.SUSPENDED, Phase.STARTING, Phase.CREATING)
        for node in nodes:
            count = sum(map(node.pool.count, phases))
            if count < node.settings.standby:
                self.oracle.report(f"22: {node} has or prepares {count} warm standbys")
        self._advance(self.max_req_time if nodes else 0.0)

    def _check_succession(self) -> None:
        """Check that each pool's next coordinator adopts the machines that fit its size and image."""
        predecessors = self._settled_nodes()
        for node in predecessors:
            node.close()
        self._advance(30.0)
        remaining = {node: self._machines_of(node) for node in predecessors}
        successors = {}
        for node in predecessors:
            size = self.random.choice(self.sizes) if self.has("resized") else node.size
            image = self.random.choice(["i1", "i2"]) if self.has("new-image") else node.image
            successors[node] = self._start_node(node.pool_name, size, image)
        self._check_service()
        for node, machines in remaining.items():
            successor = successors[node]
            current = self._machines_of(successor)
            adopted = {machine.id for machine in machines} & {machine.id for machine in current}
            fit = min(len(machines), successor.size) if successor.image == node.image else 0
            if len(current) > successor.size:
                self.oracle.report(
                    f"5: {successor} has {len(current)} machines, its size is {successor.size}"
                )
            if len(adopted) < fit and not node.overlaps:
                self.oracle.report(f"17: {successor} adopts {len(adopted)} of {len(machines)} machines")

    def _machines_of(self, node: Node) -> list[Machine]:
        return [machine for machine in self.machines.current() if pool_of(machine.name) == node.pool_name]

    def _check_no_orphans(self) -> None:
        """Check that every machine belongs to a running pool, and no pool has more than its size."""
        running = {node.pool_name: node for node in self.nodes if node.alive}
        for machine in self.machines.current():
            lease, record = self.machines.lease_of(machine.id), self.oracle.records[machine.id]
            if lease is None or pool_of(machine.name) not in running:
                self.oracle.report(f"11: {machine.name} still exists: {machine.state}, {lease}")
            if record.tampered and not running[pool_of(machine.name) or ""].overlaps:
                self.oracle.report(f"7: {machine.name} was tampered with, and still exists")
        for node in self._settled_nodes():
            if (count := len(self._machines_of(node))) > node.size:
                self.oracle.report(f"5: {node} has {count} machines, its size is {node.size}")

    def _check_shutdown(self) -> None:
        """Check that all coordinators shut down, and leave stopped machines or none, and nothing pending."""
        destroying = {node: self.random.random() < 0.5 for node in self.nodes if node.alive}
        for node, destroy in destroying.items():
            node.close(destroy=destroy)
        self._advance(60.0)
        for node, destroy in destroying.items():
            if not node.is_gone:
                self.oracle.report(f"14: {node} does not shut down")
            if node.clock.timers:
                self.oracle.report(f"14: {node} leaves {len(node.clock.timers)} timers")
            machines = self._machines_of(node)
            if destroy and machines and not node.overlaps:
                self.oracle.report(f"15: {node} leaves {machines[0].name}")
            for machine in machines:
                if machine.state is not State.STOPPED and not node.overlaps:
                    self.oracle.report(f"14: {node} leaves {machine.name} {machine.state}")
            if node.requests:
                self.oracle.report(f"4: {node} leaves requests without an outcome")

    # The log.

    def _log_observer(self) -> ILogObserver:
        @provider(ILogObserver)
        def observe(event: LogEvent) -> None:
            if event.get("log_level", LogLevel.info) <= LogLevel.debug:
                return
            text = formatEvent(event)
            self.log("log:", text)
            if "log_failure" in event:
                self.oracle.report(f"16: logged {event['log_failure'].getTraceback()}")
            words = set(text.replace("'", " ").replace('"', " ").split())
            if "SECRET" in text or not self.oracle.nonces.isdisjoint(words):
                self.oracle.report(f"16: a secret is logged: {text}")

        observer: ILogObserver = observe
        return observer
