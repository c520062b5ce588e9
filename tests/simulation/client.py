"""Clients of a simulated world: each sends one request, and checks its one outcome."""

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

from bfaas.http.errors import HTTPError
from bfaas.protocol import formats

if TYPE_CHECKING:
    from tests.simulation.nodes import Node
    from tests.simulation.worker import Script
    from tests.simulation.world import World

_LINE = re.compile(r"(\w+) (\d+) (\S+) (\d+)")
_EVENT = re.compile(r"event: (stdout|stderr|exit)\ndata: (.*)")
_ERROR_STATUSES = (429, 502, 503, 504)

_NO_CLEAN_EXIT = (
    "no-response",
    "status-500",
    "status-303",
    "status-401",
    "wrong-worker-header",
    "no-exit",
    "aborts-connection",
    "floods",
    "endless",
)
"""Behaviors of a worker after which an exit must have a reason."""

_RESPONSE_HEADERS = (
    "Content-Encoding",
    "Content-Type",
    "Cache-Control",
    "X-Accel-Buffering",
    "X-Content-Type-Options",
    formats.RUN_ID,
    formats.WORKER,
    formats.COORD,
)


class Sender(Enum):
    """Origin of a request: the value of Fly-Client-IP, and the address that it counts for."""

    HOST = b"203.0.113.7", "203.0.113.7"
    MAPPED_HOST = b"::ffff:203.0.113.7", "203.0.113.7"
    NETWORK = b"2001:db8::1", "2001:db8::/64"
    SAME_NETWORK = b"2001:DB8::ffff:0:0:1", "2001:db8::/64"
    OTHER_NETWORK = b"2001:db8:0:1::1", "2001:db8:0:1::/64"
    NO_HEADER = None, "172.16.0.1"
    INVALID_HEADER = b"203.0.113.7, 203.0.113.8", "172.16.0.1"


