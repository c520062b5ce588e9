"""One run's answer to one client: what is written, and that nothing is after its end."""

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
    """What the client's pace drives."""

    def __init__(self) -> None:
        self.stopped = 0

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        self.stopped += 1


class AnswerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.transport = StringTransport()
        self.script = Script()
        test = self

        class Page(Resource):
            isLeaf = True

            def render(self, request: Request) -> int:
                test.answer = RunResponse(request, Format.EVENTS, test.clock)
                return NOT_DONE_YET

        self.channel = Site(Page(), reactor=self.clock).buildProtocol(None)
        self.channel.makeConnection(self.transport)
        self.channel.dataReceived(b"GET / HTTP/1.0\r\n\r\n")

    answer: RunResponse

    def body(self) -> bytes:
        written: bytes = self.transport.value()
        return written.partition(b"\r\n\r\n")[2]

    def test_the_head_is_sent_at_once_then_what_comes_then_the_exit(self) -> None:
        self.answer.start(self.script, {"Worker": "m1"})
        self.assertIn(b"\r\nWorker: m1\r\n", self.transport.value())
        self.assertEqual((0.0, None), (self.answer.started_at, self.answer.first_byte_at))
        self.clock.advance(2)
        self.answer.output(Stream.STDOUT, b"hello")
        self.answer.end(Exit(0))

        events = b'event: stdout\ndata: "hello"\n\nevent: exit\ndata: {"code": 0}\n\n'
        self.assertEqual(events, self.body())
        self.assertEqual((2.0, len(events)), (self.answer.first_byte_at, self.answer.bytes_written))

    def test_a_heartbeat_is_nobodys_first_byte(self) -> None:
        self.answer.start(self.script, {})
        self.clock.advance(HEARTBEAT_INTERVAL)
        self.assertEqual(b": \n\n", self.body())
        self.assertIsNone(self.answer.first_byte_at)
        self.answer.close()

    def test_nothing_is_written_after_its_end(self) -> None:
        self.answer.start(self.script, {})
        self.answer.end(Exit(3))
        before = self.transport.value()
        self.answer.output(Stream.STDOUT, b"late")
        self.answer.end(Exit(4))
        self.answer.finish()
        self.clock.advance(3 * HEARTBEAT_INTERVAL)

        self.assertEqual(before, self.transport.value())
        self.assertEqual([], [call for call in self.clock.getDelayedCalls() if "_heartbeat" in repr(call)])

    def test_a_client_that_has_gone_ends_it(self) -> None:
        self.answer.start(self.script, {})
        self.channel.connectionLost(Failure(ConnectionDone()))
        self.assertTrue(self.answer.closed)
        self.answer.output(Stream.STDERR, b"late")
        self.answer.end(Exit(0))

        self.assertEqual(b"", self.body())

    def test_one_that_is_closed_before_it_begins_stops_its_script(self) -> None:
        self.answer.close()
        self.answer.start(self.script, {})
        self.assertEqual((1, b""), (self.script.stopped, self.transport.value()))
