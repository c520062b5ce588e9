"""
Plain Twisted servers, the baselines of `stream` and `streams`. Run as a program.

`/SIZE` responds with so many zeros from memory, `/pipe/SIZE` with those that `head` writes into a pipe,
`/open` with a line and no end. With `--relay PORT`, it is a TCP relay to that port instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.strports import service as listening
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import globalLogBeginner
from twisted.protocols.portforward import ProxyFactory
from twisted.python.usage import Options as UsageOptions
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

if TYPE_CHECKING:
    from twisted.python.failure import Failure
    from twisted.web.server import Request

_CHUNK = bytes(64 * 1024)


@implementer(IPullProducer)
class _Zeros:
    """Writes a chunk whenever the last one has been sent."""

    def __init__(self, request: Request, size: int) -> None:
        self._request = request
        self._remaining = size

    def resumeProducing(self) -> None:
        """Write a chunk."""
        chunk = _CHUNK[: self._remaining]
        self._remaining -= len(chunk)
        self._request.write(chunk)
        if not self._remaining:
            self._request.unregisterProducer()
            self._request.finish()

    def stopProducing(self) -> None:
        """Stop: the client has disconnected."""
        self._remaining = 0


@implementer(IPushProducer)
class _Pipe(ProcessProtocol):
    """Forwards the output of a process."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: ARG002 - there is one
        """Forward a chunk."""
        self._request.write(data)

    def processEnded(self, reason: Failure) -> None:  # noqa: ARG002 - the size shows a failure
        """End the response."""
        self._request.unregisterProducer()
        self._request.finish()

    def pauseProducing(self) -> None:
        """Stop reading from the pipe."""
        self.transport.pauseProducing()  # type: ignore[union-attr]

    def resumeProducing(self) -> None:
        """Continue reading."""
        self.transport.resumeProducing()  # type: ignore[union-attr]

    def stopProducing(self) -> None:
        """Kill the process: the client has disconnected."""
        self.transport.signalProcess("KILL")  # type: ignore[union-attr]


class PlainServer(Resource):
    """Serves the paths above."""

    isLeaf = True

    def __init__(self, reactor: Any) -> None:
        super().__init__()
        self._reactor = reactor

    def render(self, request: Request) -> Any:
        """Start the response."""
        *kind, last = request.path.strip(b"/").split(b"/")
        if last == b"open":
            request.write(b"hello\n")
        elif kind:
            head = ["head", "-c", last.decode(), "/dev/zero"]
            pipe = _Pipe(request)
            self._reactor.spawnProcess(pipe, "head", head, env=None, childFDs={1: "r"})
            request.registerProducer(pipe, streaming=True)
        else:
            request.registerProducer(_Zeros(request, int(last)), streaming=False)
        return NOT_DONE_YET


class Options(UsageOptions):
    """The endpoint, and the port to relay to, if any."""

    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint."],
        ["relay", "r", None, "Port to relay to.", int],
    ]


def main() -> None:
    """Serve until SIGTERM."""
    from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False)
    options = Options()
    options.parseOptions()
    relay = options["relay"]
    factory = ProxyFactory("127.0.0.1", relay) if relay else Site(PlainServer(reactor), reactor=reactor)
    listening(options["listen"], factory, reactor).startService()
    reactor.run()


if __name__ == "__main__":
    main()
