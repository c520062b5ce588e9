"""The streamed response to a run: what is written, and when nothing more is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

from bfaas.protocol.formats import HEARTBEAT_INTERVAL, Exit, Format, Stream
from bfaas.protocol.response import RunResponse

if TYPE_CHECKING:
    from twisted.web.server import Request


@implementer(IPushProducer)
class Script:
    """A producer that counts stops."""

    def __init__(self) -> None:
        self.stopped = 0

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        self.stopped += 1


class RunResponseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.transport = StringTransport()
        self.script = Script()
        test = self

        class Page(Resource):
            isLeaf = True

            def render(self, request: Request) -> int:
                test.response = RunResponse(request, Format.EVENTS, test.clock)
                return NOT_DONE_YET

        self.channel = Site(Page(), reactor=self.clock).buildProtocol(None)
        self.channel.makeConnection(self.transport)
        self.channel.dataReceived(b"GET / HTTP/1.0\r\n\r\n")

    response: RunResponse

    def body(self) -> bytes:
        written: bytes = self.transport.value()
        return written.partition(b"\r\n\r\n")[2]

    def test_head_output_and_exit_are_sent_in_order(self) -> None:
        self.response.start(self.script, {"Worker": "m1"})
        self.assertIn(b"\r\nWorker: m1\r\n", self.transport.value())
        self.assertEqual((0.0, None), (self.response.started_at, self.response.first_byte_at))
        self.clock.advance(2)
        self.response.output(Stream.STDOUT, b"hello")
        self.response.end(Exit(0))

        events = b'event: stdout\ndata: "hello"\n\nevent: exit\ndata: {"code": 0}\n\n'
        self.assertEqual(events, self.body())
        self.assertEqual((2.0, len(events)), (self.response.first_byte_at, self.response.bytes_written))

    def test_heartbeat_does_not_count_as_first_byte(self) -> None:
        self.response.start(self.script, {})
        self.clock.advance(HEARTBEAT_INTERVAL)
        self.assertEqual(b": \n\n", self.body())
        self.assertIsNone(self.response.first_byte_at)
        self.response.close()

    def test_nothing_is_written_after_the_end(self) -> None:
        self.response.start(self.script, {})
        self.response.end(Exit(3))
        before = self.transport.value()
        self.response.output(Stream.STDOUT, b"late")
        self.response.end(Exit(4))
        self.response.finish()
        self.clock.advance(3 * HEARTBEAT_INTERVAL)

        self.assertEqual(before, self.transport.value())
        self.assertEqual([], [call for call in self.clock.getDelayedCalls() if "_heartbeat" in repr(call)])

    def test_disconnect_closes_the_response(self) -> None:
        self.response.start(self.script, {})
        self.channel.connectionLost(Failure(ConnectionDone()))
        self.assertTrue(self.response.closed)
        self.response.output(Stream.STDERR, b"late")
        self.response.end(Exit(0))

        self.assertEqual(b"", self.body())

    def test_start_after_close_stops_the_producer(self) -> None:
        self.response.close()
        self.response.start(self.script, {})
        self.assertEqual((1, b""), (self.script.stopped, self.transport.value()))
