from __future__ import annotations

import gc
import weakref
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


class NonReadingServer(Peer):
    """Sends data at once and does not read."""

    data = b""

    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        self.transport.write(self.data)


class AgentTests(LoopbackTestCase):
    def setUp(self) -> None:
        self.agent = single_use_agent(reactor)

    async def send_large_request(self, data: bytes) -> tuple[Deferred[Any], NonReadingServer]:
        """Send a large request to a server that does not read; return the pending response and the server."""
        peer = NonReadingServer()
        peer.data = data
        port = self.listen(Factory.forProtocol(lambda: peer))
        response = Deferred.fromCoroutine(
            send_request(self.agent, "POST", f"http://127.0.0.1:{port}", "/", None, LARGE)
        )
        await wait_until(lambda: peer.connected)
        return response, peer

    async def test_a_connection_whose_response_is_read_needs_no_garbage_collector(self) -> None:
        _, url = self.serve_script([OK + b"Content-Length: 4\r\n\r\nbody"])
        gc.disable()
        self.addCleanup(gc.enable)
        response: Any = await send_request(self.agent, "GET", url, "/")
        connection = weakref.ref(response.original._connection)
        self.assertEqual(b"body", await read_body(response, 10))
        del response
        await wait_until(lambda: connection() is None)

    async def test_connection_and_framing_headers_are_replaced(self) -> None:
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

    def test_invalid_requests_raise_value_error_unsent(self) -> None:
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

    async def test_response_to_head_has_no_body(self) -> None:
        _, url = self.serve_script([OK + b"Content-Length: 1000\r\n\r\n"])
        response = await self.agent.request(b"HEAD", url.encode())
        self.assertEqual((1000, b""), (response.length, await read_body(response, 0)))

    async def test_body_is_not_read_before_deliver_body(self) -> None:
        sent = 0

        def script() -> Iterator[bytes]:
            nonlocal sent
            yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
            for sent in range(1, 401):  # noqa: B007 - read by the test
                yield chunk(PIECE)
            yield LAST_CHUNK

        _, url = self.serve_script(script())
        response = await self.agent.request(b"GET", url.encode())
        before = -1
        while before < sent:
            before = sent
            await deferLater(reactor, 0.2)
        self.assertLess(sent, 300)
        received = 0

        def take(data: bytes) -> None:
            nonlocal received
            received += len(data)

        body = BodyReceiver(take)
        response.deliverBody(body)
        await body.done
        self.assertEqual(400 * len(PIECE), received)

    async def test_complete_response_aborts_an_unsent_request(self) -> None:
        response, peer = await self.send_large_request(OK + b"Content-Length: 4\r\n\r\nbody")
        self.assertEqual(b"body", await read_body(await response, 4))
        await self.assert_aborted(peer)

    async def test_malformed_response_aborts_an_unsent_request(self) -> None:
        response, peer = await self.send_large_request(b"nonsense\r\n")
        with self.assertRaises(MalformedResponseError):
            await response
        await self.assert_aborted(peer)

    async def test_cancelling_aborts_an_unsent_request(self) -> None:
        for data in (b"", OK + b"Content-Length: 4\r\n\r\nbo"):
            response, peer = await self.send_large_request(data)
            reading = response.addCallback(lambda response: Deferred.fromCoroutine(read_body(response, 4)))
            await deferLater(reactor, 0.05)
            self.assertNoResult(reading)
            reading.cancel()
            self.failureResultOf(reading, CancelledError)
            await self.assert_aborted(peer)

    async def assert_aborted(self, peer: NonReadingServer) -> None:
        peer.transport.resumeProducing()
        await peer.receive_all()
        self.assertLess(len(peer.received), len(LARGE))
