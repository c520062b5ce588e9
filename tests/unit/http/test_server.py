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


class Little:
    """A small application."""

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
        self.little = Little()
        self.site = BoundedSite(self.clock, self.little.app.resource(), **{"max_body": 10, **self.limits})
        self.addCleanup(lambda: Deferred.fromCoroutine(wait_until(lambda: not self.site.protocols)))
        self.port = self.listen(self.site)

    async def ask(self, request: bytes) -> tuple[int, str, dict[str, str]]:
        """Make one request; its status, its body, and those of its headers that we set."""
        peer = await self.call(self.port, request)
        answer, content = parse_response(await peer.receive_all())
        self.assertTrue(peer.closed_cleanly)
        dull = ("Server", "Date", "Connection", "Content-Length", "Transfer-Encoding")
        headers = {name: value for name, value in answer.getheaders() if name not in dull}
        return answer.status, content.decode(), headers

    def assert_no_timer(self) -> None:
        # One is the site's own, which keeps the time for its log.
        self.assertEqual(1, len(self.clock.getDelayedCalls()))

    def drain(self, limit: float) -> Deferred[None]:
        return Deferred.fromCoroutine(self.site.drain(limit))


class ErrorTests(SiteTestCase):
    async def test_every_error_is_one_line_of_text(self) -> None:
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
            post("/none", b"").replace(b"localhost", b"a..b:c"): not_found,
            post("/none", b"").replace(b"localhost", b"\xff"): malformed,
            get.replace(b"Host: there\r\n", b"") % b"/none": malformed,
            get.replace(b"GET", b"CONNECT") % b"there:80": not_supported,
            get.replace(b"GET", b"OPTIONS") % b"/run": not_allowed,
            post("/run", b"").replace(b"POST", b"post"): not_supported,
            get.replace(b"GET", b"Head") % b"/ok": not_supported,
            get % b"/none": not_found,
            get % b"/run": not_allowed,
            get.replace(b"GET", b"PUT") % b"/run": not_allowed,
            get.replace(b"GET", b"BREW") % b"/run": not_allowed,
        }
        for request, expected in cases.items():
            self.assertEqual(expected, await self.ask(request), request)
        self.assertEqual([], self.little.bodies)

    async def test_every_error_has_a_date_and_one_that_ends_the_connection_says_so(self) -> None:
        whole = post("/none", b"").replace(b"Connection: close\r\n", b"")
        chunked = whole.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        requests = [
            whole,
            whole.replace(b"/none", b"//none"),
            whole.replace(b"/none", b"/busy"),
            whole.replace(b"POST", b"CONNECT"),
            whole.replace(b"/none", b"ftp://localhost/none"),
            whole.replace(b"\r\n\r\n", b"\r\nExpect: a-miracle\r\n\r\n"),
            whole.replace(b"Length: 0", b"Length: 11"),
            whole.replace(b"Host: localhost\r\n", b""),
            whole.replace(b"/none", b"/none none"),
            whole.replace(b"HTTP/1.1", b"HTTP/1.0"),
            chunked + chunk(b"x" * 11) + LAST_CHUNK,
            b"\x16\x03\x01",
        ]
        persistent = 0
        for request in requests:
            peer = await self.call(self.port, request)
            await peer.receive_until(
                b"\n\r\n" if b"Transfer-Encoding: chunked" in peer.received else b"\r\n\r\n"
            )
            answer, _ = parse_response(bytes(peer.received) + b"x" * 100)
            self.assertGreaterEqual(answer.status, 400)
            date = parsedate_to_datetime(answer.headers["Date"])
            self.assertLess(abs(date.timestamp() - time.time()), 60)
            self.assertEqual(1, len(answer.headers.get_all("Date", [])))
            self.assertIn("Content-Length", answer.headers)
            self.assertEqual(answer.status == 503, "Retry-After" in answer.headers)
            if answer.headers["Connection"] == "close":
                self.assertIn(bytes(peer.received), await peer.receive_all())
            else:
                peer.received.clear()
                await peer.send(post("/run", b""))
                await peer.receive_until(b"ran")
                persistent += 1
        self.assertEqual(3, persistent)

    async def test_a_connection_ends_where_either_side_says_so_in_any_of_its_options(self) -> None:
        for options in (["close"], ["TE, Close"], ["keep-alive,close"], ["TE", "close"]):
            lines = "".join(f"Connection: {option}\r\n" for option in options).encode()
            request = post("/run", b"").replace(b"Connection: close\r\n", lines)
            peer = await self.call(self.port, request)
            answer, content = parse_response(await peer.receive_all())
            self.assertEqual((b"ran", "close"), (content, answer.getheader("Connection")), options)
        kept = post("/bye", b"").replace(b"Connection: close\r\n", b"")
        answer, content = parse_response(await (await self.call(self.port, kept)).receive_all())
        self.assertEqual((b"bye", "close"), (content, answer.getheader("Connection")))

    async def test_the_answer_to_head_has_no_body_and_the_heads_of_the_other(self) -> None:
        for path in (b"/ok", b"/none", b"//none"):
            heads = []
            for method in (b"GET", b"HEAD"):
                request = b"%b %b HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n" % (method, path)
                head, _, content = (await (await self.call(self.port, request)).receive_all()).partition(
                    b"\r\n\r\n"
                )
                self.assertEqual(method == b"HEAD", content == b"")
                heads.append([line for line in head.split(b"\r\n") if not line.startswith(b"Date:")])
            self.assertEqual(*heads)

    async def test_an_expectation_that_cannot_be_met_is_refused(self) -> None:
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
        self.assertEqual(2, len(self.little.bodies))
        waiting = post("/run", b"abc", "Expect: a-miracle")[:-3]
        self.assertEqual(417, (await self.ask(waiting))[0])
        old = post("/run", b"", "Expect: a-miracle").replace(b"HTTP/1.1", b"HTTP/1.0")
        self.assertEqual(200, (await self.ask(old))[0])

    async def test_a_target_in_absolute_form_is_one_of_the_host_that_is_asked(self) -> None:
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
            self.assertEqual((200, "ran", {}), await self.ask(request), request)
        self.assertEqual([b"x"] * len(ours), self.little.bodies)
        self.assertEqual(404, (await self.ask(to("http://there", "there")))[0])
        self.assertEqual(404, (await self.ask(to("http://there?/run", "there")))[0])
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
            self.assertEqual(400, (await self.ask(request))[0], request)
        self.assertEqual(len(ours), len(self.little.bodies))
        self.assertEqual(200, (await self.ask(to("*", "there", method="OPTIONS")))[0])

    async def test_after_a_malformed_request_nothing_is_heard_any_more(self) -> None:
        peer = await self.call(self.port)
        peer.transport.pauseProducing()
        await peer.send(b"POST /run HTTP/1.1\r\nnonsense\r\nContent-Length: 0\r\n")
        await wait_until(lambda: any(wrapper.disconnecting for wrapper in self.site.protocols))
        for _ in range(3):
            await peer.send(b"\r\n")
        drained = self.drain(60)
        peer.transport.resumeProducing()
        answer, content = parse_response(await peer.receive_all())
        self.assertEqual((400, MALFORMED), (answer.status, content.decode()))
        await drained
        self.assertEqual([], self.little.bodies)


