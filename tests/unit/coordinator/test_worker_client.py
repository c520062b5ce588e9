"""Tests of the client of the workers, with real connections to workers that may be hostile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
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


def head_of(format_: Format, *headers: str) -> bytes:
    """Return a worker's response head for a client's format; NDJSON is converted from events."""
    content_type = f"Content-Type: {(Format.EVENTS if format_ is Format.NDJSON else format_).value}"
    lines = ["HTTP/1.1 200 OK", content_type, "Worker: m1", "Transfer-Encoding: chunked", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


class OneWorkerResource(Resource):
    """Runs every request on one worker, without a pool."""

    isLeaf = True

    def __init__(self, worker_client: WorkerClient, clock: Clock) -> None:
        super().__init__()
        self._worker_client = worker_client
        self._clock = clock
        self.url: str | None = None
        self.format = Format.EVENTS
        self.exit: Deferred[Exit] = Deferred()

    def render_POST(self, request: Request) -> int:
        self.response = RunResponse(request, self.format, self._clock)
        self.exit = running = Deferred.fromCoroutine(self._run())
        request.notifyFinish().addErrback(lambda _: running.cancel())
        return NOT_DONE_YET

    async def _run(self) -> Exit:
        run_request, headers = RunRequest.plain(b"script"), {"Worker": "m1", "Coord": "c1"}
        target, run_id = machine(self.url), "0" * 16
        worker_response = await self._worker_client.start_run(
            target, "token", run_id, run_request, self.format
        )
        return await self._worker_client.stream(
            target, run_id, worker_response, self.format, self.response, headers
        )


def machine(url: str | None) -> Machine:
    return Machine("m1", "worker-p-1", State.STARTED, "ams", "image", {}, "i1", 0.0, url)


class WorkerClientTestCase(LoopbackTestCase):
    MAX_OUTPUT = 1 << 20

    def setUp(self) -> None:
        # Connections are real; time is not.
        self.clock = Clock()
        self.worker_client = WorkerClient(self.clock, None, self.MAX_OUTPUT, single_use_agent(reactor))
        self.resource = OneWorkerResource(self.worker_client, self.clock)
        self.site = BoundedSite(self.clock, self.resource, max_body=10)
        self.addCleanup(self.consume_result)
        self.port = self.listen(self.site)

    async def consume_result(self) -> None:
        await wait_until(lambda: not self.site.protocols)
        self.resource.exit.addErrback(lambda failure: failure.trap(CancelledError))

    async def start(
        self, format_: Format, *script: bytes | Deferred[None] | End
    ) -> tuple[Peer, ScriptedServer]:
        """Start a run on a worker that follows a script; return the client and the worker."""
        server, self.resource.url = self.serve_script(script)
        self.resource.format = format_
        return await self.send(), server

    async def send(self) -> Peer:
        """Send a request for a run, whose exit is `resource.exit` from now on."""
        self.resource.exit = Deferred()
        return await self.call(self.port, post("/run", b"script"))

    async def run_it(self, format_: Format, *script: bytes | Deferred[None] | End) -> tuple[bytes, Exit]:
        """Run to the end; return the body that the client received, and the exit."""
        client, server = await self.start(format_, *script)
        response, body = parse_response(await client.receive_all())
        self.assertEqual((200, format_.value), (response.status, response.getheader("Content-Type")))
        for peer in server.peers:
            await peer.receive_all()
        return body, self.successResultOf(self.resource.exit)

    async def until_clean(self) -> None:
        """Wait until no timer is left but the site's own, which updates the time of its log."""
        await wait_until(lambda: len(self.clock.getDelayedCalls()) == 1)


