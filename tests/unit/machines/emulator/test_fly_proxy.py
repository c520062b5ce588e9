"""Tests of the emulated proxy: routing of requests, headers, and streaming of responses."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.api import MachineConfig, RateLimitedError
from bfaas.machines.emulator.backend import NullBackend
from bfaas.machines.emulator.fly_proxy import FlyProxy
from bfaas.machines.emulator.state import EmulatedMachines
from tests.support.hostile_worker import (
    LAST_CHUNK,
    End,
    LoopbackTestCase,
    ScriptedServer,
    chunk,
    post,
    reactor,
)
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

HEAD = b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\n\r\n"
OK: list[bytes | Deferred[None] | End] = [HEAD + LAST_CHUNK, End.CLOSE]


class FixedUrlBackend(NullBackend):
    """Machines listen at the URL that the test sets."""

    url: str | None = None

    def allocate_url(self) -> str | None:
        return self.url


class FlyProxyTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.backend = FixedUrlBackend()
        self.machines = EmulatedMachines(Clock(), lambda: 0.0, self.backend)
        self.port = self.serve(single_use_agent(reactor))

    def serve(self, agent: IAgent) -> int:
        site = BoundedSite(reactor, FlyProxy(self.machines, agent), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        return self.listen(site)

    async def machine(self, *script: bytes | Deferred[None] | End) -> tuple[str, ScriptedServer]:
        """Create a machine whose worker responds as scripted."""
        server, url = self.serve_script(script)
        self.backend.url = url
        machine, _ = await self.machines.create(url, "ams", MachineConfig("i"), 0)
        return machine.id, server

    async def request(self, *headers: str) -> tuple[int, str]:
        peer = await self.call(self.port, post("/run?a=b", b"true", *headers))
        response, content = parse_response(await peer.receive_all())
        return response.status, content.decode()


def to(machine_id: str) -> str:
    return f"fly-force-instance-id: {machine_id}"


class AddressTests(FlyProxyTestCase):
    async def test_request_goes_to_the_machine_that_it_names_only(self) -> None:
        (one, target), (_, other) = await self.machine(*OK), await self.machine(*OK)

        self.assertEqual((200, ""), await self.request(to(one)))

        [peer] = target.peers
        request = peer.request()
        assert request is not None
        self.assertEqual(("POST /run?a=b HTTP/1.1", b"true"), (request[0][0], request[1]))
        self.assertEqual([], other.peers)

    async def test_request_for_a_machine_that_is_not_started_gets_503(self) -> None:
        stopped, server = await self.machine(*OK)
        await self.machines.stop(stopped, None)
        suspended, _ = await self.machine(*OK)
        await self.machines.suspend(suspended, None)
        self.backend.url = None
        unreachable, _ = await self.machines.create("unreachable", "ams", MachineConfig("i"), 0)

        for headers in ([], *([to(each)] for each in (stopped, suspended, unreachable.id, "unknown"))):
            self.assertEqual((503, "no such machine is started\n"), await self.request(*headers))
        self.assertEqual([], server.peers)

    async def test_machine_that_does_not_respond_gets_502(self) -> None:
        dead, _ = await self.machine(End.RESET)

        self.assertEqual((502, "the machine does not respond\n"), await self.request(to(dead)))

    async def test_unexpected_error_is_logged_and_ends_the_connection(self) -> None:
        machine_id, _ = await self.machine(*OK)
        self.patch(self.machines, "look_up", lambda _: 1 / 0)

        peer = await self.call(self.port, post("/run", b"true", to(machine_id)))

        self.assertEqual(b"", await peer.receive_all())
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    async def test_rate_limits_of_the_api_do_not_apply(self) -> None:
        self.machines = EmulatedMachines(Clock(), lambda: 0.0, self.backend, rate_limited=True)
        self.port = self.serve(single_use_agent(reactor))
        machine_id, _ = await self.machine(*OK)
        for _ in range(10):
            await self.machines.get(machine_id)
        with self.assertRaises(RateLimitedError):
            await self.machines.get(machine_id)

        self.assertEqual((200, ""), await self.request(to(machine_id)))

    async def test_target_that_is_not_a_path_is_rejected(self) -> None:
        elsewhere, url = self.serve_script(OK)
        machine_id, server = await self.machine(*OK)
        authority = url.removeprefix("http://")

        peer = await self.call(self.port, post(f"@{authority}/run", b"", to(machine_id)))
        response, _ = parse_response(await peer.receive_all())

        self.assertEqual(400, response.status)
        self.assertEqual(([], []), (elsewhere.peers, server.peers))


class HeaderTests(FlyProxyTestCase):
    async def test_end_to_end_headers_are_forwarded_and_hop_by_hop_headers_are_not(self) -> None:
        sent = (
            b"HTTP/1.1 201 Created\r\nX-Run: 1\r\nX-Run: 2\r\nKeep-Alive: timeout=5\r\n"
            b"Trailer: X-Sum\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        machine_id, server = await self.machine(sent + chunk(b"created") + LAST_CHUNK, End.CLOSE)
        request = post(
            "/run",
            b"true",
            to(machine_id),
            "X-Kept: 1",
            "X-Kept: 2",
            "Keep-Alive: timeout=5",
            "TE: trailers",
            "Upgrade: h2c",
            "X-Dropped: 1",
            "Proxy-Connection: keep-alive",
        ).replace(b"Connection: close", b"Connection: x-dropped, close", 1)

        peer = await self.call(self.port, request)
        response, content = parse_response(await peer.receive_all())

        forwarded = server.peers[0].request()
        assert forwarded is not None
        headers = sorted(line.title() for line in forwarded[0][1:] if not line.startswith("Host:"))
        self.assertEqual(
            [
                "Accept-Encoding: Identity",
                "Connection: Close",
                "Content-Length: 4",
                to(machine_id).title(),
                "X-Kept: 1",
                "X-Kept: 2",
            ],
            headers,
        )
        self.assertEqual((201, b"created"), (response.status, content))
        self.assertEqual(["1", "2"], response.headers.get_all("X-Run"))
        self.assertEqual("1.1 fly.io", response.getheader("Via"))
        for name in ("Keep-Alive", "Trailer", "Upgrade"):
            self.assertIs(None, response.getheader(name))


class StreamTests(FlyProxyTestCase):
    async def test_response_is_streamed(self) -> None:
        second_half: Deferred[None] = Deferred()
        machine_id, _ = await self.machine(
            HEAD, chunk(b"one"), second_half, chunk(b"two") + LAST_CHUNK, End.CLOSE
        )
        peer = await self.call(self.port, post("/run", b"", to(machine_id)))

        self.assertNotIn(b"two", await peer.receive_until(b"one"))
        second_half.callback(None)

        _, content = parse_response(await peer.receive_all())
        self.assertEqual(b"onetwo", content)

    async def test_incomplete_response_stays_incomplete(self) -> None:
        for end in End:
            machine_id, _ = await self.machine(HEAD + chunk(b"one"), end)
            peer = await self.call(self.port, post("/run", b"", to(machine_id)))
            received = await peer.receive_all()

            self.assertFalse(peer.closed_cleanly)
            self.assertNotIn(LAST_CHUNK, received)

    async def test_disconnect_of_the_client_ends_the_request_to_the_machine(self) -> None:
        for response in (b"", HEAD + chunk(b"one")):
            machine_id, server = await self.machine(response)
            peer = await self.call(self.port, post("/run", b"", to(machine_id)))
            upstream = await server.requested.get()
            if response:
                await peer.receive_until(b"one")

            peer.transport.abortConnection()

            await upstream.receive_all()

    async def test_slow_client_pauses_the_machine(self) -> None:
        machine_id, _ = await self.machine(*OK)
        agent = ManualAgent()
        self.port = self.serve(agent)
        peer = await self.call(self.port, post("/run", b"", to(machine_id)))
        await wait_until(lambda: agent.receiver)
        peer.transport.pauseProducing()

        for _ in range(1000):  # a gigabyte, more than all buffers hold
            if agent.paused:
                break
            agent.receiver.dataReceived(b"x" * (1 << 20))
            await wait_until(lambda: True)
        self.assertTrue(agent.paused)
        peer.transport.resumeProducing()

        await wait_until(lambda: not agent.paused)


@implementer(IAgent)
class ManualAgent:
    """An agent with one response, whose body the test writes. It is also the transport of the response."""

    code = 200

    def __init__(self) -> None:
        self.headers = Headers()
        self.receiver: Any = None
        self.paused = False

    def request(self, *_: Any, **__: Any) -> Deferred[Any]:
        return succeed(self)

    def deliverBody(self, receiver: Any) -> None:
        self.receiver = receiver
        receiver.makeConnection(self)

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        pass
