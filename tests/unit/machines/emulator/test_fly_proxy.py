"""The proxy of the stand-in: which machine a request goes to, and how its answer comes back."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.api import MachineConfig
from bfaas.machines.emulator.backend import NullBackend
from bfaas.machines.emulator.fly_proxy import FlyProxy
from bfaas.machines.emulator.state import EmulatedMachines
from tests.support.hostile_worker import LAST_CHUNK, End, Liar, LoopbackTestCase, chunk, post, reactor
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

HEAD = b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\n\r\n"
OK: list[bytes | Deferred[None] | End] = [HEAD + LAST_CHUNK, End.CLOSE]


class Placed(NullBackend):
    """Bodies that are where the test says."""

    url: str | None = None

    def allocate_url(self) -> str | None:
        return self.url


class FlycastCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.bodies = Placed()
        self.machines = EmulatedMachines(Clock(), lambda: 0.0, self.bodies)
        self.port = self.serve(single_use_agent(reactor))

    def serve(self, agent: IAgent) -> int:
        site = BoundedSite(reactor, FlyProxy(self.machines, agent), 1 << 20)
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not site.protocols)))
        return self.listen(site)

    async def machine(self, *script: bytes | Deferred[None] | End) -> tuple[str, Liar]:
        """Make a machine whose worker lies; one without a script is nowhere."""
        liar, url = self.lie(script)
        self.bodies.url = url
        machine, _ = await self.machines.create(url, "ams", MachineConfig("i"), 0)
        return machine.id, liar

    async def ask(self, *headers: str) -> tuple[int, str]:
        peer = await self.call(self.port, post("/run?a=b", b"true", *headers))
        answer, content = parse_response(await peer.hear_out())
        return answer.status, content.decode()


def to(machine_id: str) -> str:
    return f"fly-force-instance-id: {machine_id}"


class AddressTests(FlycastCase):
    async def test_a_request_goes_to_the_machine_that_it_names_and_to_no_other(self) -> None:
        (one, asked), (_, other) = await self.machine(*OK), await self.machine(*OK)

        self.assertEqual((200, ""), await self.ask(to(one)))

        [peer] = asked.peers
        request = peer.request()
        assert request is not None
        self.assertEqual(("POST /run?a=b HTTP/1.1", b"true"), (request[0][0], request[1]))
        self.assertEqual([], other.peers)

    async def test_a_request_for_a_machine_that_is_not_started_is_unavailable(self) -> None:
        stopped, liar = await self.machine(*OK)
        await self.machines.stop(stopped, None)
        suspended, _ = await self.machine(*OK)
        await self.machines.suspend(suspended, None)
        self.bodies.url = None
        nowhere, _ = await self.machines.create("nowhere", "ams", MachineConfig("i"), 0)

        for headers in ([], *([to(each)] for each in (stopped, suspended, nowhere.id, "unknown"))):
            self.assertEqual((503, "no such machine is started\n"), await self.ask(*headers))
        self.assertEqual([], liar.peers)

    async def test_a_machine_that_does_not_answer_is_a_bad_gateway(self) -> None:
        dead, _ = await self.machine(End.RESET)

        self.assertEqual((502, "the machine does not respond\n"), await self.ask(to(dead)))

    async def test_a_request_that_names_no_path_leads_nowhere_else(self) -> None:
        elsewhere, url = self.lie(OK)
        machine_id, liar = await self.machine(*OK)
        there = url.removeprefix("http://")

        peer = await self.call(self.port, post(f"@{there}/run", b"", to(machine_id)))
        answer, _ = parse_response(await peer.hear_out())

        self.assertEqual(400, answer.status)
        self.assertEqual(([], []), (elsewhere.peers, liar.peers))


class HeaderTests(FlycastCase):
    async def test_headers_go_on_but_for_those_of_one_connection(self) -> None:
        answered = (
            b"HTTP/1.1 201 Made\r\nX-Run: 1\r\nX-Run: 2\r\nKeep-Alive: timeout=5\r\n"
            b"Trailer: X-Sum\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        machine_id, liar = await self.machine(answered + chunk(b"made") + LAST_CHUNK, End.CLOSE)
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
        answer, content = parse_response(await peer.hear_out())

        asked = liar.peers[0].request()
        assert asked is not None
        sent = sorted(line.title() for line in asked[0][1:] if not line.startswith("Host:"))
        self.assertEqual(
            [
                "Accept-Encoding: Identity",
                "Connection: Close",
                "Content-Length: 4",
                to(machine_id).title(),
                "X-Kept: 1",
                "X-Kept: 2",
            ],
            sent,
        )
        self.assertEqual((201, b"made"), (answer.status, content))
        self.assertEqual(["1", "2"], answer.headers.get_all("X-Run"))
        self.assertEqual("1.1 fly.io", answer.getheader("Via"))
        for name in ("Keep-Alive", "Trailer", "Upgrade"):
            self.assertIs(None, answer.getheader(name))


class StreamTests(FlycastCase):
    async def test_an_answer_is_passed_on_as_it_comes(self) -> None:
        goes_on: Deferred[None] = Deferred()
        machine_id, _ = await self.machine(
            HEAD, chunk(b"one"), goes_on, chunk(b"two") + LAST_CHUNK, End.CLOSE
        )
        peer = await self.call(self.port, post("/run", b"", to(machine_id)))

        self.assertNotIn(b"two", await peer.hear(b"one"))
        goes_on.callback(None)

        _, content = parse_response(await peer.hear_out())
        self.assertEqual(b"onetwo", content)

    async def test_an_answer_that_breaks_off_is_seen_to_do_so(self) -> None:
        for end in End:
            machine_id, _ = await self.machine(HEAD + chunk(b"one"), end)
            peer = await self.call(self.port, post("/run", b"", to(machine_id)))
            heard = await peer.hear_out()

            self.assertFalse(peer.ended_in_order)
            self.assertNotIn(LAST_CHUNK, heard)

    async def test_a_client_that_leaves_ends_the_exchange_with_the_machine(self) -> None:
        for said in (b"", HEAD + chunk(b"one")):
            machine_id, liar = await self.machine(said)
            peer = await self.call(self.port, post("/run", b"", to(machine_id)))
            asked = await liar.asked.get()
            if said:
                await peer.hear(b"one")

            peer.transport.abortConnection()

            await asked.hear_out()

    async def test_a_machine_is_read_no_faster_than_the_client_reads(self) -> None:
        machine_id, _ = await self.machine(*OK)
        agent = Tap()
        self.port = self.serve(agent)
        peer = await self.call(self.port, post("/run", b"", to(machine_id)))
        await wait_until(lambda: agent.receiver)
        peer.transport.pauseProducing()

        for _ in range(1000):  # a gigabyte, more than any buffer takes
            if agent.paused:
                break
            agent.receiver.dataReceived(b"x" * (1 << 20))
            await wait_until(lambda: True)
        self.assertTrue(agent.paused)
        peer.transport.resumeProducing()

        await wait_until(lambda: not agent.paused)


@implementer(IAgent)
class Tap:
    """An agent whose only answer has the body that the test gives, and the transport of it."""

    code = 200

    def __init__(self) -> None:
        self.headers = Headers()
        self.receiver: Any = None
        self.paused = False

    def request(self, *_: Any, **__: Any) -> Deferred[Any]:
        answered: Deferred[Any] = Deferred()
        answered.callback(self)
        return answered

    def deliverBody(self, receiver: Any) -> None:
        self.receiver = receiver
        receiver.makeConnection(self)

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        pass