class StreamTests(WorkerClientTestCase):
    async def test_run_is_forwarded_unchanged(self) -> None:
        comments = SSE_HEARTBEAT + STDOUT + SSE_HEARTBEAT + STDERR + EXIT + SSE_HEARTBEAT
        raw = b"\0\xff\n" + b"\nexit: 0\n" + b"more\nexit: 3\n"
        for format_, sent, expected in (
            (Format.EVENTS, comments, STDOUT + STDERR + EXIT),
            (Format.RAW, raw, raw),
        ):
            for size in (1, 7, len(sent)):
                pieces = [chunk(sent[at : at + size]) for at in range(0, len(sent), size)]
                found = await self.run_it(format_, head_of(format_), *pieces, LAST_CHUNK, End.CLOSE)
                self.assertEqual((expected, Exit(3)), found)
        await self.until_clean()

    async def test_output_is_forwarded_while_it_is_produced(self) -> None:
        for format_, sent in BOTH:
            more: Deferred[None] = Deferred()
            client, _ = await self.start(format_, head_of(format_), chunk(sent), more, End.CLOSE)
            await client.receive_until(sent)
            self.assertNoResult(self.resource.exit)
            more.callback(None)
            await client.receive_all()

    async def test_head_is_sent_before_output_and_silence_has_heartbeats(self) -> None:
        client, server = await self.start(Format.EVENTS, head_of(Format.EVENTS))
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

    async def test_silence_has_heartbeats_in_ndjson(self) -> None:
        client, _ = await self.start(Format.NDJSON, head_of(Format.NDJSON))
        await client.receive_until(b"\r\n\r\n")
        self.clock.advance(HEARTBEAT_INTERVAL)
        await client.receive_until(b'{"event": "heartbeat"}\n')

    async def test_no_header_of_the_worker_reaches_the_client(self) -> None:
        client, _ = await self.start(
            Format.EVENTS,
            head_of(Format.EVENTS, "Set-Cookie: a=b", "Coord: forged", "Access-Control-Allow-Origin: *"),
            chunk(EXIT) + LAST_CHUNK,
        )
        response, _ = parse_response(await client.receive_all())
        expected = {
            "Connection": "close",
            "Server": response.getheader("Server"),
            "Date": response.getheader("Date"),
            "Transfer-Encoding": "chunked",
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store, no-transform",
            "X-Accel-Buffering": "no",
            "X-Content-Type-Options": "nosniff",
            "Worker": "m1",
            "Coord": "c1",
        }
        self.assertEqual(sorted(expected.items()), sorted(response.getheaders()))

    async def test_worker_gets_one_plain_request_without_cookies_of_others(self) -> None:
        for format_, path in ((Format.EVENTS, "/run"), (Format.RAW, "/run?raw=1")):
            client, server = await self.start(
                format_, head_of(format_, "Set-Cookie: a=b; Path=/"), LAST_CHUNK, End.CLOSE
            )
            await client.receive_all()
            (peer,) = server.peers
            head, body = peer.request() or ([], b"")
            expected = [
                f"POST {path} HTTP/1.1",
                "Accept-Encoding: identity",
                "Authorization: token",
                "Connection: close",
                "Content-Length: 6",
                "Fly-Force-Instance-Id: m1",
                f"Host: {str(self.resource.url).removeprefix('http://')}",
                f"Run-Id: {'0' * 16}",
            ]
            self.assertEqual((expected, b"script"), ([head[0], *sorted(head[1:])], body))

    async def test_machine_without_a_url_is_reached_through_the_proxy_of_its_app(self) -> None:
        server, url = self.serve_script([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
        worker_client = WorkerClient(self.clock, url, 0, single_use_agent(reactor))
        await worker_client.wait_until_ready(machine(None))
        head, _ = server.peers[0].request() or ([], b"")
        self.assertEqual("GET /healthz HTTP/1.1", head[0])
        self.assertIn("Fly-Force-Instance-Id: m1", head)

    async def test_workers_of_the_go_original_are_recognized_by_their_health_response(self) -> None:
        for head, scripts_only in (
            (b"HTTP/1.1 404 Not Found\r\n", True),
            (b"HTTP/1.1 200 OK\r\nWorker: m1\r\n", False),
        ):
            _, url = self.serve_script([head + b"Content-Length: 0\r\n\r\n"])
            worker_client = WorkerClient(self.clock, url, 0, single_use_agent(reactor))
            await worker_client.wait_until_ready(machine(None))
            self.assertEqual(scripts_only, worker_client.scripts_only)


class LostWorkerTests(WorkerClientTestCase):
    async def test_loss_of_a_worker_is_reported_after_its_output(self) -> None:
        for format_, sent in BOTH:
            for end in ([End.CLOSE], [End.RESET], [b"nonsense\r\n"], [LAST_CHUNK]):
                ready_to_end: Deferred[None] = Deferred()
                client, _ = await self.start(format_, head_of(format_), chunk(sent), ready_to_end, *end)
                await client.receive_until(sent)
                ready_to_end.callback(None)
                _, body = parse_response(await client.receive_all())
                self.assertEqual(sent + LOST[format_], body, end)
                self.assertEqual(
                    Exit(125, reason="worker-lost"), self.successResultOf(self.resource.exit), end
                )
        await self.until_clean()

    async def test_ndjson_is_converted_from_events(self) -> None:
        head = head_of(Format.NDJSON)
        body, exit_ = await self.run_it(Format.NDJSON, head, chunk(STDOUT + b": \n\n" + EXIT), LAST_CHUNK)

        line = b'{"event": "stdout", "data": "a\\u001b\xe2\x82\xac"}\n'
        self.assertEqual((line + b'{"event": "exit", "code": 3}\n', Exit(3)), (body, exit_))

    async def test_empty_body_is_a_lost_worker(self) -> None:
        for format_ in Format:
            with capturedLogs() as logs:
                body, _ = await self.run_it(format_, head_of(format_), LAST_CHUNK)
            self.assertEqual(LOST[format_], body)
            [event] = [event for event in logs if "machine" in event]
            self.assertEqual(("0" * 16, "m1"), (event["run"], event["machine"]))
            self.assertEqual(f"run {'0' * 16}: lost the worker on m1: no exit", formatEvent(event))

    async def test_body_without_framing_is_a_lost_worker(self) -> None:
        for format_, sent in ((Format.EVENTS, STDOUT), (Format.RAW, b"x")):
            head = head_of(format_).replace(b"Transfer-Encoding: chunked\r\n", b"")
            body, _ = await self.run_it(format_, head, sent, End.CLOSE)
            self.assertEqual(sent + LOST[format_], body)

    async def test_invalid_events_end_the_connection_and_are_a_lost_worker(self) -> None:
        for nonsense in (b"hello\n\n", b'event: stdout\ndata: {"a": 1}\n\n', EXIT + STDOUT):
            client, server = await self.start(Format.EVENTS, head_of(Format.EVENTS), chunk(STDOUT))
            await client.receive_until(STDOUT)
            await server.peers[0].send(chunk(nonsense))
            _, body = parse_response(await client.receive_all())
            self.assertEqual(STDOUT + LOST[Format.EVENTS], body)
            await server.peers[0].receive_all()

    async def test_output_over_the_limit_ends_the_connection(self) -> None:
        event = b'event: stdout\ndata: "%b"\n\n' % PIECE
        limited = {
            Format.EVENTS: b'event: exit\ndata: {"code": 125, "reason": "output-limit"}\n\n',
            Format.RAW: b"\nexit: 125 output-limit\n",
        }
        for format_, piece, expected in (
            (Format.EVENTS, event, write_output(Format.EVENTS, "stdout", PIECE.decode()) * 16),
            (Format.RAW, PIECE, PIECE * 16 + b"x" * 64),
        ):
            body, exit_ = await self.run_it(format_, head_of(format_), *[chunk(piece)] * 20)
            self.assertEqual(Exit.forced(Reason.OUTPUT_LIMIT), exit_)
            self.assertTrue(body == expected + limited[format_], body[-200:])

    async def test_exit_event_is_final_however_the_connection_ends(self) -> None:
        endless = head_of(Format.EVENTS).replace(b"Transfer-Encoding: chunked\r\n", b"")
        for sent in (head_of(Format.EVENTS) + chunk(STDOUT + EXIT), endless + STDOUT + EXIT):
            for end in End:
                found = await self.run_it(Format.EVENTS, sent, end)
                self.assertEqual((STDOUT + EXIT, Exit(3)), found)

    async def test_exit_line_of_an_incomplete_raw_body_is_not_trusted(self) -> None:
        endless = head_of(Format.RAW).replace(b"Transfer-Encoding: chunked\r\n", b"")
        line = b"\nexit: 0\n"
        for sent in (head_of(Format.RAW) + chunk(line), endless + line):
            body, exit_ = await self.run_it(Format.RAW, sent, End.CLOSE)
            self.assertEqual(line + LOST[Format.RAW], body)
            self.assertEqual(Exit.forced(Reason.WORKER_LOST), exit_)


class WorkerErrorTests(WorkerClientTestCase):
    async def test_invalid_response_is_an_error_and_nothing_is_sent(self) -> None:
        head = head_of(Format.EVENTS)
        other, url = self.serve_script([])
        elsewhere = f"Location: {url}/run"
        cases = [
            ("status 302", head_of(Format.EVENTS, elsewhere).replace(b"200 OK", b"302 Found")),
            (
                "status 307",
                head_of(Format.EVENTS, elsewhere).replace(b"200 OK", b"307 Temporary Redirect"),
            ),
            ("status 401", head.replace(b"200 OK", b"401 Unauthorized")),
            ("status 500", head.replace(b"200 OK", b"500 Internal Server Error")),
            ("status 201", head.replace(b"200 OK", b"201 Created")),
            ("unexpected content type", head_of(Format.RAW)),
            ("unexpected content type", head_of(Format.EVENTS, "Content-Type: text/html")),
            ("unexpected content type", b"HTTP/1.1 200 OK\r\n\r\n"),
            ("another machine", head.replace(b"m1", b"m2")),
            ("another machine", head_of(Format.EVENTS, "Worker: m2")),
            ("MalformedResponseError", head_of(Format.EVENTS, "Content-Encoding: gzip")),
            ("MalformedResponseError", head_of(Format.EVENTS, "Content-Encoding: identity, gzip")),
            ("no response", head.replace(b"chunked", b"gzip")),
            ("no response", head.replace(b"HTTP/1.1", b"SSH-2.0")),
        ]
        for why, sent in cases:
            client, server = await self.start(Format.EVENTS, sent + chunk(EXIT))
            peer = await server.requested.get()
            await peer.receive_all()
            await wait_until(lambda: self.resource.exit.called)
            error = self.failureResultOf(self.resource.exit, WorkerError).value
            self.assertIn(why, str(error), sent)
            self.assertEqual(b"", bytes(client.received))
            self.assertEqual(1, len(server.peers))
        self.assertEqual([], other.peers)
        await self.until_clean()

    async def test_connection_closed_before_the_head_is_an_error(self) -> None:
        for script in ([End.CLOSE], [End.RESET], [b"HTTP/1.1 200 OK\r\nContent-", End.CLOSE]):
            client, server = await self.start(Format.EVENTS, *script)
            await wait_until(lambda: self.resource.exit.called)
            self.failureResultOf(self.resource.exit, WorkerError)
            self.assertEqual(b"", bytes(client.received))
            self.assertEqual(1, len(server.peers))

    async def test_unreachable_worker_is_an_error(self) -> None:
        for self.resource.url in ("http://127.0.0.1:1", None):
            client = await self.send()
            await wait_until(lambda: self.resource.exit.called)
            self.failureResultOf(self.resource.exit, WorkerError)
            self.assertEqual(b"", bytes(client.received))

    async def test_parameters_of_the_content_type_and_a_missing_worker_header_are_accepted(self) -> None:
        head = head_of(Format.EVENTS).replace(b"Worker: m1\r\n", b"")
        ours = Format.EVENTS.value.encode()
        self.assertIn(ours, head)
        for kind in (b"text/event-stream", b"Text/Event-Stream ; charset=UTF-8"):
            result = await self.run_it(Format.EVENTS, head.replace(ours, kind), chunk(EXIT), LAST_CHUNK)
            self.assertEqual((EXIT, Exit(3)), result)


class CancelTests(WorkerClientTestCase):
    async def test_cancelling_closes_the_connection_to_the_worker_and_leaves_the_response(self) -> None:
        for sent, received in (
            (b"", b""),
            (head_of(Format.RAW), b"\r\n\r\n"),
            (head_of(Format.RAW) + chunk(b"some"), b"some"),
        ):
            client, server = await self.start(Format.RAW, sent)
            peer = await server.requested.get()
            await client.receive_until(received)
            self.resource.exit.cancel()
            self.failureResultOf(self.resource.exit, CancelledError)
            await peer.receive_all()
            self.assertIsNone(client.end)

    async def test_disconnecting_client_ends_the_run_at_once(self) -> None:
        for format_ in Format:
            await self.disconnect(format_)

    async def disconnect(self, format_: Format) -> None:
        client, server = await self.start(format_, head_of(format_))
        await client.receive_until(b"\r\n\r\n")
        client.transport.abortConnection()
        await server.peers[0].receive_all()
        self.failureResultOf(self.resource.exit, CancelledError)
        await self.until_clean()


class WaitUntilReadyTests(WorkerClientTestCase):
    def wait(self, url: str) -> Deferred[None]:
        """Wait for a machine on Fly; `url` is that of its app's proxy."""
        worker_client = WorkerClient(self.clock, url, 0, single_use_agent(reactor))
        return Deferred.fromCoroutine(worker_client.wait_until_ready(machine(None)))

    async def until_ready(self, waiting: Deferred[None]) -> None:
        """Advance the clock until the wait is over."""

        def is_ready() -> bool:
            self.clock.advance(0.01)
            return waiting.called

        await wait_until(is_ready)
        await waiting

    async def test_probe_is_repeated_until_a_status_below_500(self) -> None:
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

    async def test_probe_is_repeated_until_the_worker_listens(self) -> None:
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

    async def test_another_program_on_a_local_machines_port_is_not_its_worker(self) -> None:
        unknown = [b"HTTP/1.1 200 OK\r\n\r\n"], [b"HTTP/1.1 200 OK\r\nWorker: m2\r\n\r\n"]
        server, url = self.serve_script(*unknown, [b"HTTP/1.1 200 OK\r\nWorker: m1\r\n\r\n"])
        await self.until_ready(Deferred.fromCoroutine(self.worker_client.wait_until_ready(machine(url))))
        self.assertEqual(3, len(server.peers))
        await self.until_clean()

    async def test_probe_times_out_after_two_seconds(self) -> None:
        server, url = self.serve_script([], [b"HTTP/1.1 200 OK\r\n\r\n"])
        waiting = self.wait(url)
        peer = await server.requested.get()
        self.clock.advance(1.9)
        self.assertNoResult(waiting)
        self.assertIsNone(peer.end)
        self.clock.advance(0.1)
        await peer.receive_all()
        await self.until_ready(waiting)

    async def test_wait_can_be_cancelled_at_any_point(self) -> None:
        server, url = self.serve_script([])
        for address in (url, url.replace("127.0.0.1", "[::1]")):
            connecting = self.wait(address)
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
class FastWriter:
    """Writes as much as it may, up to a total."""

    def __init__(self, peer: Peer, total: int) -> None:
        self._peer = peer
        self._remaining = total
        self.written = 0
        self._paused = True
        self.stopped = False
        peer.transport.registerProducer(self, True)

    def resumeProducing(self) -> None:
        self._paused = False
        while self._remaining and not self._paused:
            self._remaining -= len(PIECE)
            self.written += len(PIECE)
            self._peer.transport.write(chunk(PIECE))
        if not self._remaining:
            self._peer.transport.unregisterProducer()
            self._peer.transport.write(chunk(b"\nexit: 0\n") + LAST_CHUNK)

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._remaining = 0
        self.stopped = True


class BackpressureTests(WorkerClientTestCase):
    TOTAL = 96 << 20
    MAX_OUTPUT = TOTAL

    async def test_client_that_does_not_read_pauses_the_worker_and_loses_nothing(self) -> None:
        client, _ = await self.start_unread()
        client.transport.resumeProducing()
        _, body = parse_response(await client.receive_all())
        self.assertEqual(self.TOTAL + len(b"\nexit: 0\n"), len(body))
        self.assertEqual(Exit(0), self.successResultOf(self.resource.exit))

    async def test_paused_client_gets_all_forwarded_output_and_the_exit(self) -> None:
        client, writer = await self.start_unread()
        self.resource.exit.cancel()
        self.failureResultOf(self.resource.exit, CancelledError)
        self.resource.response.end(Exit.forced(Reason.TIMEOUT))
        await wait_until(lambda: writer.stopped)
        client.transport.resumeProducing()
        _, body = parse_response(await client.receive_all())
        self.assertEqual(self.resource.response.bytes_written, len(body))
        self.assertTrue(body.endswith(b"x\nexit: 124 timeout\n"))

    async def start_unread(self) -> tuple[Peer, FastWriter]:
        """Start a run with a fast worker, and a client that does not read the body."""
        client, server = await self.start(Format.RAW, head_of(Format.RAW))
        await client.receive_until(b"\r\n\r\n")
        client.transport.pauseProducing()
        writer = FastWriter(server.peers[0], self.TOTAL)
        writer.resumeProducing()
        self.assertLess(await self.written_when_paused(writer), self.TOTAL // 2)
        self.assertNoResult(self.resource.exit)
        return client, writer

    async def written_when_paused(self, writer: FastWriter) -> int:
        """Return the bytes written once no more are, for about a second."""
        unchanged, written = 0, 0

        def is_paused() -> bool:
            nonlocal unchanged, written
            unchanged = unchanged + 1 if written == writer.written else 0
            written = writer.written
            return unchanged == 20

        await wait_until(is_paused)
        return written
