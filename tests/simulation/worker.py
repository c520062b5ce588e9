"""The workers of a simulated world, each as good or as bad as the script it is sent, and the way to them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.python.failure import Failure
from twisted.web._newclient import Response
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from bfaas.http.strict_agent import IncompleteResponseError
from bfaas.machines.api import State
from bfaas.protocol import formats
from bfaas.tokens import AuthError, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.client import Client
    from tests.simulation.ledger import Boot
    from tests.simulation.nodes import Node
    from tests.simulation.world import World


SEE_OTHER = 303

ENDED = 1.0
"""Seconds that a script may run on after its request has ended."""


@dataclass(frozen=True)
class Script:
    """What a request asks a worker to do: print `lines`, one every `pause` seconds, and exit with `code`."""

    request: str
    lines: int
    pause: float
    code: int
    how: str = "honest"

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "secret": "SECRET"}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Script:
        told = json.loads(data)
        del told["secret"]
        return cls(**told)


class Written:
    """Gathers what a body producer writes."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


class Connection:
    """One connection to a worker, as a transport: what can be done to it from the coordinator's side."""

    def __init__(self, closed: Callable[[], None]) -> None:
        self.paused = False
        self.closed = False
        self._closed = closed

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        if not self.closed:
            self.closed = True
            self._closed()

    loseConnection = stopProducing
    abortConnection = stopProducing


@implementer(IAgent)
class Workers:
    """Reaches the workers on behalf of one coordinator."""

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None
    ) -> Deferred[Any]:
        world, headers = self._world, headers or Headers()
        if not uri.startswith(b"http://workers/"):
            world.ledger.broken(f"3: {self._node} asks for {uri.decode()}")
        # Without a name in it the proxy chooses any.
        [machine_id] = headers.getRawHeaders(formats.FORCE_INSTANCE, [next(iter(world.ledger.boots), "")])
        written = Written()
        if bodyProducer is not None:
            bodyProducer.startProducing(written)
        if method == b"POST":
            self._node.serves(Script.decode(written.data).request)
        boot = world.ledger.boots.get(machine_id)
        machine = world.machines.find(machine_id)
        started = machine is not None and machine.state is State.STARTED
        if boot is None or boot.over or not started or boot.listens_at > world.clock.now:
            return self._refused()
        if method == b"GET":
            return self._probed(boot)
        run = Run(world, self._node, boot, raw=b"raw=1" in uri)
        ticket = headers.getRawHeaders(formats.AUTHORIZATION, [""])[0]
        world.ledger.asked_to_run(self._node, boot)
        run.client = self._node.begins(Script.decode(written.data).request, machine_id)
        world.clock.call_later(world.latency(), run.arrive, ticket, Script.decode(written.data))
        return run.head

    def _refused(self) -> Deferred[Any]:
        refused: Deferred[Any] = Deferred()
        error = Failure(ConnectError())
        self._world.clock.call_later(self._world.latency(), self._tell, refused, error)
        return refused

    def _probed(self, boot: Boot) -> Deferred[Any]:
        probed: Deferred[Any] = Deferred()
        if not self._world.fault("probe-hangs"):
            code = 500 if self._world.fault("probe-fails") else 200
            connection = Connection(lambda: None)
            answer = Response._construct((b"HTTP", 1, 1), code, b"", Headers(), connection, None)
            self._world.clock.call_later(2 * self._world.latency(), self._tell, probed, answer)
        return probed

    def _tell(self, answer: Deferred[Any], result: Any) -> None:
        if not self._node.clock.dead and self._world.fault("pause-at-answer"):
            self._world.pause(self._node)
        self._node.clock.deliver(lambda: None if answer.called else answer.callback(result))


