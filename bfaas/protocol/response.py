"""
One run, written to one client: a head, output as it comes, then exactly one exit.

What a worker writes to the coordinator and what the coordinator writes to its client are the same thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfaas.protocol import formats

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
    from twisted.python.failure import Failure
    from twisted.web.server import Request


class RunResponse:
    """
    The answer to one `POST /run`.

    After `close` (or `end`, which closes) nothing more is written, no timer runs and no producer is
    registered; both are right at any time and more than once. A client that has gone away closes it too.
    """

    def __init__(self, request: Request, format_: formats.Format, clock: IReactorTime) -> None:
        self._request = request
        self._format = format_
        self._clock = clock
        self._writer = formats.run_writer(format_)
        self._last_write = 0.0
        self._heartbeat_timer: IDelayedCall | None = None
        self._producing = False
        self.started_at: float | None = None
        self.first_byte_at: float | None = None
        self.closed = False
        self.bytes_written = 0
        request.notifyFinish().addErrback(self._on_disconnect)

    @property
    def started(self) -> bool:
        """Whether its head is sent: from then on an error can only be an exit."""
        return self.started_at is not None

    def start(self, producer: IPushProducer, headers: dict[str, str]) -> None:
        """Send the head at once; from here on the client's pace is the producer's."""
        if self.closed:
            producer.stopProducing()
            return
        self.started_at = self._clock.seconds()
        request = self._request
        request.setHeader("Content-Type", self._format.value)
        request.setHeader("Cache-Control", "no-store, no-transform")
        request.setHeader("X-Accel-Buffering", "no")
        request.setHeader("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            request.setHeader(name, value)
        request.write(b"")
        self._producing = True
        request.registerProducer(producer, True)
        if self._format in formats.HEARTBEATS:
            self._last_write = self._clock.seconds()
            self._heartbeat_timer = self._clock.callLater(formats.KEEPALIVE, self._keep_alive)

    def output(self, stream: formats.Stream, data: bytes) -> None:
        """Write a piece of a script's output."""
        self.write(self._writer.output(stream, data))

    def write(self, data: bytes) -> None:
        """Write a piece that is in the answer's format already."""
        if data and not self.closed:
            if self.first_byte_at is None:
                self.first_byte_at = self._clock.seconds()
            self._write(data)

    def end(self, exit_: formats.Exit) -> None:
        """Write the exit, and finish."""
        self.write(self._writer.end(exit_))
        self.finish()

    def finish(self) -> None:
        """Finish an answer whose exit is written."""
        if not self.closed:
            self.close()
            self._request.finish()

    def close(self) -> None:
        """Let go of the request, without a word to the client."""
        self.closed = True
        if self._heartbeat_timer is not None and self._heartbeat_timer.active():
            self._heartbeat_timer.cancel()
        if self._producing:
            self._producing = False
            # A lost request has no channel to unregister from.
            if self._request.channel is not None:
                self._request.unregisterProducer()

    def _write(self, data: bytes) -> None:
        self._last_write = self._clock.seconds()
        self.bytes_written += len(data)
        self._request.write(data)

    def _on_disconnect(self, _: Failure) -> None:
        self.close()

    def _keep_alive(self) -> None:
        silent = self._clock.seconds() - self._last_write
        if silent >= formats.KEEPALIVE:
            self._write(formats.HEARTBEATS[self._format])
            silent = 0.0
        self._heartbeat_timer = self._clock.callLater(formats.KEEPALIVE - silent, self._keep_alive)
