"""Clients of a simulated world: each sends one request, and checks the one ending that it gets."""

from __future__ import annotations

import re
from enum import Enum
from io import BytesIO
from math import ceil
from typing import TYPE_CHECKING, Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from bfaas.http.server import HTTPError
from bfaas.protocol import formats

if TYPE_CHECKING:
    from tests.simulation.nodes import Node
    from tests.simulation.worker import Script
    from tests.simulation.world import World

_LINE = re.compile(r"(\w+) (\d+) (\S+) (\d+)")
_EVENT = re.compile(r"event: (stdout|stderr|exit)\ndata: (.*)")
REFUSALS = (429, 502, 503, 504)
IMPOSSIBLE = (
    "mute", "status-500", "status-303", "status-401", "lies-about-itself", "stops-short", "cuts", "floods",
    "endless",
)  # fmt: skip


HEADERS = (
    "Content-Encoding", "Content-Type", "Cache-Control", "X-Accel-Buffering", "X-Content-Type-Options",
    formats.RUN_ID, formats.WORKER, formats.COORD,
)  # fmt: skip


class Sender(Enum):
    """Where requests come from: what Fly's proxy says of it, and what it counts as."""

    A_HOST = b"203.0.113.7", "203.0.113.7"
    THE_SAME_HOST = b"::ffff:203.0.113.7", "203.0.113.7"
    A_NETWORK = b"2001:db8::1", "2001:db8::/64"
    THE_SAME_NETWORK = b"2001:DB8::ffff:0:0:1", "2001:db8::/64"
    ANOTHER_NETWORK = b"2001:db8:0:1::1", "2001:db8:0:1::/64"
    NOBODY = None, "172.16.0.1"
    NONSENSE = b"203.0.113.7, 203.0.113.8", "172.16.0.1"


