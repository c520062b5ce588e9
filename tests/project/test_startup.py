"""What a worker loads before it can tell that it is up, and what only afterwards."""

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
from bfaas.basher import LazyResource
from tests.support.waiting import wait_until
from tests.support.workers import BASHER, LIMIT, TWISTD, Worker, reactor

if TYPE_CHECKING:
    from twisted.web.server import Request

LATER = {"klein", "werkzeug", "bfaas.worker.app", "bfaas.worker.bash_process"}
# Python tells also of what was looked for in vain; but these, only what is there looks for.
TLS = {"_ssl", "OpenSSL._util", "cryptography.x509.base"}
NEVER = {"treq", "bfaas.pool", "twisted.web.client"}


def imported(worker: Worker) -> set[str]:
    """Find what a worker that runs under `-X importtime` has imported until now."""
    lines = worker.errors.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


class ImportTests(TestCase):
    timeout = 2 * LIMIT

    async def start(self, program: tuple[str, ...]) -> Worker:
        worker = await Worker.start(self, program=("-X", "importtime", *program))
        # What it told before it listened may still be on its way.
        await wait_until(lambda: "bfaas.http.server" in imported(worker), "its imports are told")
        return worker

    async def test_what_a_run_needs_is_loaded_behind_the_first_answer(self) -> None:
        for program in (BASHER, TWISTD):
            worker = await self.start(program)
            self.assertEqual(set(), imported(worker) & (LATER | NEVER))

            health = await worker.fetch("GET", "/healthz")
            self.assertEqual((200, b"ok\n"), (health.status, health.body))
            await wait_until(lambda worker=worker: imported(worker) >= LATER, "the rest is loaded")  # type: ignore[arg-type,misc]

            again = await worker.fetch("GET", "/healthz")
            self.assertEqual((200, b"ok\n"), (again.status, again.body))
            self.assertEqual(7, (await worker.run("exit 7")).exit["code"])
            self.assertEqual(0, await worker.ended())
            self.assertEqual(set(), imported(worker) & NEVER)

    async def test_a_run_that_comes_first_is_run(self) -> None:
        worker = await self.start(BASHER)
        self.assertEqual(set(), imported(worker) & LATER)

        self.assertEqual(7, (await worker.run("exit 7")).exit["code"])
        self.assertEqual(0, await worker.ended())

    async def test_one_that_cannot_load_what_runs_scripts_ends_and_says_why(self) -> None:
        without = "import runpy, sys; sys.modules['klein'] = None; "
        worker = await self.start(("-c", without + "runpy.run_module('bfaas.basher', None, '__main__')"))
        self.assertEqual(200, (await worker.fetch("GET", "/healthz")).status)
        await worker.ended()

        self.assertEqual(1, worker.output.count(b"import of klein halted"))

    async def test_a_worker_by_itself_has_no_tls(self) -> None:
        worker = await self.start(BASHER)
        self.assertEqual(7, (await worker.run("exit 7")).exit["code"])
        self.assertEqual(0, await worker.ended())

        self.assertGreaterEqual(imported(worker), LATER)
        self.assertEqual(set(), imported(worker) & TLS)


class Slow(Resource):
    """What takes its time to load."""

    isLeaf = True

    def render(self, request: Request) -> bytes:
        return b"loaded: " + request.path


class FrontTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.loaded = 0
        self.clock = Clock()
        self.site = Site(LazyResource(self.clock, self.load, "m1"), reactor=self.clock)

    def load(self) -> Resource:
        self.loaded += 1
        return Slow()

    def ask(self, method: str, path: str) -> str:
        """Send a request; the body of the answer."""
        transport = StringTransport()
        channel = self.site.buildProtocol(None)
        channel.makeConnection(transport)
        channel.dataReceived(f"{method} {path} HTTP/1.0\r\n\r\n".encode())
        body: str = transport.value().decode().partition("\r\n\r\n")[2]
        return body

    def test_it_tells_that_it_listens_and_then_loads(self) -> None:
        self.assertEqual("ok\n", self.ask("GET", "/healthz"))
        self.assertEqual(0, self.loaded)
        self.clock.advance(0)
        self.assertEqual(1, self.loaded)
        self.assertEqual("loaded: /healthz", self.ask("GET", "/healthz"))

    def test_anything_else_is_for_what_it_stands_before(self) -> None:
        for method, path in (("GET", "/"), ("POST", "/healthz"), ("GET", "/healthz/"), ("POST", "/run")):
            self.setUp()
            self.assertEqual(f"loaded: {path}", self.ask(method, path))
            self.assertEqual(1, self.loaded)

    def test_it_loads_once(self) -> None:
        self.ask("GET", "/healthz")
        self.ask("GET", "/healthz")
        self.ask("GET", "/run")
        self.clock.advance(0)
        self.assertEqual(1, self.loaded)
        self.assertEqual([], self.clock.getDelayedCalls())


class SentFirstTests(TestCase):
    timeout = 2 * LIMIT

    async def test_the_answer_has_come_before_it_loads(self) -> None:
        heard = b""

        def load() -> Resource:
            nonlocal heard
            heard = client.recv(65536, socket.MSG_DONTWAIT)
            return Slow()

        port = reactor.listenTCP(0, Site(LazyResource(reactor, load, "m1")), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        client = socket.create_connection(("127.0.0.1", port.getHost().port))
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        await wait_until(lambda: heard != b"", "it loads")
        client.close()
        self.assertTrue(heard.endswith(b"\r\n\r\nok\n"), heard)


class BenchmarkTests(SynchronousTestCase):
    def test_it_tells_each_of_what_it_measures(self) -> None:
        measured = measure(2, Path(ROOT))
        rows = {row["name"]: row for row in json.loads(measured.to_json())["rows"]}

        names = {"healthz", "cold run", "ready run", "freed", "idle", "own"}
        before = {f"{name} before" for name in names}
        self.assertEqual({"python", "reactor"} | names | before, set(rows))
        self.assertEqual(1 + len(rows), len(measured.table().splitlines()))
        for row in rows.values():
            self.assertEqual([True, True], [sample > 0 for sample in row["samples"]])
        self.assertEqual({"python", "reactor", "before"}, set(rows["healthz"]["ratios"]))
        # Nothing is faster than what it has to do first.
        self.assertLess(rows["healthz"]["median"], rows["cold run"]["median"])
