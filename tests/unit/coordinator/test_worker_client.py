from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface import implementer

from bfaas.coordinator.worker_client import WorkerClient, WorkerError
from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.api import Machine, State
from bfaas.protocol.formats import HEARTBEAT_INTERVAL, SSE_HEARTBEAT, Exit, Format, Reason, write_output
from bfaas.protocol.request import RunRequest
from bfaas.protocol.response import RunResponse
from tests.support.hostile_worker import (
    LAST_CHUNK,
    End,
    LoopbackTestCase,
    Peer,
    ScriptedServer,
    chunk,
    post,
    reactor,
)
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from twisted.web.server import Request

STDOUT = b'event: stdout\ndata: "a\\u001b\xe2\x82\xac"\n\n'
STDERR = b'event: stderr\ndata: "b\\n"\n\n'
EXIT = b'event: exit\ndata: {"code": 3}\n\n'
LOST = {
    Format.EVENTS: b'event: exit\ndata: {"code": 125, "reason": "worker-lost"}\n\n',
    Format.RAW: b"\nexit: 125 worker-lost\n",
    Format.NDJSON: b'{"event": "exit", "code": 125, "reason": "worker-lost"}\n',
}
BOTH = ((Format.EVENTS, STDOUT), (Format.RAW, b"\0\xff\nexit: 0\n\n"))
PIECE = b"x" * 65536


