from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from bfaas.http.client import BodyTooLargeError, abort_body, read_body, send_request, single_use_agent
from bfaas.http.response_parser import MalformedResponseError
from bfaas.http.strict_agent import IncompleteResponseError
from tests.support.hostile_worker import LAST_CHUNK, End, LoopbackTestCase, chunk, reactor
from tests.support.waiting import wait_until

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def with_length(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


class ExchangeTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.agent = single_use_agent(reactor)

    def get(self, url: str) -> Deferred[Any]:
        """Wait for a head."""
        return Deferred.fromCoroutine(send_request(self.agent, "GET", url, "/"))

    def read(self, response: Any, limit: int = 10) -> Deferred[bytes]:
        return Deferred.fromCoroutine(read_body(response, limit))


class CancelTests(ExchangeTestCase):
    async def test_while_connecting_no_connection_is_made(self) -> None:
        server, url = self.serve_script([])
        # An address goes straight to TCP; what may be a name goes another way.
        for there in (url, url.replace("127.0.0.1", "[::1]")):
            asked = self.get(there)
            asked.cancel()
            self.failureResultOf(asked, CancelledError)
        self.assertEqual([], server.peers)

    async def test_before_the_head_the_connection_is_closed(self) -> None:
        server, url = self.serve_script([], [b"HTTP/1.1 200 OK\r\nContent-"])
        for _ in range(2):
            asked = self.get(url)
            peer = await server.requested.get()
            self.assertNoResult(asked)
            asked.cancel()
            self.failureResultOf(asked, CancelledError)
            await peer.receive_all()

    async def test_in_the_body_the_connection_is_closed(self) -> None:
        server, url = self.serve_script([CHUNKED + chunk(b"some")])
        reading = self.read(await self.get(url))
        peer = await server.requested.get()
        await peer.send(chunk(b"more"))
        self.assertNoResult(reading)
        reading.cancel()
        self.failureResultOf(reading, CancelledError)
        await peer.receive_all()


class BodyTests(ExchangeTestCase):
    async def test_a_body_that_has_come_whole_is_read_up_to_the_limit(self) -> None:
        answers = [
            CHUNKED + chunk(b"01234") + chunk(b"56789") + LAST_CHUNK,
            with_length(10) + b"0123456789",
            b"HTTP/1.1 100 Continue\r\n\r\n" + with_length(10) + b"0123456789 and more than was announced",
        ]
        _, url = self.serve_script(*[[answer] for answer in answers])
        for answer in answers:
            self.assertEqual(b"0123456789", await self.read(await self.get(url)), answer)

    async def test_one_that_breaks_off_fails(self) -> None:
        answers = [
            (CHUNKED + chunk(b"some"), IncompleteResponseError),
            (CHUNKED + b"100\r\nsome", IncompleteResponseError),
            (CHUNKED + chunk(b"some") + b"nonsense\r\n", MalformedResponseError),
            (with_length(10) + b"some", IncompleteResponseError),
            # Nothing tells the end of this one from its worker's.
            (b"HTTP/1.1 200 OK\r\n\r\nsome", IncompleteResponseError),
        ]
        for end in End:
            _, url = self.serve_script(*[(answer, end) for answer, _ in answers])
            for answer, error in answers:
                response = await self.get(url)
                with self.assertRaises(error, msg=answer):
                    await self.read(response)

    async def test_one_that_is_too_large_fails_and_closes_the_connection(self) -> None:
        server, url = self.serve_script([CHUNKED + chunk(b"0123456789")])
        reading = self.read(await self.get(url))
        peer = await server.requested.get()
        self.assertNoResult(reading)
        await peer.send(chunk(b"a"))
        with self.assertRaises(BodyTooLargeError):
            await reading
        await peer.receive_all()

    async def test_an_encoded_answer_is_refused_and_its_connection_closed(self) -> None:
        server, url = self.serve_script([CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")])
        with self.assertRaises(MalformedResponseError):
            await self.get(url)
        peer = await server.requested.get()
        await peer.receive_all()

    async def test_discarding_an_answer_closes_its_connection(self) -> None:
        server, url = self.serve_script([CHUNKED], [CHUNKED + chunk(b"some")])
        for _ in range(2):
            abort_body(await self.get(url))
            peer = await server.requested.get()
            await peer.receive_all()

    async def test_discarding_an_answer_that_has_come_whole_is_right_too(self) -> None:
        server, url = self.serve_script([with_length(4) + b"some"], [with_length(0)])
        for _ in range(2):
            abort_body(await self.get(url))
        await wait_until(lambda: all(peer.end for peer in server.peers))
