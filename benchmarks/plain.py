"""
Plain Twisted servers, the baselines of streams. Run as a program.

`/SIZE` is answered with so many zeros from memory, `/pipe/SIZE` with those that `head` writes into a pipe,
`/open` with a word and then nothing for ever. With `--relay PORT`, what is on that port is passed on.
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

_PIECE = bytes(64 * 1024)


@implementer(IPullProducer)
class _Zeros:
    """Writes a piece whenever the one before has gone to the socket."""

    def __init__(self, request: Request, size: int) -> None:
        self._request = request
        self._left = size

    def resumeProducing(self) -> None:
        """Write a piece."""
        piece = _PIECE[: self._left]
        self._left -= len(piece)
        self._request.write(piece)
        if not self._left:
            self._request.unregisterProducer()
            self._request.finish()

    def stopProducing(self) -> None:
        """Nobody reads any more."""
        self._left = 0


@implementer(IPushProducer)
class _Pipe(ProcessProtocol):
    """Passes on what a process writes."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: ARG002 - there is one
        """Pass a piece on."""
        self._request.write(data)

    def processEnded(self, reason: Failure) -> None:  # noqa: ARG002 - it is told by what has come
        """End the answer."""
        self._request.unregisterProducer()
        self._request.finish()

    def pauseProducing(self) -> None:
        """Leave it in the pipe."""
        self.transport.pauseProducing()  # type: ignore[union-attr]

    def resumeProducing(self) -> None:
        """Read on."""
        self.transport.resumeProducing()  # type: ignore[union-attr]

    def stopProducing(self) -> None:
        """Nobody reads any more."""
        self.transport.signalProcess("KILL")  # type: ignore[union-attr]


class Plain(Resource):
    """The paths above."""

    isLeaf = True

    def __init__(self, reactor: Any) -> None:
        super().__init__()
        self._reactor = reactor

    def render(self, request: Request) -> Any:
        """Begin to answer."""
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
    """Where to listen, and what for."""

    optParameters: ClassVar = [["listen", "l", None, "Endpoint."], ["relay", "r", None, "Port.", int]]


def main() -> None:
    """Serve until SIGTERM."""
    from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False)
    options = Options()
    options.parseOptions()
    relay = options["relay"]
    factory = ProxyFactory("127.0.0.1", relay) if relay else Site(Plain(reactor), reactor=reactor)
    listening(options["listen"], factory, reactor).startService()
    reactor.run()


if __name__ == "__main__":
    main()
