"""Simulated workers, whose behavior is chosen by the script that they get, and the network to them."""

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
    from tests.simulation.nodes import Node
    from tests.simulation.oracle import Boot
    from tests.simulation.world import World


_SEE_OTHER = 303

_MAX_OVERRUN = 1.0
"""Seconds for which a script may run after its request has ended."""


@dataclass(frozen=True)
class Script:
    """What a worker is to do: write `lines` lines, one every `pause` seconds, and exit with `code`."""

    request: str
    lines: int
    pause: float
    code: int
    behavior: str = "well-behaved"

    def encode(self) -> bytes:
        return json.dumps({**asdict(self), "secret": "SECRET"}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Script:
        fields = json.loads(data)
        del fields["secret"]
        return cls(**fields)


class BodyCollector:
    """A consumer that collects what a body producer writes."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


class Connection:
    """The coordinator's transport to a worker."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.paused = False
        self.closed = False
        self._on_close = on_close

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        if not self.closed:
            self.closed = True
            self._on_close()

    loseConnection = stopProducing
    abortConnection = stopProducing


@implementer(IAgent)
class WorkerAgent:
    """The agent with which one coordinator reaches workers."""

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None
    ) -> Deferred[Any]:
        world, headers = self._world, headers or Headers()
        if not uri.startswith(b"http://workers/"):
            world.oracle.report(f"3: {self._node} requests {uri.decode()}")
        # Without the header, Fly's proxy chooses any machine.
        [machine_id] = headers.getRawHeaders(formats.FORCE_INSTANCE, [next(iter(world.oracle.boots), "")])
        body = BodyCollector()
        if bodyProducer is not None:
            bodyProducer.startProducing(body)
        if method == b"POST":
            self._node.on_served(Script.decode(body.data).request)
        boot = world.oracle.boots.get(machine_id)
        machine = world.machines.find(machine_id)
        started = machine is not None and machine.state is State.STARTED
        if boot is None or boot.ended or not started or boot.listens_at > world.clock.now:
            return self._refuse_connection()
        if method == b"GET":
            return self._respond_to_probe(boot)
        run = Run(world, self._node, boot, raw=b"raw=1" in uri)
        auth_token = headers.getRawHeaders(formats.AUTHORIZATION, [""])[0]
        world.oracle.on_run_requested(self._node, boot)
        run.client = self._node.on_dispatched(Script.decode(body.data).request, machine_id)
        world.clock.call_later(world.latency(), run.start, auth_token, Script.decode(body.data))
        return run.response

    def _refuse_connection(self) -> Deferred[Any]:
        refused: Deferred[Any] = Deferred()
        error = Failure(ConnectError())
        self._world.clock.call_later(self._world.latency(), self._deliver, refused, error)
        return refused

    def _respond_to_probe(self, boot: Boot) -> Deferred[Any]:
        probed: Deferred[Any] = Deferred()
        if not self._world.fault("probe-hangs"):
            code = 500 if self._world.fault("probe-fails") else 200
            connection = Connection(lambda: None)
            response = Response._construct((b"HTTP", 1, 1), code, b"", Headers(), connection, None)
            self._world.clock.call_later(2 * self._world.latency(), self._deliver, probed, response)
        return probed

    def _deliver(self, deferred: Deferred[Any], result: Any) -> None:
        if not self._node.clock.dead and self._world.fault("pause-at-response"):
            self._world.pause(self._node)
        self._node.clock.deliver(lambda: None if deferred.called else deferred.callback(result))


