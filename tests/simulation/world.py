"""
A simulated world: coordinators, the machines of one app, workers and clients; and an episode of its life.

An episode has phases: chaos, in which a choice of faults strikes; healing, after which nothing more goes
wrong; then everything must work, and nobody may have left anything behind. All chance comes from the
seed, so that an episode can be lived through again.
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
from tests.simulation.ledger import BrokenPromiseError, Ledger, SimMachines
from tests.simulation.nodes import Node
from tests.simulation.worker import Script

if TYPE_CHECKING:
    from twisted.logger import LogEvent

    from bfaas.machines.api import Machine
    from tests.simulation.ledger import Boot

CALL_FAULTS = {
    # name: how likely it may be, for each call
    "500": 0.2, "garbage": 0.1, "reset": 0.1, "429": 0.2, "lost-answer": 0.2, "zombie-call": 0.5,
    "hangs": 0.1, "hangs-after": 0.1, "late-call": 0.1, "late-answer": 0.1, "no-capacity": 0.5,
    "stale-list": 0.5, "hidden-when-new": 0.3, "nameless": 0.5, "crash-at-answer": 0.02,
    "pause-at-answer": 0.02, "lease-taken": 1.0,
}  # fmt: skip
HTTP_FAULTS = {"http-breaks": 0.1, "http-html": 0.1, "http-cut": 0.1, "http-nonsense": 0.1}
MACHINE_FAULTS = {
    "boot-fails": 0.1, "stuck-created": 0.1, "stuck-starting": 0.1, "stuck-stopping": 0.1,
    "never-listens": 0.1, "listens-late": 0.2, "body-dies": 0.3, "probe-hangs": 0.2, "probe-fails": 0.2,
    "exits-at-boot": 0.1, "migrates": 0.3, "cold-resume": 1.0,
}  # fmt: skip
EVENTS = {
    # name: how many seconds apart, about
    "crash": 300.0, "restart": 400.0, "pause": 400.0, "outage": 400.0, "denied": 500.0, "vanish": 300.0,
    "deploy": 600.0,
}  # fmt: skip
TRAITS = {
    # name: how likely it is, for each world
    "drift": 0.2, "skew": 0.2, "overlap": 0.2, "rate-limits": 0.1, "resized": 0.3, "new-image": 0.3,
    "standby": 0.5, "suspended": 0.3, "cleans-often": 0.4,
    "over-http": 0.1, "long-pauses": 0.1, "large": 0.1,
}  # fmt: skip
HOW = (
    "mute", "status-500", "status-303", "status-401", "lies-about-itself", "endless", "cuts", "stops-short",
    "dies", "babbles", "two-exits", "floods", "tampers",
)  # fmt: skip
FAULTS = (*CALL_FAULTS, *HTTP_FAULTS, *MACHINE_FAULTS, *EVENTS, *TRAITS, *HOW)
"""All that can go wrong, by name: each leaves a mark where it strikes."""

SERVED_AGAIN = 1.2 * RECONCILE_INTERVAL + 45.0
"""Seconds after the last fault within which a pool serves as many requests at once as its size."""

READY_AGAIN = 200.0
"""Seconds after the last fault within which coordinators say that they are ready."""

CLEAN_AGAIN = 300.0 + 1.2 * RECONCILE_INTERVAL + 60.0
"""Seconds after the last fault within which machines that are nobody's any more are gone."""

CLOSED = 250.0
"""Seconds that the end of a coordinator may take, whatever happens."""


