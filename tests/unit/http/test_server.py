from __future__ import annotations

import tempfile
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ClassVar

from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.task import Clock
from zope.interface import directlyProvides

from bfaas.http.channel import Channel
from bfaas.http.errors import HTTPError
from bfaas.http.server import BoundedSite, read_body, register_error_handlers, text_response
from tests.support.hostile_worker import LAST_CHUNK, LoopbackTestCase, Peer, chunk, post, reactor
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from twisted.web.server import Request

MUCH = 16 << 20
MALFORMED = "malformed request, or request head too large\n"
CHUNKED = b"POST /run HTTP/1.1\r\nHost: there\r\nTransfer-Encoding: chunked\r\n\r\n"


class App:
    """A small application that records request bodies and cancellations."""

    app = Klein()
    register_error_handlers(app)

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.cancelled = 0

    @app.route("/run", methods=["POST"])
    async def run(self, request: Request) -> bytes:
        self.bodies.append(read_body(request))
        return b"ran"

    @app.route("/busy", methods=["POST"])
    async def busy(self, _: Request) -> bytes:
        raise HTTPError(503, "busy", {"Retry-After": "7"})

    @app.route("/bye", methods=["POST"])
    def bye(self, request: Request) -> bytes:
        request.setHeader("Connection", "close")
        return b"bye"

    @app.route("/ok", methods=["GET"])
    def ok(self, request: Request) -> bytes:
        return text_response(request, "ok")

    @app.route("/much", methods=["POST"])
    async def much(self, _: Request) -> bytes:
        return b"x" * MUCH

    @app.route("/wait", methods=["POST"])
    async def wait(self, request: Request) -> bytes:
        self.bodies.append(read_body(request))
        try:
            await Deferred()
        except CancelledError:
            self.cancelled += 1
            raise
        raise AssertionError


class SiteTestCase(LoopbackTestCase):
    limits: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        self.clock = Clock()
        self.app = App()
        self.site = BoundedSite(self.clock, self.app.app.resource(), **{"max_body": 10, **self.limits})
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not self.site.protocols)))
        self.port = self.listen(self.site)

    async def request(self, request: bytes) -> tuple[int, str, dict[str, str]]:
        """Send a request; return the status, the body and the headers that the application set."""
        peer = await self.call(self.port, request)
        response, content = parse_response(await peer.receive_all())
        self.assertTrue(peer.closed_cleanly)
        ignored = ("Server", "Date", "Connection", "Content-Length", "Transfer-Encoding")
        headers = {name: value for name, value in response.getheaders() if name not in ignored}
        return response.status, content.decode(), headers

    def assert_no_timer(self) -> None:
        # The remaining timer is that of twisted.web.server.Site, for its log.
        self.assertEqual(1, len(self.clock.getDelayedCalls()))

    def drain(self, limit: float) -> Deferred[None]:
        return Deferred.fromCoroutine(self.site.drain(limit))