class Client:
    """
    One request, as the server's `Request` to the coordinator, and as its client.

    `outcome` is None until the request has ended: then the exit, an error status, `client-disconnected` or
    `coordinator-lost`.
    """

    def __init__(self, world: World, node: Node, script: Script, sender: Sender, *, raw: bool) -> None:
        self._world = world
        self.node = node
        self._raw = raw
        self._fly_client_ip, self.address = sender.value
        self.script = script
        self.machine_id: str | None = None
        self.sent_at = node.clock.seconds()
        self.pauses = node.clock.pauses
        self.outcome: str | None = None
        self.ended_at: float | None = None
        # Attributes of a twisted.web request.
        self.content = BytesIO(script.encode())
        self.args = {b"raw": [b"1"]} if raw else {}
        self.requestHeaders = Headers()
        self.channel: object | None = self
        self.code = 200
        self._body: list[bytes] = []
        self._producer: Any = None
        self._disconnected: list[Deferred[None]] = []
        self.handling: Deferred[None] = Deferred()

    def send(self) -> None:
        """Start the coordinator's handler."""
        request: Any = self
        self.handling = Deferred.fromCoroutine(self.node.coordinator.run(request))
        self.handling.addErrback(self._on_error)
        self.handling.addErrback(self._on_unexpected_error)

    def _on_error(self, failure: Failure) -> None:
        """Handle an exception of the handler as Klein does."""
        if self.channel is None:
            failure.trap(CancelledError)
            return
        failure.trap(HTTPError)
        error: Any = failure.value
        self._end(str(error.code))
        if error.code in (429, 503):
            self._check_retry_after(error.headers["Retry-After"])
        if self._body or error.code not in _ERROR_STATUSES:
            self._report(4, f": {error.code} {error}")

    def _on_unexpected_error(self, failure: Failure) -> None:
        self._report(16, f" failed: {failure.getTraceback()}")

    def _report(self, number: int, violation: str) -> None:
        self._world.oracle.report(f"{number}: {self.script.request}{violation}")

    # The coordinator's side.

    def getHeader(self, name: bytes) -> bytes | None:
        return self._fly_client_ip if name == b"fly-client-ip" else None

    def getClientAddress(self) -> IPv4Address:
        return IPv4Address("TCP", "172.16.0.1", 40_000)

    def setHeader(self, name: str, value: str) -> None:
        if name not in _RESPONSE_HEADERS:
            self._report(3, f" gets the header {name}: {value}")

    def notifyFinish(self) -> Deferred[None]:
        disconnected: Deferred[None] = Deferred()
        self._disconnected.append(disconnected)
        return disconnected

    def write(self, data: bytes) -> None:
        if self.outcome is not None:
            self._report(4, ": output after the end")
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
            self._report(4, " is finished with a producer or without a connection")
        self._check_response()

    # The client's side.

    def pause(self) -> None:
        """Stop reading."""
        if self._producer is not None:
            self._producer.pauseProducing()

    def resume(self) -> None:
        """Continue reading."""
        if self._producer is not None:
            self._producer.resumeProducing()

    def disconnect(self) -> None:
        """Close the connection: Klein cancels the handler, Twisted calls `notifyFinish` errbacks."""
        if self.outcome is None:
            self._world.log("disconnects", self.script.request)
            self.channel = None
            self._end("client-disconnected")
            self.handling.cancel()
            for disconnected in self._disconnected:
                disconnected.addErrback(lambda failure: failure.trap(ConnectionLost, CancelledError) and None)
                if not disconnected.called:
                    disconnected.errback(Failure(ConnectionLost()))

    def lose_coordinator(self) -> None:
        """Handle a crash of the coordinator."""
        if self.outcome is None:
            self._end("coordinator-lost")

    def _end(self, outcome: str) -> None:
        if self.outcome is not None:
            self._report(4, f" ends twice: {self.outcome}, {outcome}")
        self._world.log("ends", self.script.request, outcome)
        self._world.outcomes[outcome.split(maxsplit=1)[0]] += 1
        self.outcome = outcome
        self.ended_at = self._world.clock.now
        self.node.on_request_ended(self)
        self._check_duration()

    def _check_duration(self) -> None:
        settings = self.node.settings
        seconds = self.node.clock.seconds() - self.sent_at
        limit = settings.max_wait + settings.max_req_time + 0.001
        if seconds > limit and self.pauses == self.node.clock.pauses:
            self._report(10, f" took {seconds:.3f} s: {self.outcome}")

    def _check_retry_after(self, seconds: str) -> None:
        settings = self.node.settings
        if not 1 <= int(seconds) <= ceil(settings.max_wait + settings.max_req_time):
            self._report(21, f" gets Retry-After: {seconds}")

    def _check_response(self) -> None:
        """Check that the output is complete and this run's, and that the exit is the script's or forced."""
        body = b"".join(self._body).decode()
        if self._raw:
            match = re.fullmatch(r"(.*)\nexit: (\d+)(?: ([a-z-]+))?\n", body, re.DOTALL)
            exit_ = formats.Exit(int(match[2]), reason=match[3]) if match else None
            text = match[1] if match else ""
        else:
            exit_, text = self._parse_events(body)
        self._end(f"exit {exit_.code} {exit_.reason}" if exit_ else "no exit")
        if exit_ is None:
            self._report(4, f" ends without an exit: {body[-200:]!r}")
            return
        script = self.script
        lines = text.splitlines()
        if exit_.reason == "output-limit":
            del lines[-1:]  # truncated at the limit
        if script.behavior != "floods" and not self._is_own_output(lines):
            self._report(3, f" got {lines[:3]}")
        is_whole = exit_.reason is None and script.behavior not in ("two-exits", "malformed-events")
        if is_whole and (exit_.code != script.code or len(lines) < script.lines):
            self._report(4, f": {len(lines)} lines, {exit_}")
        if exit_.reason is None and script.behavior in _NO_CLEAN_EXIT:
            self._report(3, f": {script.behavior} ends with {exit_}")
        if exit_.reason == "worker-lost" and not self._world.may_lose_workers(self):
            self._report(4, " lost a worker that had no fault")

    def _parse_events(self, body: str) -> tuple[formats.Exit | None, str]:
        *blocks, rest = [block for block in body.split("\n\n") if not block.startswith(":")]
        events = [match.groups() for block in blocks if (match := _EVENT.fullmatch(block))]
        if rest or len(events) != len(blocks) or [name for name, _ in events].count("exit") != 1:
            return None, ""
        name, data = events.pop()
        exit_ = formats.Exit.from_json(data.encode()) if name == "exit" else None
        return exit_, "".join(formats.decode_json(data.encode()) for _, data in events)

    def _is_own_output(self, lines: list[str]) -> bool:
        boots = set()
        for number, line in enumerate(lines, 1):
            match = _LINE.fullmatch(line)
            if match is None or (match[3], int(match[4])) != (self.script.request, number):
                return self._raw and self.script.behavior in ("malformed-events", "two-exits")
            boots.add((match[1], match[2]))
        return not boots or (len(boots) == 1 and next(iter(boots))[0] == self.machine_id)