class World:
    """One app on one clock, with what goes wrong in it."""

    EPOCH = 1_700_000_000.0
    LIST_LAG = 5.0

    def __init__(self, seed: int, marks: Counter[str] | None = None, *, trace: bool = False) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.marks: Counter[str] = Counter() if marks is None else marks
        self.endings: Counter[str] = Counter()
        self.trace: list[str] | None = [] if trace else None
        self.broken: list[str] = []
        self.clock = HeapClock()
        self.chaos = True
        self.outage = False
        self.denied = False
        self.exits_at_boot = 0
        """How many of the next boots end before their worker answers."""
        self._stuck: list[Deferred[None]] = []
        self._choose_faults()
        self.sizes = [4, 5] if self.has("large") else [1, 2, 3]
        self.max_req_time = random.choice([2.0, 5.0, 20.0])
        self.max_queue = random.choice([3, 100, 100])
        self._senders = Random(
            f"senders {seed}"
        )  # of its own: who sends does not change what else happens to a seed
        self.max_per_client = self._senders.choice([3, 20, 20])
        self.worker_deadline = random.random() < 0.7
        self.forgetful = random.random() < 0.3  # workers that take any number of runs
        self.duration = random.uniform(200.0, 1000.0)
        timing = Timing(
            boot=random.choice([0.1, 1.0, 3.0]),
            stop=random.choice([0.0, 0.5]),
            stop_cooldown=random.choice([0.0, 1.0]),
            tombstone_ttl=random.choice([0.0, 60.0]),
        )
        hurry = timing.boot < 2.0 and not self.has("rate-limits")
        self.max_wait = random.choice([5.0, 30.0]) if hurry else 30.0
        self.ledger = Ledger(self)
        self.machines = SimMachines(
            NodeClock(self.clock),
            self.wall,
            self.ledger,
            timing,
            Random(seed),
            rate_limited=self.has("rate-limits"),
        )
        self.machines.world = self
        self.nodes: list[Node] = []
        self._incarnations = 0
        self._requests = 0
        self._lists: list[tuple[float, list[Machine]]] = []

    def __str__(self) -> str:
        chosen = (*self.rates, *self.events, *sorted(self.traits), *self.how)
        return f"seed {self.seed}: {' '.join(chosen)}"

    def _choose_faults(self) -> None:
        """Choose what goes wrong in this world: not everything, so that each fault is seen without others."""
        random = self.random
        share = random.choice([0.0, 0.1, 0.3, 0.6, 0.9])
        self.rates = {
            name: random.random() ** 2 * most
            for name, most in {**CALL_FAULTS, **MACHINE_FAULTS}.items()
            if random.random() < share
        }
        self.traits = {name for name, chance in TRAITS.items() if random.random() < chance}
        if "over-http" in self.traits:
            self.rates |= {
                name: random.random() * most for name, most in HTTP_FAULTS.items() if random.random() < 0.5
            }
        if "long-pauses" in self.traits:
            self.rates["pause-at-answer"] = CALL_FAULTS["pause-at-answer"] / 2
        self._call_rates = {name: self.rates[name] for name in CALL_FAULTS if name in self.rates}
        self.events = {name: apart for name, apart in EVENTS.items() if random.random() < share}
        self.how = [name for name in HOW if random.random() < share]

    # What the world's parts ask.

    def wall(self) -> float:
        """Tell the true time, in seconds since the epoch."""
        return self.EPOCH + self.clock.now

    def has(self, trait: str) -> bool:
        """Tell whether this world is of a kind."""
        if trait in self.traits:
            self.marks[trait] += 1
        return trait in self.traits

    def fault(self, name: str) -> bool:
        """Tell whether a fault strikes here and now."""
        rate = self.rates.get(name)
        if rate is None or not self.chaos or self.random.random() >= rate:
            return False
        self.marks[name] += 1
        return True

    def strikes(self) -> frozenset[str]:
        """Choose the faults that befall a call."""
        if not self.chaos:
            return frozenset()
        return frozenset([name for name, rate in self._call_rates.items() if self.random.random() < rate])

    def latency(self) -> float:
        """Choose the seconds that something takes to get somewhere."""
        return self.random.uniform(0.002, 0.05)

    def stuck(self) -> Deferred[None]:
        """Wait until the faults are over."""
        stuck: Deferred[None] = Deferred()
        self._stuck.append(stuck)
        return stuck

    def stale_list(self) -> list[Machine]:
        """Tell the machines as they were a moment ago."""
        then = self.clock.now - self.random.uniform(0, self.LIST_LAG)
        past = [machines for moment, machines in self._lists if moment <= then]
        return past[-1] if past else []

    def may_lose_workers(self, client: Client) -> bool:
        """Tell whether a worker can go away in the middle of this client's run."""
        losing = {"body-dies", "vanish", "overlap", "pause", "pause-at-answer"}
        if "over-http" in self.traits:
            losing |= {"zombie-call", "late-call"}  # a stop that was repeated may come once more, later
        if client.script.how not in ("honest", "floods") or client.node.overlaps:
            return True
        return not losing.isdisjoint({*self.rates, *self.events, *self.traits})

    def note(self, *what: object) -> None:
        """Keep a line of history."""
        if self.trace is not None:
            self.trace.append(f"{self.clock.now:9.3f}  {' '.join(map(str, what))}")

    # An episode.

    def live(self) -> None:
        """Live through all phases. Raises `BrokenPromiseError`."""
        if self.seed % 64 == 0:
            gc.collect()  # what earlier worlds have left is theirs
            gc.freeze()
        observer = self._observer()
        globalLogPublisher.addObserver(observer)
        try:
            self._begin()
            self._run(self.duration)
            self._heal()
            self._run(READY_AGAIN)
            self._check_ready()
            self._run(SERVED_AGAIN - READY_AGAIN)
            self._check_standby()
            self._check_refill()
            self._check_service()
            self._check_migration()
            self._check_exits_at_boot()
            self._check_succession()
            self._run(max(0.0, self._healed_at + CLEAN_AGAIN - self.clock.now))
            self._check_clean()
            self._check_end()
            if self.seed % 64 == 0:
                gc.collect()  # tells of failures that nobody has looked at
        finally:
            globalLogPublisher.removeObserver(observer)
        if self.broken:
            raise BrokenPromiseError(self.broken[0])

    def _run(self, seconds: float) -> None:
        """Let time pass, in pieces that are short enough to stop soon after something broke."""
        end = self.clock.now + seconds
        while self.clock.now < end and not self.broken:
            self.clock.run_until(min(end, self.clock.now + 20.0))
        if self.broken:
            raise BrokenPromiseError(self.broken[0])

    def _begin(self) -> None:
        if "stale-list" in self.rates:
            self._keep_list()
        for number in range(self.random.choice([1, 1, 2, 3])):
            name = ("p", "p-1", "q")[number]
            self._start_node(name, self.random.choice(self.sizes))
        for node in self.nodes:
            self._later(self.random.uniform(0, 5), self._arrivals, node.pool_name)
        for event, apart in self.events.items():
            self._later(self.random.expovariate(1 / apart), self._strike, event)

    def _later(self, seconds: float, call: Any, *arguments: Any) -> None:
        """Have something happen, unless the chaos is over by then."""

        def happen() -> None:
            if self.chaos:
                call(*arguments)

        self.clock.call_later(seconds, happen)

    def _keep_list(self) -> None:
        self._lists = [*self._lists[-10:], (self.clock.now, self.machines.now())]
        self._later(0.5, self._keep_list)

    def _start_node(self, pool_name: str, size: int, image: str = "i1") -> Node:
        self._incarnations += 1
        node = Node(self, pool_name, self._incarnations, size=size, image=image)
        others = [other for other in self.nodes if other.pool_name == pool_name and not other.is_gone]
        for other in [*others, node] if others else []:
            other.overlaps = True
        self.nodes.append(node)
        self.note("start", node, "size", size)
        node.start()
        return node

    def latest(self, pool_name: str) -> Node:
        """Tell the youngest coordinator of a pool."""
        return [node for node in self.nodes if node.pool_name == pool_name][-1]

    # Requests.

    def _arrivals(self, pool_name: str) -> None:
        """Let requests come, now and then many at once."""
        random = self.random
        senders = self._senders
        alone = senders.choice([None, None, *Sender])
        for _ in range(random.choice([1, 1, 1, 2, 8])):
            sender = alone or senders.choice(list(Sender))
            self._later(random.expovariate(2.0), self._request, pool_name, sender)
        self._later(random.expovariate(1 / random.choice([5.0, 60.0, 300.0])), self._arrivals, pool_name)

    def _request(self, pool_name: str, sender: Sender) -> None:
        node, random = self.latest(pool_name), self.random
        if not node.alive:
            return
        if node.clock.paused:  # it gets the request when it wakes up
            node.clock.when_resumed(lambda: self._request(pool_name, sender))
            return
        how = random.choice(self.how) if self.how and random.random() < 0.4 else "honest"
        lines = random.choice([0, 1, 5, 12]) if how == "honest" else random.choice([1, 5])
        span = random.choice([0.1, 0.5, 1.0, 1.5]) * self.max_req_time
        client = self._send(node, lines, span / (lines + 1), random.randrange(256), how, sender)
        if random.random() < 0.15:
            self._later(random.expovariate(1 / self.max_req_time), client.leave)
        if random.random() < 0.1:
            self._later(random.uniform(0, 5), client.pause)
            self._later(random.uniform(5, 60), client.resume)

    def _send(
        self,
        node: Node,
        lines: int,
        pause: float,
        code: int,
        how: str = "honest",
        sender: Sender = Sender.A_HOST,
    ) -> Client:
        self._requests += 1
        script = Script(f"r{self._requests}", lines, pause, code, how)
        self.marks[how] += 1
        self.note("request", script.request, "to", node, how, sender.name)
        reason = node.pool.not_ready_reason
        if reason is not None and node.pool.count(Phase.READY):
            self.ledger.broken(f"23: {node} has a machine ready, and is not: {reason}")
        client = Client(self, node, script, sender, raw=self.random.random() < 0.2)
        node.take(client)
        return client

    # What strikes.

    def _strike(self, event: str) -> None:
        self._later(self.random.expovariate(1 / EVENTS[event]), self._strike, event)
        self.marks[event] += 1
        random = self.random
        if event in ("outage", "denied"):
            self.outage = self.outage or event == "outage"
            self.denied = self.denied or event == "denied"
            self._later(random.uniform(5, 120), self._end_outage)
        elif event == "vanish":
            if machines := self.machines.now():
                self.machines.vanish(random.choice(machines).id)
        elif alive := [node for node in self.nodes if node.alive]:
            for node in alive if event == "deploy" else [random.choice(alive)]:
                if event == "pause":
                    self.pause(node)
                else:
                    self.replace(node, crash=event == "crash")

    def _end_outage(self) -> None:
        self.outage = self.denied = False

    def pause(self, node: Node) -> None:
        """Let a coordinator stand still for a while, as by SIGSTOP."""
        if not node.clock.paused:
            self.note("pause", node)
            node.clock.pause()
            # A long one outlasts leases.
            longest = 600.0 if self.has("long-pauses") else self.random.choice([1.0, 20.0, 150.0, 500.0])
            self._later(longest * self.random.random(), node.clock.resume)

    def replace(self, node: Node, *, crash: bool) -> None:
        """End a coordinator; most times another of its pool follows, which may be of another kind."""
        random = self.random
        size = random.choice(self.sizes) if self.has("resized") else node.size
        image = random.choice(["i1", "i2"]) if self.has("new-image") else node.image
        if self.has("overlap") and random.random() < 0.5:
            self._start_node(node.pool_name, size, image)
        elif crash and random.random() < 0.7:
            self._later(
                random.choice([0.0, 5.0, 100.0, 500.0]), self._start_again, node.pool_name, size, image
            )
        if crash:
            node.crash()
            return
        node.close(destroy=random.random() < 0.3)
        assert node.closed is not None
        self.clock.call_later(CLOSED, self._check_closed, node)
        node.closed.addCallback(
            lambda _: self._later(random.uniform(0, 20), self._start_again, node.pool_name, size, image)
        )

    def _start_again(self, pool_name: str, size: int, image: str) -> None:
        if not self.latest(pool_name).alive:
            self._start_node(pool_name, size, image)

    def _check_closed(self, node: Node) -> None:
        if not node.clock.pauses and not node.is_gone:
            self.ledger.broken(f"14: {node} is not closed after {CLOSED:g} s")

    # After the chaos.

    def _heal(self) -> None:
        self.note("healed")
        self.chaos = False
        self._healed_at = self.clock.now
        self._end_outage()
        stuck, self._stuck = self._stuck, []
        for deferred in stuck:
            deferred.callback(None)
        for node in self.nodes:
            node.clock.resume()
        if not any(node.alive for node in self.nodes):
            self._start_node("p", 2)

    def _settled_nodes(self) -> list[Node]:
        """Tell the coordinators that now have to keep all promises."""
        return [node for node in self.nodes if node.alive and not node.overlaps]

    def _check_service(self) -> None:
        """Every place of every pool serves."""
        clients = [client for node in self._settled_nodes() for client in self._send_to_all_places(node)]
        self._run(self.max_wait + self.max_req_time + 1)
        for client in clients:
            if client.ending != "exit 0 None":
                self.ledger.broken(f"11: {client.script.request} on a healed world: {client.ending}")

    def _check_migration(self) -> None:
        """A request is served by a machine that its start moves to another host."""
        for machine in self.machines.now():
            if machine.state is State.STOPPED:
                self.machines.migrate_at_start(machine.id)
        self._check_service()

    def _check_exits_at_boot(self) -> None:
        """Send requests to machines whose workers end at boot: the ledger checks that the pool notices."""
        nodes = self._settled_nodes()
        self.exits_at_boot = len(nodes)
        for node in nodes:
            self._send(node, 1, 0.1, 0)
        self._run(self.max_wait + self.max_req_time + 1)
        self.exits_at_boot = 0

    def check_noticed(self, boot: Boot) -> None:
        """No pool still waits for a worker that ended, unless its machine was started again."""
        if self.ledger.boots.get(boot.machine.id, boot) is not boot:
            return
        for node in self._settled_nodes():
            waiting = (Phase.CREATING, Phase.STARTING, Phase.RESUMING)
            for member in node.pool._slots:
                known = member.known_machine
                if member.phase in waiting and known is not None and known.id == boot.machine.id:
                    self.ledger.broken(f"24: {node} waits for {member.name}, whose worker has ended")

    def _send_to_all_places(self, node: Node) -> list[Client]:
        """Send as many requests as a pool has places; those for whom a machine stands by have it at once."""
        ready = node.pool.count(Phase.READY)
        clients = [
            self._send(node, 2, 0.1, 0)
            for _ in range(min(node.size, self.max_queue + 1, self.max_per_client))
        ]
        for client in clients[:ready]:
            if client.machine_id is None:
                self.ledger.broken(f"22: {client.script.request} waits, though {ready} machines stand by")
        return clients

    def _check_ready(self) -> None:
        """Who is asked says that all is well; if not, as while a machine is destroyed, a second later."""
        troubled = [node for node in self._settled_nodes() if node.pool.not_ready_reason]
        self._run(1.0 if troubled else 0.0)
        for node in troubled:
            if node.pool.not_ready_reason:
                self.ledger.broken(f"23: {node}: {node.pool.not_ready_reason}")

    def _check_standby(self) -> None:
        """As many machines stand by as should; nobody waits, and all is well."""
        self._check_ready()
        for node in self._settled_nodes():
            if node.pool.waiting:
                self.ledger.broken(f"11: {node.pool.waiting} still wait for {node}")
            ready = node.pool.count(Phase.READY) + node.pool.count(Phase.SUSPENDED)
            if ready != node.settings.standby:
                self.ledger.broken(f"22: {node} has {ready} machines ready, of {node.settings.standby}")

    def _check_refill(self) -> None:
        """While a machine that stood by is in use, another is on its way to stand by."""
        nodes = [node for node in self._settled_nodes() if 0 < node.settings.standby < node.size]
        for node in nodes:
            self._send(node, 20, 0.1, 0)
        self._run(1.0)
        for node in nodes:
            coming = sum(map(node.pool.count, (Phase.READY, Phase.SUSPENDED, Phase.STARTING, Phase.CREATING)))
            if coming < node.settings.standby:
                self.ledger.broken(f"22: {node} has {coming} machines on their way to stand by")
        self._run(self.max_req_time if nodes else 0.0)

    def _check_succession(self) -> None:
        """Every coordinator's next instance takes over what is left, within its own size and image."""
        old = self._settled_nodes()
        for node in old:
            node.close()
        self._run(30.0)
        left = {node: self._machines_of(node) for node in old}
        new = {}
        for node in old:
            size = self.random.choice(self.sizes) if self.has("resized") else node.size
            image = self.random.choice(["i1", "i2"]) if self.has("new-image") else node.image
            new[node] = self._start_node(node.pool_name, size, image)
        self._check_service()
        for node, machines in left.items():
            follower = new[node]
            now = self._machines_of(follower)
            kept = {machine.id for machine in machines} & {machine.id for machine in now}
            fit = min(len(machines), follower.size) if follower.image == node.image else 0
            if len(now) > follower.size:
                self.ledger.broken(f"5: {follower} keeps {len(now)} machines, its size is {follower.size}")
            if len(kept) < fit and not node.overlaps:
                self.ledger.broken(f"17: {follower} reclaims {len(kept)} of {len(machines)} machines")

    def _machines_of(self, node: Node) -> list[Machine]:
        return [machine for machine in self.machines.now() if pool_of(machine.name) == node.pool_name]

    def _check_clean(self) -> None:
        """Nothing is there but what is a living pool's, and that is not too much."""
        living = {node.pool_name: node for node in self.nodes if node.alive}
        for machine in self.machines.now():
            lease, record = self.machines.lease_of(machine.id), self.ledger.records[machine.id]
            if lease is None or pool_of(machine.name) not in living:
                self.ledger.broken(f"11: {machine.name} is still there: {machine.state}, {lease}")
            if record.tampered and not living[pool_of(machine.name) or ""].overlaps:
                self.ledger.broken(f"7: {machine.name} was tampered with, and is still there")
        for node in self._settled_nodes():
            if (count := len(self._machines_of(node))) > node.size:
                self.ledger.broken(f"5: {node} keeps {count} machines, its size is {node.size}")

    def _check_end(self) -> None:
        """All end in order, and leave stopped machines or none, and nothing pending."""
        destroying = {node: self.random.random() < 0.5 for node in self.nodes if node.alive}
        for node, destroy in destroying.items():
            node.close(destroy=destroy)
        self._run(60.0)
        for node, destroy in destroying.items():
            if not node.is_gone:
                self.ledger.broken(f"14: {node} does not end")
            if node.clock.timers:
                self.ledger.broken(f"14: {node} leaves {len(node.clock.timers)} timers")
            left = self._machines_of(node)
            if destroy and left and not node.overlaps:
                self.ledger.broken(f"15: {node} leaves {left[0].name}")
            for machine in left:
                if machine.state is not State.STOPPED and not node.overlaps:
                    self.ledger.broken(f"14: {node} leaves {machine.name} {machine.state}")
            if node.requests:
                self.ledger.broken(f"4: {node} leaves requests without an ending")

    # The log.

    def _observer(self) -> ILogObserver:
        @provider(ILogObserver)
        def observe(event: LogEvent) -> None:
            if event.get("log_level", LogLevel.info) <= LogLevel.debug:
                return
            text = formatEvent(event)
            self.note("log:", text)
            if "log_failure" in event:
                self.ledger.broken(f"16: logged {event['log_failure'].getTraceback()}")
            words = set(text.replace("'", " ").replace('"', " ").split())
            if "SECRET" in text or not self.ledger.nonces.isdisjoint(words):
                self.ledger.broken(f"16: the log says {text}")

        observer: ILogObserver = observe
        return observer