class ErrorTests(SiteTestCase):
    async def test_errors_are_one_line_of_text(self) -> None:
        text = {"Content-Type": "text/plain; charset=utf-8"}
        not_found = (404, "not found\n", text)
        not_allowed = (405, "method not allowed\n", {**text, "Allow": "POST"})
        not_supported = (501, "method not supported\n", text)
        malformed = (400, MALFORMED, text)
        get = b"GET %b HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n"
        cases = {
            post("/busy", b""): (503, "busy\n", {**text, "Retry-After": "7"}),
            post("/", b""): not_found,
            post("//run", b""): not_found,
            post("///run", b""): not_found,
            post("/run/", b""): not_found,
            post("/Run", b""): not_found,
            post("/run%2F", b""): not_found,
            post("/%2frun", b""): not_found,
            post("/run%ff", b""): not_found,
            post("/missing", b"").replace(b"localhost", b"a..b:c"): not_found,
            post("/missing", b"").replace(b"localhost", b"\xff"): malformed,
            get.replace(b"Host: there\r\n", b"") % b"/missing": malformed,
            get.replace(b"GET", b"CONNECT") % b"there:80": not_supported,
            get.replace(b"GET", b"OPTIONS") % b"/run": not_allowed,
            post("/run", b"").replace(b"POST", b"post"): not_supported,
            get.replace(b"GET", b"Head") % b"/ok": not_supported,
            get % b"/missing": not_found,
            get % b"/run": not_allowed,
            get.replace(b"GET", b"PUT") % b"/run": not_allowed,
            get.replace(b"GET", b"BREW") % b"/run": not_allowed,
        }
        for request, expected in cases.items():
            self.assertEqual(expected, await self.request(request), request)
        self.assertEqual([], self.app.bodies)

    async def test_errors_have_a_date_and_announce_a_closed_connection(self) -> None:
        complete = post("/missing", b"").replace(b"Connection: close\r\n", b"")
        chunked = complete.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        requests = [
            complete,
            complete.replace(b"/missing", b"//missing"),
            complete.replace(b"/missing", b"/busy"),
            complete.replace(b"POST", b"CONNECT"),
            complete.replace(b"/missing", b"ftp://localhost/missing"),
            complete.replace(b"\r\n\r\n", b"\r\nExpect: a-miracle\r\n\r\n"),
            complete.replace(b"Length: 0", b"Length: 11"),
            complete.replace(b"Host: localhost\r\n", b""),
            complete.replace(b"/missing", b"/missing none"),
            complete.replace(b"HTTP/1.1", b"HTTP/1.0"),
            chunked + chunk(b"x" * 11) + LAST_CHUNK,
            b"\x16\x03\x01",
        ]
        persistent = 0
        for request in requests:
            peer = await self.call(self.port, request)
            await peer.receive_until(
                b"\n\r\n" if b"Transfer-Encoding: chunked" in peer.received else b"\r\n\r\n"
            )
            response, _ = parse_response(bytes(peer.received) + b"x" * 100)
            self.assertGreaterEqual(response.status, 400)
            date = parsedate_to_datetime(response.headers["Date"])
            self.assertLess(abs(date.timestamp() - time.time()), 60)
            self.assertEqual(1, len(response.headers.get_all("Date", [])))
            self.assertIn("Content-Length", response.headers)
            self.assertEqual(response.status == 503, "Retry-After" in response.headers)
            if response.headers["Connection"] == "close":
                self.assertIn(bytes(peer.received), await peer.receive_all())
            else:
                peer.received.clear()
                await peer.send(post("/run", b""))
                await peer.receive_until(b"ran")
                persistent += 1
        self.assertEqual(3, persistent)

    async def test_connection_close_of_either_side_ends_the_connection(self) -> None:
        for options in (["close"], ["TE, Close"], ["keep-alive,close"], ["TE", "close"]):
            lines = "".join(f"Connection: {option}\r\n" for option in options).encode()
            request = post("/run", b"").replace(b"Connection: close\r\n", lines)
            peer = await self.call(self.port, request)
            response, content = parse_response(await peer.receive_all())
            self.assertEqual((b"ran", "close"), (content, response.getheader("Connection")), options)
        persistent_request = post("/bye", b"").replace(b"Connection: close\r\n", b"")
        response, content = parse_response(
            await (await self.call(self.port, persistent_request)).receive_all()
        )
        self.assertEqual((b"bye", "close"), (content, response.getheader("Connection")))

    async def test_head_gets_the_headers_of_get_without_a_body(self) -> None:
        for path in (b"/ok", b"/missing", b"//missing"):
            heads = []
            for method in (b"GET", b"HEAD"):
                request = b"%b %b HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n" % (method, path)
                head, _, content = (await (await self.call(self.port, request)).receive_all()).partition(
                    b"\r\n\r\n"
                )
                self.assertEqual(method == b"HEAD", content == b"")
                heads.append([line for line in head.split(b"\r\n") if not line.startswith(b"Date:")])
            self.assertEqual(*heads)

    async def test_unsupported_expectations_get_417(self) -> None:
        for value, status in (
            ("100-Continue", 200),
            ("100-continue, a-miracle", 417),
            ("a-miracle=1", 417),
            ("100-continue\r\nExpect: a-miracle", 417),
            ("", 200),
        ):
            peer = await self.call(self.port, post("/run", b"abc", f"Expect: {value}"))
            heard = (await peer.receive_all()).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
            self.assertEqual(status, parse_response(heard)[0].status, value)
        self.assertEqual(2, len(self.app.bodies))
        waiting = post("/run", b"abc", "Expect: a-miracle")[:-3]
        self.assertEqual(417, (await self.request(waiting))[0])
        old = post("/run", b"", "Expect: a-miracle").replace(b"HTTP/1.1", b"HTTP/1.0")
        self.assertEqual(200, (await self.request(old))[0])

    async def test_absolute_targets_must_match_the_host_header(self) -> None:
        def to(target: str, host: str, version: str = "1.1", method: str = "POST") -> bytes:
            lines = [f"{method} {target} HTTP/{version}", *([f"Host: {host}"] if host else [])]
            return "\r\n".join([*lines, "Connection: close", "Content-Length: 1", "", "x"]).encode()

        ours = [
            to("http://there/run", "there"),
            to("HTTP://There/run?raw=1", "tHERE"),
            to("http://there:80/run", "there"),
            to("http://there/run", "there:80"),
            to("http://there:/run", "there"),
            to("http://there:8000/run", "there:8000"),
            to("http://[::1]/run", "[::1]"),
            to("http://[::1]:80/run", "[::1]"),
            to("http://there/run", "", "1.0"),
        ]
        for request in ours:
            self.assertEqual((200, "ran", {}), await self.request(request), request)
        self.assertEqual([b"x"] * len(ours), self.app.bodies)
        self.assertEqual(404, (await self.request(to("http://there", "there")))[0])
        self.assertEqual(404, (await self.request(to("http://there?/run", "there")))[0])
        for request in (
            to("http://elsewhere/run", "there"),
            to("http://there:8000/run", "there"),
            to("http://there:443/run", "there"),
            to("http://there/run", "there:8000"),
            to("https://there/run", "there"),
            to("http://a@there/run", "there"),
            to("http://a@there/run", "a@there"),
            to("ftp://there/run", "there"),
            to("file:///run", "there"),
            to("http:///run", "there"),
            to("http:/run", "there"),
            to("http://there/run#x", "there"),
            to("http://elsewhere/run", "there", "1.0"),
            to("run", "there"),
            to("there:80", "there"),
            to("there/run", "there"),
            to("*", "there"),
            to("?raw=1", "there"),
            to("http://there/run", ""),
        ):
            self.assertEqual(400, (await self.request(request))[0], request)
        self.assertEqual(len(ours), len(self.app.bodies))
        self.assertEqual(200, (await self.request(to("*", "there", method="OPTIONS")))[0])

    async def test_data_after_a_malformed_request_is_ignored(self) -> None:
        peer = await self.call(self.port)
        peer.transport.pauseProducing()
        await peer.send(b"POST /run HTTP/1.1\r\nnonsense\r\nContent-Length: 0\r\n")
        await wait_until(lambda: any(wrapper.disconnecting for wrapper in self.site.protocols))
        for _ in range(3):
            await peer.send(b"\r\n")
        drained = self.drain(60)
        peer.transport.resumeProducing()
        response, content = parse_response(await peer.receive_all())
        self.assertEqual((400, MALFORMED), (response.status, content.decode()))
        await drained
        self.assertEqual([], self.app.bodies)


