"""Both clients with a transport in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
from twisted.trial.unittest import SynchronousTestCase

from bfaas.client import (
    AsyncClient,
    BusyError,
    CancelledRunError,
    Client,
    Exit,
    NoResponseError,
    Output,
    RejectedError,
    ResponseLostError,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

OUTPUT = b'event: stdout\ndata: "a"\n\n'
EXIT = b'event: exit\ndata: {"code": 0}\n\n'
HEADERS = {"Run-Id": "r1", "Worker": "m1"}


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in pieces, and may end with an error."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def ok(*pieces: bytes | Exception) -> httpx.Response:
    return httpx.Response(200, headers=HEADERS, stream=Pieces(*pieces))


class Server:
    """A transport that returns responses, or raises errors, one after the other."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._respond)

    def _respond(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, **options: Any) -> list[Any]:
        """Run a script with the client that blocks; return the events."""
        with httpx.Client(transport=self.transport) as http:
            client = Client("http://host", http=http, **options)
            with client, client.stream("script") as run:
                assert (run.id, run.machine) == ("r1", "m1")
                return list(run)

    def run_async(self, **options: Any) -> list[Any]:
        """Run a script with the client for asyncio; return the events."""

        async def main() -> list[Any]:
            async with (
                httpx.AsyncClient(transport=self.transport) as http,
                AsyncClient("http://host", http=http, **options) as client,
                client.stream("script") as run,
            ):
                assert (run.id, run.machine) == ("r1", "m1")
                return [event async for event in run]

        return asyncio.run(main())


EACH: list[Callable[..., list[Any]]] = [Server.run, Server.run_async]


class ClientTests(SynchronousTestCase):
    def test_events(self) -> None:
        for run in EACH:
            server = Server(ok(OUTPUT, EXIT))
            self.assertEqual([Output(Stream.STDOUT, "a"), Exit(0)], run(server))
            self.assertEqual(b"script", server.requests[0].content)

    def test_a_request_is_sent_again_only_after_a_rejection(self) -> None:
        for run in EACH:
            busy = httpx.Response(429, headers={"Retry-After": "1"}, stream=Pieces(b"bu", b"sy"))
            reset = Pieces(httpx.ReadError("reset"))
            broken = httpx.Response(503, headers={"Retry-After": "1"}, stream=reset)
            server = Server(busy, broken, ok(EXIT))
            self.assertEqual([Exit(0)], run(server, max_wait=2))
            self.assertEqual(3, len(server.requests))

            busy = httpx.Response(429, headers={"Retry-After": "1"}, stream=Pieces(b"busy"))
            server = Server(busy, ok(EXIT))
            self.assertRaises(BusyError, run, server, max_wait=0.9)
            self.assertEqual(1, len(server.requests))

    def test_errors_before_a_response(self) -> None:
        for run in EACH:
            for error, may_have_run in (
                (httpx.ConnectError("refused"), False),
                (httpx.ConnectTimeout(""), False),
                (httpx.WriteError("reset"), True),
                (httpx.ReadTimeout(""), True),
                (httpx.RemoteProtocolError("no HTTP"), True),
            ):
                server = Server(error)
                caught = self.assertRaises(NoResponseError, run, server)
                self.assertEqual(may_have_run, caught.may_have_run)
                self.assertIs(error, caught.__cause__)
                self.assertIn(str(error) or type(error).__name__, str(caught))

    def test_errors_within_a_response(self) -> None:
        for run in EACH:
            for pieces in ((OUTPUT,), (OUTPUT, httpx.ReadError("reset")), (OUTPUT, b"garbage\n\n")):
                caught = self.assertRaises(ResponseLostError, run, Server(ok(*pieces)))
                self.assertTrue(caught.may_have_run)

    def test_redirects_are_errors(self) -> None:
        for run in EACH:
            server = Server(httpx.Response(307, headers={"Location": "/run"}, stream=Pieces()))
            self.assertRaises(RejectedError, run, server)
            self.assertEqual(1, len(server.requests))

    def test_the_response_is_closed_when_the_block_ends(self) -> None:
        response = ok(OUTPUT, OUTPUT, EXIT)
        server = Server(response)
        with httpx.Client(transport=server.transport) as http:
            with Client("http://host", http=http).stream("script") as run:
                next(run)
                self.assertIsNone(run.exit)
                run.cancel()
                self.assertFalse(response.is_closed)
            self.assertTrue(response.is_closed)
            self.assertFalse(http.is_closed)

    def test_a_cancelled_run_is_told_from_a_lost_one(self) -> None:
        server = Server(ok(OUTPUT, httpx.ReadError("shut down")))
        with httpx.Client(transport=server.transport) as http, Client(http=http).stream("script") as run:
            next(run)
            run.cancel()
            self.assertRaises(CancelledRunError, next, run)

    def test_results_and_status(self) -> None:
        statuses = [httpx.Response(200, stream=Pieces(b'{"version": ', b'"1"}')) for _ in range(2)]
        server = Server(ok(OUTPUT, EXIT), statuses[0], ok(OUTPUT, EXIT), statuses[1])
        with httpx.Client(transport=server.transport) as http, Client("http://host", http=http) as client:
            self.assertEqual("a", client.run("script").stdout)
            self.assertEqual({"version": "1"}, client.status())

        async def main() -> None:
            async with httpx.AsyncClient(transport=server.transport) as http:
                client = AsyncClient("http://host", http=http)
                self.assertEqual("a", (await client.run("script")).stdout)
                self.assertEqual({"version": "1"}, await client.status())

        asyncio.run(main())