class Client:
    """
    One request, as klein and the coordinator see it, and as its client does.

    `ending` is None until there is one: the exit, a refusal's status, or that one side is gone.
    """

    def __init__(self, world: World, node: Node, script: Script, sender: Sender, *, raw: bool) -> None:
        self._world = world
        self.node = node
        self._raw = raw
        self._fly_client_ip, self.address = sender.value
        self.script = script
        self.machine_id: str | None = None
        self.began = node.clock.seconds()
        self.pauses = node.clock.pauses
        self.ending: str | None = None
        self.ended_at: float | None = None
        # What a request is to the coordinator.
        self.content = BytesIO(script.encode())
        self.args = {b"raw": [b"1"]} if raw else {}
        self.requestHeaders = Headers()
        self.channel: object | None = self
        self.code = 200
        self._body: list[bytes] = []
        self._producer: Any = None
        self._gone: list[Deferred[None]] = []
        self.handling: Deferred[None] = Deferred()

    def send(self) -> None:
        """Send it; from here on the coordinator has it."""
        request: Any = self
        self.handling = Deferred.fromCoroutine(self.node.coordinator.run(request))
        self.handling.addErrback(self._refused)
        self.handling.addErrback(self._failed)

    def _refused(self, failure: Failure) -> None:
        """Do as klein does with what a handler raises."""
        if self.channel is None:
            failure.trap(CancelledError)
            return
        failure.trap(HTTPError)
        error: Any = failure.value
        self._end(str(error.code))
        if error.code in (429, 503):
            self._check_retry(error.headers["Retry-After"])
        if self._body or error.code not in REFUSALS:
            self._world.ledger.broken(f"4: {self.script.request}: {error.code} {error}")

    def _failed(self, failure: Failure) -> None:
        self._world.ledger.broken(f"16: {self.script.request} failed: {failure.getTraceback()}")

    # The coordinator's side.

    def getHeader(self, name: bytes) -> bytes | None:
        return self._fly_client_ip if name == b"fly-client-ip" else None

    def getClientAddress(self) -> IPv4Address:
        return IPv4Address("TCP", "172.16.0.1", 40_000)

    def setHeader(self, name: str, value: str) -> None:
        if name not in HEADERS:
            self._world.ledger.broken(f"3: {self.script.request} gets the header {name}: {value}")

    def notifyFinish(self) -> Deferred[None]:
        gone: Deferred[None] = Deferred()
        self._gone.append(gone)
        return gone

    def write(self, data: bytes) -> None:
        if self.ending is not None:
            self._world.ledger.broken(f"4: {self.script.request}: output after the end")
        self._body.append(data)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        assert self._producer is None
        self._producer = producer

    def unregisterProducer(self) -> None:
        assert self._producer is not None
        self._producer = None

    def finish(self) -> None:
        if self._producer is not None or self.channel is None:
            self._world.ledger.broken(f"4: {self.script.request} is finished though it is not done")
        self._check_answer()

    # The client's.

    def pause(self) -> None:
        """Read no more for now."""
        if self._producer is not None:
            self._producer.pauseProducing()

    def resume(self) -> None:
        """Read on."""
        if self._producer is not None:
            self._producer.resumeProducing()

    def leave(self) -> None:
        """Go away: klein cancels the handler, Twisted tells whoever asked."""
        if self.ending is None:
            self._world.note("leaves", self.script.request)
            self.channel = None
            self._end("left")
            self.handling.cancel()
            for gone in self._gone:
                gone.addErrback(lambda failure: failure.trap(ConnectionLost, CancelledError) and None)
                if not gone.called:
                    gone.errback(Failure(ConnectionLost()))

    def cut(self) -> None:
        """Find that the coordinator is gone."""
        if self.ending is None:
            self._end("cut")

    def _end(self, ending: str) -> None:
        if self.ending is not None:
            self._world.ledger.broken(f"4: {self.script.request} ends twice: {self.ending}, {ending}")
        self._world.note("ends", self.script.request, ending)
        self._world.endings[ending.split(maxsplit=1)[0]] += 1
        self.ending = ending
        self.ended_at = self._world.clock.now
        self.node.forget(self)
        self._check_time()

    def _check_time(self) -> None:
        settings = self.node.settings
        took = self.node.clock.seconds() - self.began
        if took > settings.max_wait + settings.max_req_time + 0.001 and self.pauses == self.node.clock.pauses:
            self._world.ledger.broken(f"10: {self.script.request} took {took:.3f} s: {self.ending}")

    def _check_retry(self, after: str) -> None:
        settings = self.node.settings
        if not 1 <= int(after) <= ceil(settings.max_wait + settings.max_req_time):
            self._world.ledger.broken(f"21: {self.script.request} is to come back after {after} s")

    def _check_answer(self) -> None:
        """Check that everything came, of the right run, and that the exit is the script's or the reason."""
        whole = b"".join(self._body).decode()
        if self._raw:
            match = re.fullmatch(r"(.*)\nexit: (\d+)(?: ([a-z-]+))?\n", whole, re.DOTALL)
            exit_ = formats.Exit(int(match[2]), reason=match[3]) if match else None
            text = match[1] if match else ""
        else:
            exit_, text = self._read_events(whole)
        self._end(f"exit {exit_.code} {exit_.reason}" if exit_ else "no exit")
        if exit_ is None:
            self._world.ledger.broken(f"4: {self.script.request} ends without an exit: {whole[-200:]!r}")
            return
        lines = text.splitlines()
        if exit_.reason == "output-limit":
            del lines[-1:]  # which is cut wherever the limit was
        if self.script.how != "floods" and not self._are_mine(lines):
            self._world.ledger.broken(f"3: {self.script.request} got {lines[:3]}")
        honest = exit_.reason is None and self.script.how not in ("two-exits", "babbles")
        if honest and (exit_.code != self.script.code or len(lines) < self.script.lines):
            self._world.ledger.broken(f"4: {self.script.request}: {len(lines)} lines, {exit_}")
        if exit_.reason is None and self.script.how in IMPOSSIBLE:
            self._world.ledger.broken(f"3: {self.script.request}: {self.script.how} ends with {exit_}")
        if exit_.reason == "worker-lost" and not self._world.may_lose_workers(self):
            self._world.ledger.broken(f"4: {self.script.request} lost a worker that was fine")

    def _read_events(self, whole: str) -> tuple[formats.Exit | None, str]:
        *blocks, rest = [block for block in whole.split("\n\n") if not block.startswith(":")]
        events = [match.groups() for block in blocks if (match := _EVENT.fullmatch(block))]
        if rest or len(events) != len(blocks) or [name for name, _ in events].count("exit") != 1:
            return None, ""
        name, data = events.pop()
        exit_ = formats.Exit.from_json(data.encode()) if name == "exit" else None
        return exit_, "".join(formats.read_json(data.encode()) for _, data in events)

    def _are_mine(self, lines: list[str]) -> bool:
        boots = set()
        for number, line in enumerate(lines, 1):
            match = _LINE.fullmatch(line)
            if match is None or (match[3], int(match[4])) != (self.script.request, number):
                return self._raw and self.script.how in ("babbles", "two-exits")
            boots.add((match[1], match[2]))
        return not boots or (len(boots) == 1 and next(iter(boots))[0] == self.machine_id)
