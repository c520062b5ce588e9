"""
The streamed response to `POST /run`: a head, output as it arrives, then exactly one exit.

The worker's response to the coordinator and the coordinator's response to its client have the same form.
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
    The response to one `POST /run`.

    After `close` (or `end`, which closes) nothing more is written, no timer runs and no producer is
    registered; both may be called at any time and repeatedly. The response also closes when the client
    disconnects.
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
        """Whether the head is sent: from then on an error can only be reported as an exit."""
        return self.started_at is not None

    def start(self, producer: IPushProducer, headers: dict[str, str]) -> None:
        """Send the head; from now on, the producer is paused while the client reads slowly."""
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
            self._heartbeat_timer = self._clock.callLater(formats.HEARTBEAT_INTERVAL, self._heartbeat)

    def output(self, stream: formats.Stream, data: bytes) -> None:
        """Write a piece of the script's output."""
        self.write(self._writer.output(stream, data))

    def flush_output(self) -> None:
        """Write incomplete characters at the end of the output, after which no more output follows."""
        self.write(self._writer.flush())

    def file(self, piece: formats.FilePiece) -> None:
        """Write a piece of a file, which the response's format must support."""
        self.write(formats.write_file(self._format, piece))

    def write(self, data: bytes) -> None:
        """Write data that is already in the response's format."""
        if data and not self.closed:
            if self.first_byte_at is None:
                self.first_byte_at = self._clock.seconds()
            self._write(data)

    def end(self, exit_: formats.Exit) -> None:
        """Write the exit and finish the response."""
        self.write(self._writer.end(exit_))
        self.finish()

    def finish(self) -> None:
        """Finish a response whose exit is written."""
        if not self.closed:
            self.close()
            self._request.finish()

    def close(self) -> None:
        """Stop writing, without an exit."""
        self.closed = True
        if self._heartbeat_timer is not None and self._heartbeat_timer.active():
            self._heartbeat_timer.cancel()
        if self._producing:
            self._producing = False
            # After a disconnect, the request has no channel to unregister from.
            if self._request.channel is not None:
                self._request.unregisterProducer()

    def _write(self, data: bytes) -> None:
        self._last_write = self._clock.seconds()
        self.bytes_written += len(data)
        self._request.write(data)

    def _on_disconnect(self, _: Failure) -> None:
        self.close()

    def _heartbeat(self) -> None:
        """Write a heartbeat after an interval without output; schedule the next check."""
        idle = self._clock.seconds() - self._last_write
        if idle >= formats.HEARTBEAT_INTERVAL:
            self._write(formats.HEARTBEATS[self._format])
            idle = 0.0
        self._heartbeat_timer = self._clock.callLater(formats.HEARTBEAT_INTERVAL - idle, self._heartbeat)