class Run:
    """One request at a worker. A coordinator that closes the connection, or is gone, ends it."""

    def __init__(self, world: World, node: Node, boot: Boot, *, raw: bool) -> None:
        self._world = world
        self._node = node
        self._boot = boot
        self._format = formats.Format.RAW if raw else formats.Format.EVENTS
        self._writer = formats.run_writer(self._format)
        self._response: Any = None
        self._over = False
        self._lines = 0
        self.client: Client | None = None
        self._delay = world.latency()  # the same for all that is said, so that it comes in order
        self.connection = Connection(self._closed)
        self.head: Deferred[Any] = Deferred(lambda _: self.connection.stopProducing())

    def arrive(self, ticket: str, script: Script) -> None:
        """Begin, if the ticket is good and the worker is fresh."""
        world, boot = self._world, self._boot
        if self._over or boot.over:
            self._fail()
            return
        boot.lost.append(self._fail)
        self._node.connections.append(self._closed)
        try:
            Verifier(boot.config.env["PUBLIC"]).verify(ticket, boot.machine.id, world.wall())
        except AuthError as error:
            world.ledger.broken(f"a ticket is refused: {error}")
            self._answer(401)
            self._end(None)
            return
        if boot.executed and not world.forgetful:
            self._answer(409)
            self._end(None)
            return
        world.ledger.executes(boot, script.request)
        world.note("runs", boot.machine.name, boot.number, script.request, script.how)
        self._script = script
        if script.how == "tampers":
            self._tamper()
        if script.how == "mute":
            return
        # Whatever the status, what follows looks like a run.
        self._answer(int(script.how.removeprefix("status-")) if script.how.startswith("status-") else 200)
        if world.worker_deadline:
            limit = float(boot.config.env["MAXREQTIME"][:-1])
            world.clock.call_later(limit, self._time_is_up)
        world.clock.call_later(script.pause, self._step)

    def _tamper(self) -> None:
        """Change the machine's own metadata, as whoever is root on it can."""
        world, machine = self._world, self._boot.machine
        values = [None, "", "somebody//else", f"{world.random.choice(world.nodes).pool_name}//i1"]
        value = world.random.choice(values)
        if world.machines.find(machine.id) and value != machine.metadata.get("pool_id"):
            # One tamperer may undo what another did: then there is nothing left to be seen.
            world.ledger.records[machine.id].tampered = value != self._boot.config.metadata["pool_id"]
            world.machines.set_metadata(machine.id, "pool_id", value)

    def _answer(self, code: int) -> None:
        kind, machine_id = self._format.value, self._boot.machine.id
        if self._is("lies-about-itself"):
            machine_id = "4d8901234567890"
        headers = Headers({"Content-Type": [kind], "Worker": [machine_id], "fly-replay": ["app=evil"]})
        if code == SEE_OTHER:
            headers.setRawHeaders("Location", ["http://internal/"])
        self._response = Response._construct((b"HTTP", 1, 1), code, b"", headers, self.connection, None)
        self._deliver(lambda: None if self.head.called else self.head.callback(self._response))

    def _is(self, how: str) -> bool:
        return getattr(self, "_script", None) is not None and self._script.how == how

    def _step(self) -> None:
        """Print a line; wait while the connection is paused; in the end exit."""
        world, script = self._world, self._script
        if self._over:
            return
        self._check_wanted()
        if self.connection.paused:
            world.clock.call_later(0.1, self._step)
            return
        if self._lines >= script.lines and script.how != "endless":
            self._exit(formats.Exit(script.code))
            return
        self._lines += 1
        line = f"{self._boot.machine.id} {self._boot.number} {script.request} {self._lines}\n"
        self._say(self._writer.output(formats.Stream.STDOUT, line.encode()))
        if self._lines == max(1, script.lines // 2):
            self._misbehave(script.how)
        world.clock.call_later(script.pause, self._step)

    def _check_wanted(self) -> None:
        """Nothing runs on for a request that has ended: its connection was closed, which a worker heeds."""
        client = self.client
        if client is not None and client.ended_at is not None and not self._node.clock.dead:
            late = self._world.clock.now - client.ended_at
            if late > ENDED:
                self._world.ledger.broken(f"18: {client.script.request} runs on, {late:.1f} s after its end")

    def _misbehave(self, how: str) -> None:
        if how == "cuts":
            self._end(Failure(IncompleteResponseError("connection lost")))
        elif how == "stops-short":
            self._end(None)
        elif how == "dies":
            self._world.ledger.die(self._boot)
        elif how == "babbles":
            self._say(b"event: exit\ndata: {}\n\nfoo\n\n")
        elif how == "two-exits":
            self._say(self._writer.end(formats.Exit(0)) * 2)
        elif how == "floods":
            for _ in range(40):
                self._say(self._writer.output(formats.Stream.STDOUT, b"x" * 60_000))

    def _time_is_up(self) -> None:
        if not self._over and self._script.how not in ("endless", "mute"):
            self._exit(formats.Exit.forced(formats.Reason.TIMEOUT))

    def _exit(self, exit_: formats.Exit) -> None:
        self._say(self._writer.end(exit_))
        self._end(None)
        if self._world.random.random() < 0.5:  # a worker ends after its run
            self._world.clock.call_later(0.02, self._world.ledger.die, self._boot)

    def _say(self, data: bytes) -> None:
        if not self._over:
            self._deliver(lambda: self._response._bodyDataReceived(data))

    def _end(self, reason: Failure | None) -> None:
        if self._over:
            return
        self._over = True
        if self._response is not None:
            done = reason or Failure(ResponseDone())
            self._deliver(lambda: self._response._bodyDataFinished(done))

    def _fail(self) -> None:
        """Break off: the machine is gone."""
        self._end(Failure(IncompleteResponseError("connection lost")))
        if self._response is None:
            error = Failure(IncompleteResponseError("connection lost"))
            self._deliver(lambda: None if self.head.called else self.head.callback(error))

    def _deliver(self, call: Callable[[], Any]) -> None:
        self._world.clock.call_later(self._delay, self._node.clock.deliver, self._unless_closed, call)

    def _unless_closed(self, call: Callable[[], Any]) -> None:
        if not self.connection.closed:
            call()

    def _closed(self) -> None:
        """The coordinator has closed the connection: a worker that is its own kills the script and ends."""
        if not self._over:
            self._over = True
            if self._is("endless") or self._is("mute") or self._world.forgetful:
                return
            self._world.clock.call_later(0.02, self._world.ledger.die, self._boot)
