from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError

from bfaas.http.client import (
    BodyReceiver,
    BodyTooLargeError,
    abort_body,
    pooled_agent,
    read_body,
    send_request,
    single_use_agent,
)
from bfaas.http.endpoints import unix_path, unix_url
from bfaas.http.response_parser import MalformedResponseError
from bfaas.http.strict_agent import IncompleteResponseError
from tests.support.hostile_worker import LAST_CHUNK, End, LoopbackTestCase, ScriptedServer, chunk, reactor
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from twisted.web.iweb import IAgent

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def with_length(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


class ClientTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.agent = single_use_agent(reactor)

    def get(self, url: str) -> Deferred[Any]:
        """Send a GET request and wait for the head of its response."""
        return Deferred.fromCoroutine(send_request(self.agent, "GET", url, "/"))

    def read(self, response: Any, limit: int = 10) -> Deferred[bytes]:
        return Deferred.fromCoroutine(read_body(response, limit))


class SendTests(ClientTestCase):
    async def test_url_is_sent_unchanged_and_redirects_are_not_followed(self) -> None:
        redirect = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
        server, url = self.serve_script([redirect])
        response = await send_request(self.agent, "GET", f"{url}/", "/a%2fb%zz?c=[d]")
        self.assertEqual((302, 1), (response.code, len(server.peers)))
        lines, _ = server.peers[0].request() or ([], b"")
        self.assertEqual("GET /a%2fb%zz?c=[d] HTTP/1.1", lines[0])

    async def test_cookies_are_not_kept(self) -> None:
        server, url = self.serve_script([b"HTTP/1.1 204 No\r\nSet-Cookie: a=b\r\n\r\n"])
        for _ in range(2):
            await send_request(self.agent, "GET", url, "/")
        lines, _ = server.peers[1].request() or ([], b"")
        self.assertEqual([], [line for line in lines if line.lower().startswith("cookie:")])


class UNIXSocketTests(LoopbackTestCase):
    """Both agents, over the socket of a server of Twisted, whose path needs encoding in a URL."""

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="bfaas a:b%2F")
        self.addCleanup(shutil.rmtree, self.directory)

    async def send(self, agent: IAgent) -> list[str]:
        path = f"{self.directory}/worker.sock"
        server = ScriptedServer([with_length(2) + b"ok"])
        port = reactor.listenUNIX(path, server)
        try:
            response = await send_request(agent, "GET", unix_url(path), "/a?b")
            self.assertEqual(b"ok", await read_body(response, 10))
        finally:
            await port.stopListening()
            for peer in server.peers:
                peer.transport.loseConnection()
                await peer.receive_all()
        lines, _ = server.peers[0].request() or ([], b"")
        return lines

    async def test_path_is_decoded_and_the_host_is_local(self) -> None:
        pooled, connections = pooled_agent(reactor)
        for agent in (single_use_agent(reactor), pooled):
            lines = await self.send(agent)
            self.assertEqual("GET /a?b HTTP/1.1", lines[0])
            self.assertEqual(["host: localhost"], [line.lower() for line in lines if "ost:" in line])
        await connections.closeCachedConnections()

    async def test_missing_socket_is_a_connection_error(self) -> None:
        url = unix_url(f"{self.directory}/absent.sock")

        with self.assertRaises(ConnectError):
            await send_request(single_use_agent(reactor), "GET", url, "/")

    def test_path_survives_the_url(self) -> None:
        for path in ("/run/bfaas/a/worker.sock", "/tmp/a b:c%2F/@[::1]?#é.sock"):
            self.assertEqual(path, unix_path(unix_url(path)))


class CancelTests(ClientTestCase):
    async def test_while_connecting_makes_no_connection(self) -> None:
        server, url = self.serve_script([])
        # An IPv4 address connects directly; a bracketed host takes the path of names.
        for target in (url, url.replace("127.0.0.1", "[::1]")):
            response = self.get(target)
            response.cancel()
            self.failureResultOf(response, CancelledError)
        self.assertEqual([], server.peers)

    async def test_before_the_head_closes_the_connection(self) -> None:
        server, url = self.serve_script([], [b"HTTP/1.1 200 OK\r\nContent-"])
        for _ in range(2):
            response = self.get(url)
            peer = await server.requested.get()
            self.assertNoResult(response)
            response.cancel()
            self.failureResultOf(response, CancelledError)
            await peer.receive_all()

    async def test_in_the_body_closes_the_connection(self) -> None:
        server, url = self.serve_script([CHUNKED + chunk(b"some")])
        reading = self.read(await self.get(url))
        peer = await server.requested.get()
        await peer.send(chunk(b"more"))
        self.assertNoResult(reading)
        reading.cancel()
        self.failureResultOf(reading, CancelledError)
        await peer.receive_all()


class BodyTests(ClientTestCase):
    async def test_complete_bodies_up_to_the_limit_are_returned(self) -> None:
        responses = [
            CHUNKED + chunk(b"01234") + chunk(b"56789") + LAST_CHUNK,
            with_length(10) + b"0123456789",
            b"HTTP/1.1 100 Continue\r\n\r\n" + with_length(10) + b"0123456789 and more than was announced",
        ]
        _, url = self.serve_script(*[[response] for response in responses])
        for response in responses:
            self.assertEqual(b"0123456789", await self.read(await self.get(url)), response)

    async def test_calls_after_the_end_of_the_body_do_nothing(self) -> None:
        _, url = self.serve_script([with_length(4) + b"some"])
        received: list[bytes] = []
        body = BodyReceiver(received.append)
        (await self.get(url)).deliverBody(body)
        await body.done
        for call in (body.pause, body.resume, body.close):
            call()
        self.assertEqual(b"some", b"".join(received))

    async def test_incomplete_bodies_fail(self) -> None:
        cases = [
            (CHUNKED + chunk(b"some"), IncompleteResponseError),
            (CHUNKED + b"100\r\nsome", IncompleteResponseError),
            (CHUNKED + chunk(b"some") + b"nonsense\r\n", MalformedResponseError),
            (with_length(10) + b"some", IncompleteResponseError),
            # Without framing, the end of this body is the same as the end of its worker.
            (b"HTTP/1.1 200 OK\r\n\r\nsome", IncompleteResponseError),
        ]
        for end in End:
            _, url = self.serve_script(*[(data, end) for data, _ in cases])
            for data, error in cases:
                response = await self.get(url)
                with self.assertRaises(error, msg=data):
                    await self.read(response)

    async def test_body_over_the_limit_fails_and_closes_the_connection(self) -> None:
        server, url = self.serve_script([CHUNKED + chunk(b"0123456789")])
        reading = self.read(await self.get(url))
        peer = await server.requested.get()
        self.assertNoResult(reading)
        await peer.send(chunk(b"a"))
        with self.assertRaises(BodyTooLargeError):
            await reading
        await peer.receive_all()

    async def test_encoded_response_fails_and_closes_the_connection(self) -> None:
        server, url = self.serve_script([CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")])
        with self.assertRaises(MalformedResponseError):
            await self.get(url)
        peer = await server.requested.get()
        await peer.receive_all()

    async def test_abort_body_closes_the_connection(self) -> None:
        server, url = self.serve_script([CHUNKED], [CHUNKED + chunk(b"some")])
        for _ in range(2):
            abort_body(await self.get(url))
            peer = await server.requested.get()
            await peer.receive_all()

    async def test_abort_body_accepts_complete_responses(self) -> None:
        server, url = self.serve_script([with_length(4) + b"some"], [with_length(0)])
        for _ in range(2):
            abort_body(await self.get(url))
        await wait_until(lambda: all(peer.end for peer in server.peers))