def began(format_: Format, *headers: str) -> bytes:
    """A worker's head, for a client's format: lines are made of events."""
    kind = f"Content-Type: {(Format.EVENTS if format_ is Format.NDJSON else format_).value}"
    lines = ["HTTP/1.1 200 OK", kind, "Worker: m1", "Transfer-Encoding: chunked", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


class LazyResource(Resource):
    """A coordinator with one worker and no pool."""

    isLeaf = True

    def __init__(self, proxy: WorkerClient, clock: Clock) -> None:
        super().__init__()
        self._proxy = proxy
        self._clock = clock
        self.url: str | None = None
        self.format = Format.EVENTS
        self.relay: Deferred[Exit] = Deferred()

    def render_POST(self, request: Request) -> int:
        self.answer = RunResponse(request, self.format, self._clock)
        self.relay = running = Deferred.fromCoroutine(self._relay())
        request.notifyFinish().addErrback(lambda _: running.cancel())
        return NOT_DONE_YET

    async def _relay(self) -> Exit:
        script, headers = RunRequest.plain(b"script"), {"Worker": "m1", "Coord": "c1"}
        response = await self._proxy.start_run(machine(self.url), "ticket", "0" * 16, script, self.format)
        return await self._proxy.stream(response, self.format, self.answer, headers)


def machine(url: str | None) -> Machine:
    return Machine("m1", "worker-p-1", State.STARTED, "ams", "image", {}, "i1", 0.0, url)


class ProxyTestCase(LoopbackTestCase):
    MAX_OUTPUT = 1 << 20

    def setUp(self) -> None:
        # Connections are real; time is not.
        self.clock = Clock()
        self.proxy = WorkerClient(self.clock, None, self.MAX_OUTPUT, single_use_agent(reactor))
        self.front = LazyResource(self.proxy, self.clock)
        self.site = BoundedSite(self.clock, self.front, max_body=10)
        self.addCleanup(self.forget)
        self.port = self.listen(self.site)

    async def forget(self) -> None:
        await wait_until(lambda: not self.site.protocols)
        self.front.relay.addErrback(lambda failure: failure.trap(CancelledError))

    async def start(
        self, format_: Format, *script: bytes | Deferred[None] | End
    ) -> tuple[Peer, ScriptedServer]:
        """Begin a run that a scripted server answers: the client and the server."""
        server, self.front.url = self.serve_script(script)
        self.front.format = format_
        return await self.call(self.port, post("/run", b"script")), server

    async def run_it(self, format_: Format, *script: bytes | Deferred[None] | End) -> tuple[bytes, Exit]:
        """Run to the end: what reached the client, and how the run is said to have ended."""
        client, server = await self.start(format_, *script)
        answer, body = parse_response(await client.receive_all())
        self.assertEqual((200, format_.value), (answer.status, answer.getheader("Content-Type")))
        for peer in server.peers:
            await peer.receive_all()
        return body, self.successResultOf(self.front.relay)

    async def until_clean(self) -> None:
        """Wait until no timer is left but the site's own, which keeps the time for its log."""
        await wait_until(lambda: len(self.clock.getDelayedCalls()) == 1)


class RelayTests(ProxyTestCase):
    async def test_a_run_reaches_the_client_as_it_is(self) -> None:
        comments = SSE_HEARTBEAT + STDOUT + SSE_HEARTBEAT + STDERR + EXIT + SSE_HEARTBEAT
        raw = b"\0\xff\n" + b"\nexit: 0\n" + b"more\nexit: 3\n"
        for format_, said, expected in (
            (Format.EVENTS, comments, STDOUT + STDERR + EXIT),
            (Format.RAW, raw, raw),
        ):
            for size in (1, 7, len(said)):
                pieces = [chunk(said[at : at + size]) for at in range(0, len(said), size)]
                found = await self.run_it(format_, began(format_), *pieces, LAST_CHUNK, End.CLOSE)
                self.assertEqual((expected, Exit(3)), found)
        await self.until_clean()

    async def test_output_is_passed_on_while_it_is_produced(self) -> None:
        for format_, said in BOTH:
            more: Deferred[None] = Deferred()
            client, _ = await self.start(format_, began(format_), chunk(said), more, End.CLOSE)
            await client.receive_until(said)
            self.assertNoResult(self.front.relay)
            more.callback(None)
            await client.receive_all()

    async def test_the_head_goes_out_before_any_output_and_silence_is_broken(self) -> None:
        client, server = await self.start(Format.EVENTS, began(Format.EVENTS))
        await client.receive_until(b"\r\n\r\n")
        self.clock.advance(HEARTBEAT_INTERVAL - 1)
        await server.peers[0].send(chunk(STDOUT))
        await client.receive_until(STDOUT)
        self.clock.advance(HEARTBEAT_INTERVAL - 1)
        await server.peers[0].send(chunk(STDERR))
        await client.receive_until(STDERR)
        self.assertNotIn(SSE_HEARTBEAT, client.received)
        self.clock.advance(HEARTBEAT_INTERVAL)
        await client.receive_until(SSE_HEARTBEAT)

    async def test_silence_between_lines_is_broken_by_a_line(self) -> None:
        client, _ = await self.start(Format.NDJSON, began(Format.NDJSON))
        await client.receive_until(b"\r\n\r\n")
        self.clock.advance(HEARTBEAT_INTERVAL)
        await client.receive_until(b'{"event": "heartbeat"}\n')

    async def test_of_the_workers_head_nothing_reaches_the_client(self) -> None:
        client, _ = await self.start(
            Format.EVENTS,
            began(Format.EVENTS, "Set-Cookie: a=b", "Coord: forged", "Access-Control-Allow-Origin: *"),
            chunk(EXIT) + LAST_CHUNK,
        )
        answer, _ = parse_response(await client.receive_all())
        expected = {
            "Connection": "close",
            "Server": answer.getheader("Server"),
            "Date": answer.getheader("Date"),
            "Transfer-Encoding": "chunked",
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store, no-transform",
            "X-Accel-Buffering": "no",
            "X-Content-Type-Options": "nosniff",
            "Worker": "m1",
            "Coord": "c1",
        }
        self.assertEqual(sorted(expected.items()), sorted(answer.getheaders()))

    async def test_the_worker_sees_one_plain_request_and_no_cookie_of_another(self) -> None:
        for format_, path in ((Format.EVENTS, "/run"), (Format.RAW, "/run?raw=1")):
            client, server = await self.start(
                format_, began(format_, "Set-Cookie: a=b; Path=/"), LAST_CHUNK, End.CLOSE
            )
            await client.receive_all()
            (peer,) = server.peers
            head, body = peer.request() or ([], b"")
            expected = [
                f"POST {path} HTTP/1.1",
                "Accept-Encoding: identity",
                "Authorization: ticket",
                "Connection: close",
                "Content-Length: 6",
                "Fly-Force-Instance-Id: m1",
                f"Host: {str(self.front.url).removeprefix('http://')}",
                f"Run-Id: {'0' * 16}",
            ]
            self.assertEqual((expected, b"script"), ([head[0], *sorted(head[1:])], body))

    async def test_a_machine_without_an_address_is_reached_through_its_app(self) -> None:
        server, url = self.serve_script([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
        proxy = WorkerClient(self.clock, url, 0, single_use_agent(reactor))
        await proxy.wait_until_ready(machine(None))
        head, _ = server.peers[0].request() or ([], b"")
        self.assertEqual("GET /healthz HTTP/1.1", head[0])
        self.assertIn("Fly-Force-Instance-Id: m1", head)


class LostTests(ProxyTestCase):
    async def test_a_worker_that_is_lost_is_told_after_everything_it_said(self) -> None:
        for format_, said in BOTH:
            for end in ([End.CLOSE], [End.RESET], [b"nonsense\r\n"], [LAST_CHUNK]):
                said_so: Deferred[None] = Deferred()
                client, _ = await self.start(format_, began(format_), chunk(said), said_so, *end)
                await client.receive_until(said)
                said_so.callback(None)
                _, body = parse_response(await client.receive_all())
                self.assertEqual(said + LOST[format_], body, end)
                self.assertEqual(Exit(125, reason="worker-lost"), self.successResultOf(self.front.relay), end)
        await self.until_clean()

    async def test_lines_are_made_of_a_workers_events(self) -> None:
        head = began(Format.NDJSON)
        body, exit_ = await self.run_it(Format.NDJSON, head, chunk(STDOUT + b": \n\n" + EXIT), LAST_CHUNK)

        line = b'{"event": "stdout", "data": "a\\u001b\xe2\x82\xac"}\n'
        self.assertEqual((line + b'{"event": "exit", "code": 3}\n', Exit(3)), (body, exit_))

    async def test_one_that_says_nothing_at_all_is_lost_too(self) -> None:
        for format_ in Format:
            body, _ = await self.run_it(format_, began(format_), LAST_CHUNK)
            self.assertEqual(LOST[format_], body)

    async def test_an_answer_whose_end_nobody_can_tell_is_lost(self) -> None:
        for format_, said in ((Format.EVENTS, STDOUT), (Format.RAW, b"x")):
            head = began(format_).replace(b"Transfer-Encoding: chunked\r\n", b"")
            body, _ = await self.run_it(format_, head, said, End.CLOSE)
            self.assertEqual(said + LOST[format_], body)

    async def test_one_that_does_not_speak_in_events_is_cut_off_and_lost(self) -> None:
        for nonsense in (b"hello\n\n", b'event: stdout\ndata: {"a": 1}\n\n', EXIT + STDOUT):
            client, server = await self.start(Format.EVENTS, began(Format.EVENTS), chunk(STDOUT))
            await client.receive_until(STDOUT)
            await server.peers[0].send(chunk(nonsense))
            _, body = parse_response(await client.receive_all())
            self.assertEqual(STDOUT + LOST[Format.EVENTS], body)
            await server.peers[0].receive_all()

    async def test_one_that_says_more_than_it_may_is_cut_off(self) -> None:
        event = b'event: stdout\ndata: "%b"\n\n' % PIECE
        limited = {
            Format.EVENTS: b'event: exit\ndata: {"code": 125, "reason": "output-limit"}\n\n',
            Format.RAW: b"\nexit: 125 output-limit\n",
        }
        for format_, piece, told in (
            (Format.EVENTS, event, write_output(Format.EVENTS, "stdout", PIECE.decode()) * 16),
            (Format.RAW, PIECE, PIECE * 16 + b"x" * 64),
        ):
            body, exit_ = await self.run_it(format_, began(format_), *[chunk(piece)] * 20)
            self.assertEqual(Exit.forced(Reason.OUTPUT_LIMIT), exit_)
            self.assertTrue(body == told + limited[format_], body[-200:])

    async def test_an_exit_event_is_an_end_however_the_connection_ends_after_it(self) -> None:
        endless = began(Format.EVENTS).replace(b"Transfer-Encoding: chunked\r\n", b"")
        for said in (began(Format.EVENTS) + chunk(STDOUT + EXIT), endless + STDOUT + EXIT):
            for end in End:
                found = await self.run_it(Format.EVENTS, said, end)
                self.assertEqual((STDOUT + EXIT, Exit(3)), found)

    async def test_a_raw_runs_last_line_may_be_the_scripts_and_is_none(self) -> None:
        endless = began(Format.RAW).replace(b"Transfer-Encoding: chunked\r\n", b"")
        line = b"\nexit: 0\n"
        for said in (began(Format.RAW) + chunk(line), endless + line):
            body, exit_ = await self.run_it(Format.RAW, said, End.CLOSE)
            self.assertEqual(line + LOST[Format.RAW], body)
            self.assertEqual(Exit.forced(Reason.WORKER_LOST), exit_)


class WorkerErrorTests(ProxyTestCase):
    async def test_what_is_no_workers_answer_is_an_error_and_nothing_is_sent(self) -> None:
        head = began(Format.EVENTS)
        other, url = self.serve_script([])
        elsewhere = f"Location: {url}/run"
        cases = [
            ("status 302", began(Format.EVENTS, elsewhere).replace(b"200 OK", b"302 Found")),
            (
                "status 307",
                began(Format.EVENTS, elsewhere).replace(b"200 OK", b"307 Temporary Redirect"),
            ),
            ("status 401", head.replace(b"200 OK", b"401 Unauthorized")),
            ("status 500", head.replace(b"200 OK", b"500 Internal Server Error")),
            ("status 201", head.replace(b"200 OK", b"201 Created")),
            ("unexpected content type", began(Format.RAW)),
            ("unexpected content type", began(Format.EVENTS, "Content-Type: text/html")),
            ("unexpected content type", b"HTTP/1.1 200 OK\r\n\r\n"),
            ("another machine", head.replace(b"m1", b"m2")),
            ("another machine", began(Format.EVENTS, "Worker: m2")),
            ("MalformedResponseError", began(Format.EVENTS, "Content-Encoding: gzip")),
            ("MalformedResponseError", began(Format.EVENTS, "Content-Encoding: identity, gzip")),
            ("no response", head.replace(b"chunked", b"gzip")),
            ("no response", head.replace(b"HTTP/1.1", b"SSH-2.0")),
        ]
        for why, said in cases:
            client, server = await self.start(Format.EVENTS, said + chunk(EXIT))
            peer = await server.requested.get()
            await peer.receive_all()
            await wait_until(lambda: self.front.relay.called)
            error = self.failureResultOf(self.front.relay, WorkerError).value
            self.assertIn(why, str(error), said)
            self.assertEqual(b"", bytes(client.received))
            self.assertEqual(1, len(server.peers))
        self.assertEqual([], other.peers)
        await self.until_clean()

    async def test_a_worker_that_ends_before_it_answers_is_an_error(self) -> None:
        for script in ([End.CLOSE], [End.RESET], [b"HTTP/1.1 200 OK\r\nContent-", End.CLOSE]):
            client, server = await self.start(Format.EVENTS, *script)
            await wait_until(lambda: self.front.relay.called)
            self.failureResultOf(self.front.relay, WorkerError)
            self.assertEqual(b"", bytes(client.received))
            self.assertEqual(1, len(server.peers))

    async def test_a_worker_that_is_not_there_is_an_error(self) -> None:
        for self.front.url in ("http://127.0.0.1:1", None):
            client = await self.call(self.port, post("/run", b"script"))
            await wait_until(lambda: self.front.relay.called)
            self.failureResultOf(self.front.relay, WorkerError)
            self.assertEqual(b"", bytes(client.received))

    async def test_a_kind_with_a_charset_and_no_worker_named_will_do(self) -> None:
        head = began(Format.EVENTS).replace(b"Worker: m1\r\n", b"")
        ours = Format.EVENTS.value.encode()
        self.assertIn(ours, head)
        for kind in (b"text/event-stream", b"Text/Event-Stream ; charset=UTF-8"):
            answer = await self.run_it(Format.EVENTS, head.replace(ours, kind), chunk(EXIT), LAST_CHUNK)
            self.assertEqual((EXIT, Exit(3)), answer)


class CancelTests(ProxyTestCase):
    async def test_it_closes_the_connection_to_the_worker_and_leaves_the_answer(self) -> None:
        for said, heard in (
            (b"", b""),
            (began(Format.RAW), b"\r\n\r\n"),
            (began(Format.RAW) + chunk(b"some"), b"some"),
        ):
            client, server = await self.start(Format.RAW, said)
            peer = await server.requested.get()
            await client.receive_until(heard)
            self.front.relay.cancel()
            self.failureResultOf(self.front.relay, CancelledError)
            await peer.receive_all()
            self.assertIsNone(client.end)

    async def test_a_client_that_goes_away_ends_it_at_once(self) -> None:
        for format_ in Format:
            await self.gone(format_)

    async def gone(self, format_: Format) -> None:
        client, server = await self.start(format_, began(format_))
        await client.receive_until(b"\r\n\r\n")
        client.transport.abortConnection()
        await server.peers[0].receive_all()
        self.failureResultOf(self.front.relay, CancelledError)
        await self.until_clean()


class ReadyTests(ProxyTestCase):
    def wait(self, url: str) -> Deferred[None]:
        """Wait for a machine on Fly, whose app's proxy is there."""
        proxy = WorkerClient(self.clock, url, 0, single_use_agent(reactor))
        return Deferred.fromCoroutine(proxy.wait_until_ready(machine(None)))

    async def until_ready(self, waiting: Deferred[None]) -> None:
        """Let the time between probes pass."""

        def passed() -> bool:
            self.clock.advance(0.01)
            return waiting.called

        await wait_until(passed)
        await waiting

    async def test_it_tries_again_until_an_answer_below_500(self) -> None:
        ok = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for last in (b"HTTP/1.1 404 Not Found\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", ok):
            server, url = self.serve_script(
                [b"HTTP/1.1 500 Internal Server Error\r\n\r\n"],
                [b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"],
                [End.CLOSE],
                [End.RESET],
                [b"nonsense\r\n\r\n"],
                [b"HTTP/1.1 103 Early Hints\r\n\r\n"] * 6,
                [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 65],
                [last],
            )
            await self.until_ready(self.wait(url))
            self.assertEqual(8, len(server.peers))
            for peer in server.peers:
                await peer.receive_all()
        await self.until_clean()

    async def test_a_worker_that_does_not_listen_yet_is_tried_again(self) -> None:
        server = ScriptedServer([b"HTTP/1.1 200 OK\r\n\r\n"])
        port = reactor.listenTCP(0, server, interface="127.0.0.1")
        number = port.getHost().port
        await port.stopListening()
        waiting = self.wait(f"http://127.0.0.1:{number}")
        for _ in range(3):
            await wait_until(lambda: len(self.clock.getDelayedCalls()) == 2)
            self.clock.advance(0.25)
        self.assertNoResult(waiting)
        port = reactor.listenTCP(number, server, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        await self.until_ready(waiting)
        await server.peers[-1].receive_all()

    async def test_whoever_has_a_local_machines_port_is_not_its_worker(self) -> None:
        unknown = [b"HTTP/1.1 200 OK\r\n\r\n"], [b"HTTP/1.1 200 OK\r\nWorker: m2\r\n\r\n"]
        server, url = self.serve_script(*unknown, [b"HTTP/1.1 200 OK\r\nWorker: m1\r\n\r\n"])
        await self.until_ready(Deferred.fromCoroutine(self.proxy.wait_until_ready(machine(url))))
        self.assertEqual(3, len(server.peers))
        await self.until_clean()

    async def test_a_silent_worker_is_given_two_seconds(self) -> None:
        server, url = self.serve_script([], [b"HTTP/1.1 200 OK\r\n\r\n"])
        waiting = self.wait(url)
        peer = await server.requested.get()
        self.clock.advance(1.9)
        self.assertNoResult(waiting)
        self.assertIsNone(peer.end)
        self.clock.advance(0.1)
        await peer.receive_all()
        await self.until_ready(waiting)

    async def test_cancelling_ends_it_wherever_it_is(self) -> None:
        server, url = self.serve_script([])
        for there in (url, url.replace("127.0.0.1", "[::1]")):
            connecting = self.wait(there)
            connecting.cancel()
            self.failureResultOf(connecting, CancelledError)
        silent = self.wait(url)
        peer = await server.requested.get()
        silent.cancel()
        self.failureResultOf(silent, CancelledError)
        await peer.receive_all()
        _, url = self.serve_script([b"HTTP/1.1 500 No\r\n\r\n"])
        pausing = self.wait(url)
        await wait_until(lambda: [call for call in self.clock.getDelayedCalls() if call.getTime() < 1])
        pausing.cancel()
        self.failureResultOf(pausing, CancelledError)
        await self.until_clean()


@implementer(IPushProducer)
class Torrent:
    """Says as much as it is let, up to a total."""

    def __init__(self, peer: Peer, total: int) -> None:
        self._peer = peer
        self._left = total
        self.said = 0
        self._paused = True
        self.stopped = False
        peer.transport.registerProducer(self, True)

    def resumeProducing(self) -> None:
        self._paused = False
        while self._left and not self._paused:
            self._left -= len(PIECE)
            self.said += len(PIECE)
            self._peer.transport.write(chunk(PIECE))
        if not self._left:
            self._peer.transport.unregisterProducer()
            self._peer.transport.write(chunk(b"\nexit: 0\n") + LAST_CHUNK)

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._left = 0
        self.stopped = True


class PaceTests(ProxyTestCase):
    TOTAL = 96 << 20
    MAX_OUTPUT = TOTAL

    async def test_a_client_that_does_not_read_stops_the_worker_and_loses_nothing(self) -> None:
        client, _ = await self.stall()
        client.transport.resumeProducing()
        _, body = parse_response(await client.receive_all())
        self.assertEqual(self.TOTAL + len(b"\nexit: 0\n"), len(body))
        self.assertEqual(Exit(0), self.successResultOf(self.front.relay))

    async def test_a_stalled_client_still_gets_all_that_was_taken_and_its_exit(self) -> None:
        client, torrent = await self.stall()
        self.front.relay.cancel()
        self.failureResultOf(self.front.relay, CancelledError)
        self.front.answer.end(Exit.forced(Reason.TIMEOUT))
        await wait_until(lambda: torrent.stopped)
        client.transport.resumeProducing()
        _, body = parse_response(await client.receive_all())
        self.assertEqual(self.front.answer.bytes_written, len(body))
        self.assertTrue(body.endswith(b"x\nexit: 124 timeout\n"))

    async def stall(self) -> tuple[Peer, Torrent]:
        """Begin a run whose worker says much and whose client, in the end, does not read."""
        client, server = await self.start(Format.RAW, began(Format.RAW))
        await client.receive_until(b"\r\n\r\n")
        client.transport.pauseProducing()
        torrent = Torrent(server.peers[0], self.TOTAL)
        torrent.resumeProducing()
        self.assertLess(await self.settled(torrent), self.TOTAL // 2)
        self.assertNoResult(self.front.relay)
        return client, torrent

    async def settled(self, torrent: Torrent) -> int:
        """What was said once no more is, for a hundred turns."""
        quiet, said = 0, 0

        def still() -> bool:
            nonlocal quiet, said
            quiet = quiet + 1 if said == torrent.said else 0
            said = torrent.said
            return quiet == 100

        await wait_until(still)
        return said
