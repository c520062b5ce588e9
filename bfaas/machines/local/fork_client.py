"""Starts workers by asking a fork server for them (`bfaas.worker.fork_server`), which this module runs."""

from __future__ import annotations

import json
import socket
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from zope.interface import implementer

from bfaas.machines.local.host import worker_environment
from bfaas.system.confinement import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from twisted.internet.interfaces import IProcessTransport
    from twisted.python.failure import Failure

_MAX_MESSAGE = 4096  # bytes


class ForkServerError(OSError):
    """The fork server has not forked a worker. The message is the reason, in one line."""


@implementer(IReadDescriptor)
class ForkServer(ProcessProtocol):
    """
    A fork server as a child process. If it ends, so do its workers; see `alive`.

    `ended(pid, status)` is called when a worker has ended, and for each worker when the server has ended,
    with None as the status. A worker's pid is not assigned again before `reap`.
    """

    transport: IProcessTransport
    _log = Logger()

    def __init__(
        self, reactor: Any, command: Sequence[str], ended: Callable[[int, int | None], None]
    ) -> None:
        self._reactor = reactor
        self._on_ended = ended
        self._requests: deque[Deferred[int]] = deque()
        self._workers: set[int] = set()
        self._last_lines: deque[str] = deque(maxlen=20)
        self._stopped: Deferred[None] | None = None
        self.alive = True
        self._connection, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setblocking(False)
        # setsid keeps a terminal's Ctrl-C from the server. setpriv sets the signal that it receives when this
        # process dies, even if it is stopped then.
        prefix = [find_program("setsid"), find_program("setpriv"), "--pdeathsig", "KILL", "--"]
        words = [*prefix, *command]
        try:
            reactor.spawnProcess(
                self, words[0], words, env=worker_environment(), childFDs={0: remote.fileno(), 1: "r", 2: "r"}
            )
        except OSError:
            self._connection.close()
            raise
        finally:
            remote.close()
        reactor.addReader(self)

    @property
    def pid(self) -> int | None:
        """The server's pid; None after its end."""
        pid: int | None = self.transport.pid
        return pid

    def fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        death_signal: int,
        channel: socket.socket,
    ) -> Deferred[int]:
        """
        Fork a worker with a channel as its standard input and outputs; return its pid.

        It runs in a session of its own. It receives `death_signal` when the server dies. Raises `OSError` or
        fails with `ForkServerError`. After a cancellation the worker may still be forked: close the other end
        of the channel, so that it sees the end of its input.
        """
        request = {"arguments": arguments, "environment": environment, "death_signal": death_signal}
        socket.send_fds(self._connection, [json.dumps(request).encode()], [channel.fileno()])
        response: Deferred[int] = Deferred()
        self._requests.append(response)
        return response

    def reap(self, pid: int) -> None:
        """Release the pid of a worker that has ended. It must not be used any more."""
        with suppress(OSError):  # the server has ended, and with it its children
            self._connection.send(json.dumps({"reap": pid}).encode())

    async def stop(self) -> None:
        """Kill the server, and wait until it has ended."""
        if self.alive:
            self._stopped = Deferred()
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess("KILL")
            await self._stopped

    # The connection to the server.

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return self._connection.fileno()

    def logPrefix(self) -> str:
        """Return a name for Twisted's log."""
        return "fork server"

    def doRead(self) -> None:
        """Handle a message. The reactor calls this again if there are more."""
        try:
            message = self._connection.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        except ConnectionResetError:  # the server has ended without reading everything
            message = b""
        if message:
            self._handle(json.loads(message))
        else:
            self._disconnect()

    def connectionLost(self, reason: Failure) -> None:  # noqa: ARG002 - the interface's signature
        """Close the connection. The reactor calls this when it stops, or after an error."""
        self._disconnect()

    def _disconnect(self) -> None:
        self._reactor.removeReader(self)
        self._connection.close()

    def _handle(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._workers.discard(message["ended"])
            self._on_ended(message["ended"], message["status"])
        elif "pid" in message:
            self._workers.add(message["pid"])
            self._requests.popleft().callback(message["pid"])
        else:
            self._requests.popleft().errback(ForkServerError(message["error"]))

    # The process of the server.

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: ARG002 - both outputs are kept
        """Keep the last lines."""
        self._last_lines.extend(data.decode("utf-8", "replace").splitlines())

    def processEnded(self, reason: Failure) -> None:
        """Report the end of the server and of its workers."""
        self.alive = False
        self._disconnect()
        lines = "\n".join(self._last_lines)
        if self._stopped is None:
            status = getattr(reason.value, "exitCode", None)
            self._log.warn("the fork server ended with {status}: {lines}", status=status, lines=lines)
        while self._requests:
            self._requests.popleft().errback(ForkServerError(f"the fork server has ended: {lines}"))
        for pid in list(self._workers):
            self._on_ended(pid, None)
        if self._stopped is not None:
            self._stopped.callback(None)