class Run:
    """One run on a worker. It ends when the coordinator closes the connection or crashes."""

    def __init__(self, world: World, node: Node, boot: Boot, *, raw: bool) -> None:
        self._world = world
        self._node = node
        self._boot = boot
        self._format = formats.Format.RAW if raw else formats.Format.EVENTS
        self._writer = formats.run_writer(self._format)
        self._response: Any = None
        self._ended = False
        self._lines = 0
        self.client: Client | None = None
        self._delay = world.latency()  # the same for all data, so that it arrives in order
        self.connection = Connection(self._on_close)
        self.response: Deferred[Any] = Deferred(lambda _: self.connection.stopProducing())

    def start(self, auth_token: str, script: Script) -> None:
        """Run a script, if the auth token is valid and the worker has run none."""
        world, boot = self._world, self._boot
        if self._ended or boot.ended:
            self._fail()
            return
        boot.on_end.append(self._fail)
        self._node.connections.append(self._on_close)
        try:
            Verifier(boot.config.env["PUBLIC"]).verify(auth_token, boot.machine.id, world.wall())
        except AuthError as error:
            world.oracle.report(f"a valid auth token is rejected: {error}")
            self._send_head(401)
            self._end(None)
            return
        if boot.executions and not world.reusable_workers:
            self._send_head(409)
            self._end(None)
            return
        world.oracle.on_script_started(boot, script.request)
        world.log("runs", boot.machine.name, boot.number, script.request, script.behavior)
        self._script = script
        if script.behavior == "tampers":
            self._tamper()
        if script.behavior == "no-response":
            return
        # The body is a run's, whatever the status.
        behavior = script.behavior
        self._send_head(int(behavior.removeprefix("status-")) if behavior.startswith("status-") else 200)
        if world.worker_deadline:
            limit = float(boot.config.env["MAXREQTIME"][:-1])
            world.clock.call_later(limit, self._on_timeout)
        world.clock.call_later(script.pause, self._step)

    def _tamper(self) -> None:
        """Change the machine's own metadata, as a script with root privileges can."""
        world, machine = self._world, self._boot.machine
        values = [None, "", "other//unknown", f"{world.random.choice(world.nodes).pool_name}//i1"]
        value = world.random.choice(values)
        if world.machines.find(machine.id) and value != machine.metadata.get("pool_id"):
            # A second change may undo the first: then there is nothing to detect.
            world.oracle.records[machine.id].tampered = value != self._boot.config.metadata["pool_id"]
            world.machines.set_metadata(machine.id, "pool_id", value)

    def _send_head(self, code: int) -> None:
        content_type, machine_id = self._format.value, self._boot.machine.id
        if self._behaves("wrong-worker-header"):
            machine_id = "4d8901234567890"
        headers = Headers(
            {"Content-Type": [content_type], "Worker": [machine_id], "fly-replay": ["app=evil"]}
        )
        if code == _SEE_OTHER:
            headers.setRawHeaders("Location", ["http://internal/"])
        self._response = Response._construct((b"HTTP", 1, 1), code, b"", headers, self.connection, None)
        self._deliver(lambda: None if self.response.called else self.response.callback(self._response))

    def _behaves(self, behavior: str) -> bool:
        return getattr(self, "_script", None) is not None and self._script.behavior == behavior

    def _step(self) -> None:
        """Write a line, unless the connection is paused; exit after the last one."""
        world, script = self._world, self._script
        if self._ended:
            return
        self._check_still_wanted()
        if self.connection.paused:
            world.clock.call_later(0.1, self._step)
            return
        if self._lines >= script.lines and script.behavior != "endless":
            self._exit(formats.Exit(script.code))
            return
        self._lines += 1
        line = f"{self._boot.machine.id} {self._boot.number} {script.request} {self._lines}\n"
        self._send(self._writer.output(formats.Stream.STDOUT, line.encode()))
        if self._lines == max(1, script.lines // 2):
            self._misbehave(script.behavior)
        world.clock.call_later(script.pause, self._step)

    def _check_still_wanted(self) -> None:
        """Check that the request has not ended: the coordinator must have closed the connection then."""
        client = self.client
        if client is not None and client.ended_at is not None and not self._node.clock.dead:
            overrun = self._world.clock.now - client.ended_at
            if overrun > _MAX_OVERRUN:
                request = client.script.request
                self._world.oracle.report(f"18: {request} still runs {overrun:.1f} s after its end")

    def _misbehave(self, behavior: str) -> None:
        if behavior == "aborts-connection":
            self._end(Failure(IncompleteResponseError("connection lost")))
        elif behavior == "no-exit":
            self._end(None)
        elif behavior == "kills-machine":
            self._world.oracle.exit(self._boot)
        elif behavior == "malformed-events":
            self._send(b"event: exit\ndata: {}\n\nfoo\n\n")
        elif behavior == "two-exits":
            self._send(self._writer.end(formats.Exit(0)) * 2)
        elif behavior == "floods":
            for _ in range(40):
                self._send(self._writer.output(formats.Stream.STDOUT, b"x" * 60_000))

    def _on_timeout(self) -> None:
        if not self._ended and self._script.behavior not in ("endless", "no-response"):
            self._exit(formats.Exit.forced(formats.Reason.TIMEOUT))

    def _exit(self, exit_: formats.Exit) -> None:
        self._send(self._writer.end(exit_))
        self._end(None)
        if self._world.random.random() < 0.5:  # a worker exits after its run
            self._world.clock.call_later(0.02, self._world.oracle.exit, self._boot)

    def _send(self, data: bytes) -> None:
        if not self._ended:
            self._deliver(lambda: self._response._bodyDataReceived(data))

    def _end(self, reason: Failure | None) -> None:
        if self._ended:
            return
        self._ended = True
        if self._response is not None:
            done = reason or Failure(ResponseDone())
            self._deliver(lambda: self._response._bodyDataFinished(done))

    def _fail(self) -> None:
        """Abort the connection: the machine has stopped."""
        self._end(Failure(IncompleteResponseError("connection lost")))
        if self._response is None:
            error = Failure(IncompleteResponseError("connection lost"))
            self._deliver(lambda: None if self.response.called else self.response.callback(error))

    def _deliver(self, call: Callable[[], Any]) -> None:
        self._world.clock.call_later(self._delay, self._node.clock.deliver, self._unless_closed, call)

    def _unless_closed(self, call: Callable[[], Any]) -> None:
        if not self.connection.closed:
            call()

    def _on_close(self) -> None:
        """Handle the end of the connection: a real worker kills the script and exits."""
        if not self._ended:
            self._ended = True
            if self._behaves("endless") or self._behaves("no-response") or self._world.reusable_workers:
                return
            self._world.clock.call_later(0.02, self._world.oracle.exit, self._boot)
