from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH

from bfaas.http.client import BodyReceiver, BytesProducer, read_body, send_request, single_use_agent
from bfaas.http.response_parser import MalformedResponseError
from tests.support.hostile_worker import LAST_CHUNK, LoopbackTestCase, Peer, chunk, reactor
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

OK = b"HTTP/1.1 200 OK\r\n"
PIECE = b"x" * 65536
LARGE = b"y" * (32 << 20)


class Deaf(Peer):
    """Does not listen, but speaks at once."""

    says = b""

    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        self.transport.write(self.says)


class AgentTests(LoopbackTestCase):
    def setUp(self) -> None:
        self.agent = single_use_agent(reactor)

    async def deaf(self, says: bytes) -> tuple[Deferred[Any], Deaf]:
        """Send a large request to a server that does not listen: its answer, and the server."""
        peer = Deaf()
        peer.says = says
        port = self.listen(Factory.forProtocol(lambda: peer))
        answer = Deferred.fromCoroutine(
            send_request(self.agent, "POST", f"http://127.0.0.1:{port}", "/", None, LARGE)
        )
        await wait_until(lambda: peer.connected)
        return answer, peer

    async def test_a_request_is_written_from_scratch(self) -> None:
        server, url = self.serve_script([OK + b"Content-Length: 0\r\n\r\n"])
        headers = Headers(
            {
                "Host": ["elsewhere"],
                "Connection": ["keep-alive, worker"],
                "Accept-Encoding": ["gzip"],
                "Content-Length": ["1"],
                "Transfer-Encoding": ["chunked"],
                "Worker": ["w"],
            }
        )
        before = list(headers.getAllRawHeaders())
        await self.agent.request(b"POST", f"{url}/a?b=c".encode(), headers, BytesProducer(b"body"))
        lines, body = server.peers[0].request() or ([], b"")
        expected = [
            "POST /a?b=c HTTP/1.1",
            "Accept-Encoding: identity",
            "Connection: close",
            "Content-Length: 4",
            f"Host: {url.removeprefix('http://')}",
            "Worker: w",
        ]
        self.assertEqual((expected, b"body"), ([lines[0], *sorted(lines[1:])], body))
        self.assertEqual(before, list(headers.getAllRawHeaders()))

    def test_what_cannot_be_written_is_not_sent(self) -> None:
        server, url = self.serve_script([])
        endless: Any = BytesProducer(b"")
        endless.length = UNKNOWN_LENGTH
        for method, path, body in (
            (b"GET / HTTP/1.1\r\nX:", b"/", None),
            (b"get", b"/", None),
            (b"", b"/", None),
            (b"GET", b"/a b", None),
            (b"GET", b"/\r\nX: y", None),
            (b"GET", "/\u20ac".encode(), None),
            (b"POST", b"/", endless),
        ):
            with self.assertRaises(ValueError):
                self.agent.request(method, url.encode() + path, None, body)
        self.assertEqual([], server.peers)

    async def test_a_head_is_all_that_comes_where_only_that_is_asked_for(self) -> None:
        _, url = self.serve_script([OK + b"Content-Length: 1000\r\n\r\n"])
        response = await self.agent.request(b"HEAD", url.encode())
        self.assertEqual((1000, b""), (response.length, await read_body(response, 0)))

    async def test_a_body_is_not_read_before_it_is_asked_for(self) -> None:
        said = 0

        def script() -> Iterator[bytes]:
            nonlocal said
            yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
            for said in range(1, 401):  # noqa: B007 - told to the test as it goes
                yield chunk(PIECE)
            yield LAST_CHUNK

        _, url = self.serve_script(script())
        response = await self.agent.request(b"GET", url.encode())
        before = -1
        while before < said:
            before = said
            await deferLater(reactor, 0.2)
        self.assertLess(said, 300)
        received = 0

        def take(data: bytes) -> None:
            nonlocal received
            received += len(data)

        body = BodyReceiver(take)
        response.deliverBody(body)
        await body.done
        self.assertEqual(400 * len(PIECE), received)

    async def test_an_answer_ends_the_request_whatever_of_it_is_unsent(self) -> None:
        answer, peer = await self.deaf(OK + b"Content-Length: 4\r\n\r\nbody")
        self.assertEqual(b"body", await read_body(await answer, 4))
        await self.assert_cut_off(peer)

    async def test_an_answer_that_is_none_ends_it_too(self) -> None:
        answer, peer = await self.deaf(b"nonsense\r\n")
        with self.assertRaises(MalformedResponseError):
            await answer
        await self.assert_cut_off(peer)

    async def test_cancelling_ends_it_whatever_of_it_is_unsent(self) -> None:
        for says in (b"", OK + b"Content-Length: 4\r\n\r\nbo"):
            answer, peer = await self.deaf(says)
            reading = answer.addCallback(lambda response: Deferred.fromCoroutine(read_body(response, 4)))
            await deferLater(reactor, 0.05)
            self.assertNoResult(reading)
            reading.cancel()
            self.failureResultOf(reading, CancelledError)
            await self.assert_cut_off(peer)

    async def assert_cut_off(self, peer: Deaf) -> None:
        peer.transport.resumeProducing()
        await peer.receive_all()
        self.assertLess(len(peer.received), len(LARGE))
