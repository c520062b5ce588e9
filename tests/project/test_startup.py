"""What a worker imports before its first health check response, and what only after it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from benchmarks.startup import ROOT, measure
from bfaas.basher import LazyResource, SilenceTimer
from tests.support.waiting import wait_until
from tests.support.workers import BASHER, LIMIT, TWISTD, Worker, reactor

if TYPE_CHECKING:
    from twisted.web.server import Request

AFTER_HEALTH_CHECK = {"klein", "werkzeug", "bfaas.worker.app", "bfaas.worker.bash_process"}
# -X importtime also lists failed imports. These modules are only imported by others that were found.
TLS = {"_ssl", "OpenSSL._util", "cryptography.x509.base"}
NEVER = {"treq", "bfaas.pool", "twisted.web.client"}


def imported(worker: Worker) -> set[str]:
    """Return the modules that a worker under `-X importtime` has imported until now."""
    lines = worker.errors.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


class ImportTests(TestCase):
    timeout = 2 * LIMIT

    async def start(self, program: tuple[str, ...]) -> Worker:
        worker = await Worker.start(self, program=("-X", "importtime", *program))
        # The list of imports may arrive after the worker listens.
        await wait_until(lambda: "bfaas.http.server" in imported(worker), "the list of imports arrives")
        return worker

    async def wait_for_imports(self, worker: Worker) -> None:
        await wait_until(lambda: imported(worker) >= AFTER_HEALTH_CHECK, "the rest is imported")

    async def test_imports_what_a_run_needs_after_the_first_health_check(self) -> None:
        for program in (BASHER, TWISTD):
            worker = await self.start(program)
            self.assertEqual(set(), imported(worker) & (AFTER_HEALTH_CHECK | NEVER))

            health = await worker.fetch("GET", "/healthz")
            self.assertEqual((200, b"ok\n"), (health.status, health.body))
            await self.wait_for_imports(worker)

            again = await worker.fetch("GET", "/healthz")
            self.assertEqual((200, b"ok\n"), (again.status, again.body))
            self.assertEqual(7, (await worker.run("exit 7")).exit["code"])
            self.assertEqual(0, await worker.ended())
            self.assertEqual(set(), imported(worker) & NEVER)

    async def test_first_request_can_be_a_run(self) -> None:
        worker = await self.start(BASHER)
        self.assertEqual(set(), imported(worker) & AFTER_HEALTH_CHECK)

        self.assertEqual(7, (await worker.run("exit 7")).exit["code"])
        self.assertEqual(0, await worker.ended())

    async def test_failure_to_import_the_application_ends_the_worker_and_is_logged(self) -> None:
        without = "import runpy, sys; sys.modules['klein'] = None; "
        worker = await self.start(("-c", without + "runpy.run_module('bfaas.basher', None, '__main__')"))
        self.assertEqual(200, (await worker.fetch("GET", "/healthz")).status)
        await worker.ended()

        self.assertEqual(1, worker.output.count(b"import of klein halted"))

    async def test_worker_without_twistd_does_not_import_tls(self) -> None:
        worker = await self.start(BASHER)
        self.assertEqual(7, (await worker.run("exit 7")).exit["code"])
        self.assertEqual(0, await worker.ended())

        self.assertGreaterEqual(imported(worker), AFTER_HEALTH_CHECK)
        self.assertEqual(set(), imported(worker) & TLS)


class LoadedResource(Resource):
    """Stands for the resource that takes time to load."""

    isLeaf = True

    def render(self, request: Request) -> bytes:
        return b"loaded: " + request.path


class LazyResourceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.loaded = self.requests = 0
        self.clock = Clock()
        self.site = Site(LazyResource(self.clock, self.load, "m1", self.count_request), reactor=self.clock)

    def count_request(self) -> None:
        self.requests += 1

    def load(self) -> Resource:
        self.loaded += 1
        return LoadedResource()

    def send(self, method: str, path: str) -> str:
        """Send a request and return the body of the response."""
        transport = StringTransport()
        channel = self.site.buildProtocol(None)
        channel.makeConnection(transport)
        channel.dataReceived(f"{method} {path} HTTP/1.0\r\n\r\n".encode())
        body: str = transport.value().decode().partition("\r\n\r\n")[2]
        return body

    def test_loads_after_the_first_health_check(self) -> None:
        self.assertEqual("ok\n", self.send("GET", "/healthz"))
        self.assertEqual(0, self.loaded)
        self.clock.advance(0)
        self.assertEqual(1, self.loaded)
        self.assertEqual("loaded: /healthz", self.send("GET", "/healthz"))

    def test_loads_for_any_other_request(self) -> None:
        for method, path in (("GET", "/"), ("POST", "/healthz"), ("GET", "/healthz/"), ("POST", "/run")):
            self.setUp()
            self.assertEqual(f"loaded: {path}", self.send(method, path))
            self.assertEqual(1, self.loaded)

    def test_loads_once(self) -> None:
        self.send("GET", "/healthz")
        self.send("GET", "/healthz")
        self.send("GET", "/run")
        self.clock.advance(0)
        self.assertEqual((1, 3), (self.loaded, self.requests))
        self.assertEqual([], self.clock.getDelayedCalls())


class SilenceTimerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.ended_at: list[float] = []
        self.timer = SilenceTimer(self.clock, 100.0, lambda: self.ended_at.append(self.clock.seconds()))
        self.timer.start()

    def test_fires_once_within_a_tenth_after_the_limit(self) -> None:
        self.clock.pump([1.0] * 57)
        self.timer.restart()
        self.clock.pump([1.0] * 300)
        [ended_at] = self.ended_at
        self.assertTrue(157 <= ended_at <= 167, ended_at)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_does_not_fire_while_there_are_requests(self) -> None:
        for _ in range(20):
            self.clock.pump([1.0] * 99)
            self.timer.restart()
        self.assertEqual([], self.ended_at)

    def test_time_in_which_the_process_was_paused_does_not_count(self) -> None:
        self.clock.pump([1.0] * 50)
        self.clock.advance(10_000)
        self.clock.pump([1.0] * 30)
        self.assertEqual([], self.ended_at)

    def test_stopped_timer_does_not_fire(self) -> None:
        self.timer.stop()
        self.assertEqual([], self.clock.getDelayedCalls())


class ResponseOrderTests(TestCase):
    timeout = 2 * LIMIT

    async def test_health_check_response_is_sent_before_loading(self) -> None:
        received = b""

        def load() -> Resource:
            nonlocal received
            received = client.recv(65536, socket.MSG_DONTWAIT)
            return LoadedResource()

        port = reactor.listenTCP(
            0, Site(LazyResource(reactor, load, "m1", lambda: None)), interface="127.0.0.1"
        )
        self.addCleanup(port.stopListening)
        client = socket.create_connection(("127.0.0.1", port.getHost().port))
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        await wait_until(lambda: received != b"", "the resource is loaded")
        client.close()
        self.assertTrue(received.endswith(b"\r\n\r\nok\n"), received)


class BenchmarkTests(SynchronousTestCase):
    def test_measures_each_phase_of_a_start(self) -> None:
        measured = measure(2, Path(ROOT))
        rows = {row["name"]: row for row in json.loads(measured.to_json())["rows"]}

        names = {"healthz", "cold run", "ready run", "freed", "idle", "own"}
        before = {f"{name} before" for name in names}
        self.assertEqual({"python", "reactor"} | names | before, set(rows))
        self.assertEqual(1 + len(rows), len(measured.table().splitlines()))
        for row in rows.values():
            self.assertEqual([True, True], [sample > 0 for sample in row["samples"]])
        self.assertEqual({"python", "reactor", "before"}, set(rows["healthz"]["ratios"]))
        # A run includes the health check.
        self.assertLess(rows["healthz"]["median"], rows["cold run"]["median"])
