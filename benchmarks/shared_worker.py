"""
The Machines API over emulated machines, and one worker that serves requests for all of them.

Machines boot and stop at once, and the worker is always ready and runs nothing: it costs the coordinator what
any worker does, and next to nothing itself. It responds by the first word of a script:

- `true`: the run ends at once.
- `echo`: a line of output; the run ends a few ms later.
- `sleep`: a line of output, then silence until the coordinator disconnects.
- `lines`: ten lines per second until then, each with the time on the monotonic clock, which all processes
  of a host share.

Run as a program.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import MultiService
from twisted.application.strports import service as listening
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import LoopingCall
from twisted.web.http import datetimeToString

from bfaas.http.server import BoundedSite
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines
from bfaas.protocol import formats
from bfaas.system.runtime import RoleOptions, configure_reactor, run_service

if TYPE_CHECKING:
    from twisted.application.service import IService
    from twisted.python.failure import Failure

LINE_INTERVAL = 0.1
"""Seconds between two lines of a run of `lines`."""

_EXIT_DELAY = 0.003
"""Seconds after which a run of `echo` ends, so that its output is sent before its exit."""

_MAX_BODY = 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)
_MACHINE = re.compile(rb"\r\n%b: *([^\r]*)\r\n" % formats.FORCE_INSTANCE.encode(), re.IGNORECASE)


class Worker(Protocol):
    """One connection to the worker for all machines: it names the machine of the request in its response."""

    transport: Any

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._received = b""
        self._writer = formats.run_writer(formats.Format.EVENTS)
        self._lines = LoopingCall(self._write_line)
        self._lines.clock = reactor

    def dataReceived(self, data: bytes) -> None:
        """Respond to the request once it is complete."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        machine = _MACHINE.search(head + b"\r\n")
        names = (machine[1] if machine else b"", datetimeToString())
        if head.startswith(b"GET "):
            self._write(b"HTTP/1.1 200 OK\r\nWorker: %b\r\nDate: %b\r\nContent-Length: 3\r\n\r\nok\n" % names)
            self.transport.loseConnection()
            return
        self._write(
            b"HTTP/1.1 200 OK\r\nWorker: %b\r\nDate: %b\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" % names
        )
        word = body.split()[0]
        if word == b"lines":
            self._lines.start(LINE_INTERVAL)
        elif word == b"true":
            self._end()
        else:
            self._write_chunk(self._writer.output(formats.Stream.STDOUT, b"hello\n"))
            if word == b"echo":
                self._reactor.callLater(_EXIT_DELAY, self._end)

    def _end(self) -> None:
        self._write_chunk(self._writer.end(formats.Exit(0)))
        self._write(b"0\r\n\r\n")
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]  # noqa: ARG002
        """End a run of `lines`."""
        if self._lines.running:
            self._lines.stop()

    def _write(self, data: bytes) -> None:
        self.transport.write(data)

    def _write_line(self) -> None:
        self._write_chunk(self._writer.output(formats.Stream.STDOUT, b"%.6f\n" % time.monotonic()))

    def _write_chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


class Options(RoleOptions):
    """The endpoints."""

    role = "shared_worker"
    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint of the Machines API."],
        ["workers", "w", None, "Endpoint of the worker."],
    ]


def make_service(options: Options, reactor: Any) -> IService:
    """Compose the service."""
    configure_reactor(reactor)
    service = MultiService()
    api = MachinesServer(EmulatedMachines(reactor, time.time), "workers", None)
    site = BoundedSite(reactor, api.app.resource(), _MAX_BODY)
    workers = Factory.forProtocol(lambda: Worker(reactor))
    workers.noisy = False
    for endpoint, factory in ((options["listen"], site), (options["workers"], workers)):
        listening(endpoint, factory, reactor).setServiceParent(service)
    return service


if __name__ == "__main__":
    run_service(Options(), make_service)