class BodyTests(SiteTestCase):
    async def test_up_to_the_limit_a_body_is_taken(self) -> None:
        self.assertEqual((200, "ran", {}), await self.ask(post("/run", b"0123456789")))
        peer = await self.call(self.port, CHUNKED + chunk(b"01234") + chunk(b"56789") + LAST_CHUNK)
        await peer.receive_until(b"ran")
        self.assertEqual([b"0123456789", b"0123456789"], self.little.bodies)

    async def test_past_the_limit_it_is_refused_and_not_half_used(self) -> None:
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
        self.assertEqual([], self.little.bodies)

    async def test_nothing_is_heard_after_a_body_that_was_refused(self) -> None:
        peer = await self.call(
            self.port, CHUNKED + chunk(b"0123456789a") + LAST_CHUNK + post("/run", b"next")
        )
        answer, _ = parse_response(await peer.receive_all())
        self.assertEqual((413, "close"), (answer.status, answer.getheader("connection")))
        self.assertEqual([], self.little.bodies)

    async def test_a_body_that_is_announced_too_large_is_not_asked_for(self) -> None:
        head = b"POST /run HTTP/1.1\r\nHost: there\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        peer = await self.call(self.port, head % 11)
        self.assertEqual(413, parse_response(await peer.receive_all())[0].status)
        peer = await self.call(self.port, head % 10)
        self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", await peer.receive_until(b"\r\n\r\n"))
        await peer.send(b"0123456789")
        await peer.receive_until(b"ran")
        self.assertEqual([b"0123456789"], self.little.bodies)

    async def test_an_upload_without_end_is_cut_off(self) -> None:
        for head in (CHUNKED, CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000000")):
            peer = await self.call(self.port)
            peer.readConnectionLost = lambda: None  # type: ignore[attr-defined]  # it stays
            directlyProvides(peer, IHalfCloseableProtocol)
            await peer.send(head)
            sent = 0
            while peer.end is None:
                sent += 1 << 20
                await peer.send(chunk(b"x" * (1 << 20)))
            self.assertIn(b"413", peer.received)
            self.assertLess(sent, 64 << 20)
        self.assertEqual([], self.little.bodies)


class DiskTests(SiteTestCase):
    limits: ClassVar = {"max_body": 1 << 20}

    async def test_a_body_that_finds_no_room_is_refused(self) -> None:
        self.patch(tempfile, "tempdir", "/nonexistent")
        whole = post("/run", b"x" * (1 << 14))
        self.assertEqual(200, (await self.ask(whole))[0])
        more = post("/run", b"x" * ((1 << 14) + 1))
        text = {"Content-Type": "text/plain; charset=utf-8"}
        self.assertEqual(
            (503, "cannot store the request body\n", {**text, "Retry-After": "1"}), await self.ask(more)
        )
        self.assertEqual(1, len(self.little.bodies))


class TimeTests(SiteTestCase):
    async def test_a_request_has_its_time_however_many_bytes_come(self) -> None:
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
            answer, content = parse_response(await peer.receive_all())
            self.assertEqual((408, "the request was not complete within 15 s\n"),
                             (answer.status, content.decode()), way)  # fmt: skip
            await wait_until(lambda: not self.site.protocols)
            self.assert_no_timer()
        self.assertEqual([], self.little.bodies)

    async def test_a_connection_without_a_request_is_closed_after_a_minute_before_and_between(self) -> None:
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

    async def test_an_answer_may_take_its_time(self) -> None:
        peer = await self.call(self.port, post("/wait", b""))
        await wait_until(lambda: self.little.bodies)
        self.clock.advance(600)
        self.assertEqual(0, self.little.cancelled)
        peer.transport.loseConnection()
        await wait_until(lambda: self.little.cancelled)

    def channel(self) -> Channel:
        [connection] = self.site.protocols
        channel = connection.wrappedProtocol
        assert isinstance(channel, Channel)
        return channel


class PipelineTests(SiteTestCase):
    async def test_a_request_that_does_not_wait_for_the_answer_before_is_not_heard(self) -> None:
        persistent = post("/run", b"1").replace(b"Connection: close\r\n", b"")
        bodiless = persistent.replace(b"1: 1\r\n\r\n1", b"0\r\n\r\n")
        for first in (persistent, bodiless):
            peer = await self.call(self.port, first + post("/run", b"2"))
            self.assertEqual(1, (await peer.receive_all()).count(b"HTTP/1.1 200"))
            self.assertTrue(peer.closed_cleanly)
        self.assertNotIn(b"2", self.little.bodies)

    async def test_what_comes_during_an_answer_is_thrown_away_and_ends_it_where_it_is_much(self) -> None:
        peer = await self.call(self.port, post("/wait", b"1"))
        await wait_until(lambda: self.little.bodies)
        for _ in range(64):
            await peer.send(b"x" * 1024)
        self.assertEqual(0, self.little.cancelled)
        await peer.send(b"x")
        await wait_until(lambda: self.little.cancelled)
        await peer.receive_all()


class CrowdTests(SiteTestCase):
    limits: ClassVar = {"max_connections": 3, "max_per_address": 2}

    async def test_connections_past_the_limits_are_closed_as_they_come(self) -> None:
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


class GoneTests(SiteTestCase):
    async def test_a_client_that_closes_or_half_closes_has_gone_away(self) -> None:
        closed = await self.call(self.port, post("/wait", b"1"))
        half_closed = await self.call(self.port, post("/wait", b"2"))
        await wait_until(lambda: len(self.little.bodies) == 2)
        closed.transport.loseConnection()
        half_closed.transport.loseWriteConnection()
        await wait_until(lambda: self.little.cancelled == 2)
        await half_closed.receive_all()
        self.assertEqual(b"", bytes(half_closed.received))

    async def test_a_client_that_goes_away_during_its_body_is_not_served(self) -> None:
        peer = await self.call(self.port, post("/run", b"0123")[:-1])
        await wait_until(lambda: self.site.protocols)
        peer.transport.loseWriteConnection()
        await peer.receive_all()
        self.assertEqual([], self.little.bodies)


class EndTests(SiteTestCase):
    async def test_what_was_written_is_delivered_before_a_connection_ends(self) -> None:
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

    async def test_a_client_that_keeps_what_it_has_not_read_is_cut_off_at_the_limit(self) -> None:
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

    async def test_a_client_that_does_not_close_after_the_end_is_cut_off(self) -> None:
        peer = await self.call(self.port)
        peer.transport.pauseProducing()
        await peer.send(post("/run", b""))
        await wait_until(lambda: [wrapper for wrapper in self.site.protocols if wrapper._lingering])
        self.clock.advance(59.9)
        self.assertEqual(1, len(self.site.protocols))
        self.clock.advance(0.1)
        await wait_until(lambda: not self.site.protocols)
        self.assert_no_timer()

    async def test_an_idle_connection_is_closed_and_its_next_request_not_heard(self) -> None:
        peer = await self.call(self.port, post("/run", b"").replace(b"Connection: close\r\n", b""))
        await peer.receive_until(b"ran")
        drained = self.drain(60)
        await peer.send(post("/run", b"late"))
        await drained
        await peer.receive_all()
        self.assertEqual([b""], self.little.bodies)

    async def test_with_no_connection_there_is_nothing_to_wait_for(self) -> None:
        self.assertIsNone(self.successResultOf(self.drain(60)))
        self.assert_no_timer()