class BodyTests(SiteTestCase):
    async def test_bodies_up_to_the_limit_are_accepted(self) -> None:
        self.assertEqual((200, "ran", {}), await self.request(post("/run", b"0123456789")))
        peer = await self.call(self.port, CHUNKED + chunk(b"01234") + chunk(b"56789") + LAST_CHUNK)
        await peer.receive_until(b"ran")
        self.assertEqual([b"0123456789", b"0123456789"], self.app.bodies)

    async def test_bodies_over_the_limit_get_413_and_are_not_dispatched(self) -> None:
        bodies = {
            "with a length": post("/run", b"0123456789a").partition(b"\r\n\r\n")[::2],
            "in one chunk": (CHUNKED[:-4], chunk(b"0123456789a") + LAST_CHUNK),
            "in two chunks": (CHUNKED[:-4], chunk(b"0123456789") + chunk(b"a") + LAST_CHUNK),
        }
        for way, (head, content) in bodies.items():
            for pieces in ([head + b"\r\n\r\n" + content], [head + b"\r\n\r\n", content[:12], content[12:]]):
                peer = await self.call(self.port)
                for piece in pieces:
                    await peer.send(piece)
                heard = await peer.receive_until(b"the body is larger than 10 bytes\n")
                self.assertEqual(b"HTTP/1.1 413 Request Entity Too Large", heard.splitlines()[0], way)
        self.assertEqual([], self.app.bodies)

    async def test_requests_after_a_rejected_body_are_ignored(self) -> None:
        peer = await self.call(
            self.port, CHUNKED + chunk(b"0123456789a") + LAST_CHUNK + post("/run", b"next")
        )
        response, _ = parse_response(await peer.receive_all())
        self.assertEqual((413, "close"), (response.status, response.getheader("connection")))
        self.assertEqual([], self.app.bodies)

    async def test_content_length_over_the_limit_gets_413_without_100_continue(self) -> None:
        head = b"POST /run HTTP/1.1\r\nHost: there\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        peer = await self.call(self.port, head % 11)
        self.assertEqual(413, parse_response(await peer.receive_all())[0].status)
        peer = await self.call(self.port, head % 10)
        self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", await peer.receive_until(b"\r\n\r\n"))
        await peer.send(b"0123456789")
        await peer.receive_until(b"ran")
        self.assertEqual([b"0123456789"], self.app.bodies)

    async def test_endless_uploads_are_aborted(self) -> None:
        for head in (CHUNKED, CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000000")):
            peer = await self.call(self.port)
            peer.readConnectionLost = lambda: None  # type: ignore[attr-defined]  # ignores the half-close
            directlyProvides(peer, IHalfCloseableProtocol)
            await peer.send(head)
            sent = 0
            while peer.end is None:
                sent += 1 << 20
                await peer.send(chunk(b"x" * (1 << 20)))
            self.assertIn(b"413", peer.received)
            self.assertLess(sent, 64 << 20)
        self.assertEqual([], self.app.bodies)


class DiskTests(SiteTestCase):
    limits: ClassVar = {"max_body": 1 << 20}

    async def test_body_gets_503_if_it_cannot_be_stored(self) -> None:
        self.patch(tempfile, "tempdir", "/missingxistent")
        complete = post("/run", b"x" * (1 << 14))
        self.assertEqual(200, (await self.request(complete))[0])
        more = post("/run", b"x" * ((1 << 14) + 1))
        text = {"Content-Type": "text/plain; charset=utf-8"}
        self.assertEqual(
            (503, "cannot store the request body\n", {**text, "Retry-After": "1"}), await self.request(more)
        )
        self.assertEqual(1, len(self.app.bodies))


class TimeoutTests(SiteTestCase):
    async def test_slow_requests_get_408(self) -> None:
        slow = post("/run", b"0123456789")
        cases = {"in its head": 30, "at its first byte": 1, "in its body": len(slow) - 3}
        for way, start in cases.items():
            peer = await self.call(self.port, slow[:start])
            await wait_until(lambda: self.channel()._in_request)
            self.clock.advance(14)
            await peer.send(slow[start : start + 1])
            self.clock.advance(0.9)
            self.assertEqual(1, len(self.site.protocols), way)
            self.clock.advance(0.2)
            response, content = parse_response(await peer.receive_all())
            self.assertEqual((408, "the request was not complete within 15 s\n"),
                             (response.status, content.decode()), way)  # fmt: skip
            await wait_until(lambda: not self.site.protocols)
            self.assert_no_timer()
        self.assertEqual([], self.app.bodies)

    async def test_idle_connections_are_closed_after_a_minute(self) -> None:
        idle = await self.call(self.port)
        await wait_until(lambda: self.site.protocols)
        self.clock.advance(59)
        self.assertEqual(1, len(self.site.protocols))
        self.clock.advance(1)
        self.assertEqual(b"", await idle.receive_all())
        self.assertTrue(idle.closed_cleanly)

        peer = await self.call(self.port)
        for _ in range(3):
            await peer.send(post("/run", b"").replace(b"Connection: close\r\n", b""))
            await peer.receive_until(b"ran")
            peer.received.clear()
            self.clock.advance(59)
        self.assertEqual(1, len(self.site.protocols))
        self.clock.advance(1)
        self.assertEqual(b"", await peer.receive_all())
        await wait_until(lambda: not self.site.protocols)
        self.assert_no_timer()

    async def test_responses_have_no_timeout(self) -> None:
        peer = await self.call(self.port, post("/wait", b""))
        await wait_until(lambda: self.app.bodies)
        self.clock.advance(600)
        self.assertEqual(0, self.app.cancelled)
        peer.transport.loseConnection()
        await wait_until(lambda: self.app.cancelled)

    def channel(self) -> Channel:
        [connection] = self.site.protocols
        channel = connection.wrappedProtocol
        assert isinstance(channel, Channel)
        return channel


class PipelineTests(SiteTestCase):
    async def test_pipelined_requests_are_ignored(self) -> None:
        persistent = post("/run", b"1").replace(b"Connection: close\r\n", b"")
        bodiless = persistent.replace(b"1: 1\r\n\r\n1", b"0\r\n\r\n")
        for first in (persistent, bodiless):
            peer = await self.call(self.port, first + post("/run", b"2"))
            self.assertEqual(1, (await peer.receive_all()).count(b"HTTP/1.1 200"))
            self.assertTrue(peer.closed_cleanly)
        self.assertNotIn(b"2", self.app.bodies)

    async def test_too_much_data_during_a_response_aborts_it(self) -> None:
        peer = await self.call(self.port, post("/wait", b"1"))
        await wait_until(lambda: self.app.bodies)
        for _ in range(64):
            await peer.send(b"x" * 1024)
        self.assertEqual(0, self.app.cancelled)
        await peer.send(b"x")
        await wait_until(lambda: self.app.cancelled)
        await peer.receive_all()


class ConnectionLimitTests(SiteTestCase):
    limits: ClassVar = {"max_connections": 3, "max_per_address": 2}

    async def test_connections_over_the_limits_are_closed_at_once(self) -> None:
        async def call(address: str) -> Peer:
            endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", self.port, bindAddress=(address, 0))
            peer: Peer = await connectProtocol(endpoint, Peer())
            self.addCleanup(lambda: Deferred.fromCoroutine(self._close([peer])))
            return peer

        crowd = [await call("127.0.0.2") for _ in range(2)]
        await wait_until(lambda: len(self.site.protocols) == 2)
        await (await call("127.0.0.2")).receive_all()
        crowd.append(await call("127.0.0.3"))
        await wait_until(lambda: len(self.site.protocols) == 3)
        await (await call("127.0.0.4")).receive_all()
        self.assertEqual([None] * 3, [peer.end for peer in crowd])

        crowd[0].transport.loseConnection()
        await wait_until(lambda: len(self.site.protocols) == 2)
        again = await call("127.0.0.2")
        await again.send(post("/run", b"again"))
        await again.receive_until(b"ran")


class DisconnectTests(SiteTestCase):
    async def test_close_and_half_close_cancel_the_request(self) -> None:
        closed = await self.call(self.port, post("/wait", b"1"))
        half_closed = await self.call(self.port, post("/wait", b"2"))
        await wait_until(lambda: len(self.app.bodies) == 2)
        closed.transport.loseConnection()
        half_closed.transport.loseWriteConnection()
        await wait_until(lambda: self.app.cancelled == 2)
        await half_closed.receive_all()
        self.assertEqual(b"", bytes(half_closed.received))

    async def test_disconnect_during_the_body_discards_the_request(self) -> None:
        peer = await self.call(self.port, post("/run", b"0123")[:-1])
        await wait_until(lambda: self.site.protocols)
        peer.transport.loseWriteConnection()
        await peer.receive_all()
        self.assertEqual([], self.app.bodies)


class DrainTests(SiteTestCase):
    async def test_drain_waits_until_output_is_delivered(self) -> None:
        peer = await self.call(self.port, post("/much", b""))
        await peer.receive_until(b"x")
        peer.transport.pauseProducing()
        drained = self.drain(60)
        self.clock.advance(59)
        self.assertNoResult(drained)
        peer.transport.resumeProducing()
        self.assertEqual(MUCH, len(parse_response(await peer.receive_all())[1]))
        self.assertTrue(peer.closed_cleanly)
        await drained
        self.assert_no_timer()

    async def test_drain_aborts_clients_that_do_not_read_in_time(self) -> None:
        peer = await self.call(self.port, post("/much", b""))
        await peer.receive_until(b"x")
        peer.transport.pauseProducing()
        drained = self.drain(60)
        self.clock.advance(60)
        await drained
        self.assertEqual({}, self.site.protocols)
        peer.transport.resumeProducing()
        await peer.receive_all()
        self.assertFalse(peer.closed_cleanly)
        self.assertLess(len(peer.received), MUCH)

    async def test_client_that_does_not_close_is_aborted(self) -> None:
        peer = await self.call(self.port)
        peer.transport.pauseProducing()
        await peer.send(post("/run", b""))
        await wait_until(lambda: [wrapper for wrapper in self.site.protocols if wrapper._lingering])
        self.clock.advance(59.9)
        self.assertEqual(1, len(self.site.protocols))
        self.clock.advance(0.1)
        await wait_until(lambda: not self.site.protocols)
        self.assert_no_timer()

    async def test_drain_closes_idle_connections_and_ignores_late_requests(self) -> None:
        peer = await self.call(self.port, post("/run", b"").replace(b"Connection: close\r\n", b""))
        await peer.receive_until(b"ran")
        drained = self.drain(60)
        await peer.send(post("/run", b"late"))
        await drained
        await peer.receive_all()
        self.assertEqual([b""], self.app.bodies)

    async def test_drain_returns_at_once_without_connections(self) -> None:
        self.assertIsNone(self.successResultOf(self.drain(60)))
        self.assert_no_timer()
