from __future__ import annotations

from typing import TYPE_CHECKING

from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from bfaas.site import BoundedSite, RefusalError, answer_errors_in_text, body
from tests.liar import LAST_CHUNK, LoopbackTestCase, chunk, parse_answer, post, until

if TYPE_CHECKING:
    from twisted.web.server import Request

MUCH = 16 << 20
CHUNKED = b"POST /run HTTP/1.1\r\nHost: there\r\nTransfer-Encoding: chunked\r\n\r\n"


class Little:
    """A small application."""

    app = Klein()
    answer_errors_in_text(app)

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.cancelled = 0

    @app.route("/run", methods=["POST"])
    async def run(self, request: Request) -> bytes:
        self.bodies.append(body(request))
        return b"ran"

    @app.route("/busy", methods=["POST"])
    async def busy(self, _: Request) -> bytes:
        raise RefusalError(503, "busy", {"Retry-After": "7"})

    @app.route("/much", methods=["POST"])
    async def much(self, _: Request) -> bytes:
        return b"x" * MUCH

    @app.route("/wait", methods=["POST"])
    async def wait(self, request: Request) -> bytes:
        self.bodies.append(body(request))
        try:
            await Deferred()
        except CancelledError:
            self.cancelled += 1
            raise
        raise AssertionError


class SiteTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.little = Little()
        self.site = BoundedSite(self.clock, self.little.app.resource(), max_body=10)
        self.addCleanup(lambda: Deferred.fromCoroutine(until(lambda: not self.site.protocols)))
        self.port = self.listen(self.site)

    async def ask(self, request: bytes) -> tuple[int, str, dict[str, str]]:
        """Make one request; its status, its body, and those of its headers that we set."""
        peer = await self.call(self.port, request)
        answer, content = parse_answer(await peer.hear_out())
        self.assertTrue(peer.ended_in_order)
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
            post("http://there/run", b""): not_found,
            post("/none", b"").replace(b"there", b"a..b:c"): not_found,
            post("/none", b"").replace(b"there", b"\xff"): not_found,
            get % b"/none": not_found,
            get % b"/run": not_allowed,
            get.replace(b"GET", b"PUT") % b"/run": not_allowed,
            get.replace(b"GET", b"BREW") % b"/run": not_allowed,
        }
        for request, expected in cases.items():
            self.assertEqual(expected, await self.ask(request), request)
        self.assertEqual([], self.little.bodies)

    async def test_after_a_malformed_request_nothing_is_heard_any_more(self) -> None:
        peer = await self.call(self.port)
        peer.transport.pauseProducing()
        await peer.say(b"POST /run HTTP/1.1\r\nnonsense\r\nContent-Length: 0\r\n")
        await until(lambda: any(wrapper.disconnecting for wrapper in self.site.protocols))
        for _ in range(3):
            await peer.say(b"\r\n")
        drained = self.drain(60)
        peer.transport.resumeProducing()
        self.assertEqual(b"HTTP/1.1 400 Bad Request\r\n\r\n", await peer.hear_out())
        await drained
        self.assertEqual([], self.little.bodies)


class BodyTests(SiteTestCase):
    async def test_up_to_the_limit_a_body_is_taken(self) -> None:
        self.assertEqual((200, "ran", {}), await self.ask(post("/run", b"0123456789")))
        peer = await self.call(self.port, CHUNKED + chunk(b"01234") + chunk(b"56789") + LAST_CHUNK)
        await peer.hear(b"ran")
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
                    await peer.say(piece)
                heard = await peer.hear(b"the body is larger than 10 bytes\n")
                self.assertEqual(b"HTTP/1.1 413 Request Entity Too Large", heard.splitlines()[0], way)
        self.assertEqual([], self.little.bodies)

    async def test_a_connection_goes_on_after_a_body_that_was_refused(self) -> None:
        peer = await self.call(self.port, CHUNKED + chunk(b"0123456789a") + LAST_CHUNK)
        await peer.hear(LAST_CHUNK)
        peer.heard.clear()
        await peer.say(post("/run", b"next"))
        self.assertEqual(200, parse_answer(await peer.hear_out())[0].status)
        self.assertEqual([b"next"], self.little.bodies)

    async def test_an_upload_without_end_is_cut_off(self) -> None:
        for head in (CHUNKED, CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000000")):
            peer = await self.call(self.port, head)
            while peer.end is None:
                await peer.say(chunk(b"more"))
            self.assertEqual(b"", bytes(peer.heard))
        self.assertEqual([], self.little.bodies)


class GoneTests(SiteTestCase):
    async def test_a_client_that_closes_or_half_closes_has_gone_away(self) -> None:
        closed = await self.call(self.port, post("/wait", b"1"))
        half_closed = await self.call(self.port, post("/wait", b"2"))
        await until(lambda: len(self.little.bodies) == 2)
        closed.transport.loseConnection()
        half_closed.transport.loseWriteConnection()
        await until(lambda: self.little.cancelled == 2)
        await half_closed.hear_out()
        self.assertEqual(b"", bytes(half_closed.heard))

    async def test_a_client_that_goes_away_during_its_body_is_not_served(self) -> None:
        peer = await self.call(self.port, post("/run", b"0123")[:-1])
        await until(lambda: self.site.protocols)
        peer.transport.loseWriteConnection()
        await peer.hear_out()
        self.assertEqual([], self.little.bodies)


class EndTests(SiteTestCase):
    async def test_what_was_written_is_delivered_before_a_connection_ends(self) -> None:
        peer = await self.call(self.port, post("/much", b""))
        await peer.hear(b"x")
        peer.transport.pauseProducing()
        drained = self.drain(60)
        self.clock.advance(59)
        self.assertNoResult(drained)
        peer.transport.resumeProducing()
        self.assertEqual(MUCH, len(parse_answer(await peer.hear_out())[1]))
        self.assertTrue(peer.ended_in_order)
        await drained
        self.assert_no_timer()

    async def test_a_client_that_keeps_what_it_has_not_read_is_cut_off_at_the_limit(self) -> None:
        peer = await self.call(self.port, post("/much", b""))
        await peer.hear(b"x")
        peer.transport.pauseProducing()
        drained = self.drain(60)
        self.clock.advance(60)
        await drained
        self.assertEqual({}, self.site.protocols)
        peer.transport.resumeProducing()
        await peer.hear_out()
        self.assertFalse(peer.ended_in_order)
        self.assertLess(len(peer.heard), MUCH)

    async def test_a_client_that_does_not_close_after_the_end_is_cut_off(self) -> None:
        peer = await self.call(self.port)
        peer.transport.pauseProducing()
        await peer.say(post("/run", b""))
        await until(lambda: [wrapper for wrapper in self.site.protocols if wrapper._lingering])
        self.clock.advance(4.9)
        self.assertEqual(1, len(self.site.protocols))
        self.clock.advance(0.1)
        await until(lambda: not self.site.protocols)
        self.assert_no_timer()

    async def test_an_idle_connection_is_closed_and_its_next_request_not_heard(self) -> None:
        peer = await self.call(self.port, post("/run", b"").replace(b"Connection: close\r\n", b""))
        await peer.hear(b"ran")
        drained = self.drain(60)
        await peer.say(post("/run", b"late"))
        await drained
        await peer.hear_out()
        self.assertEqual([b""], self.little.bodies)

    async def test_with_no_connection_there_is_nothing_to_wait_for(self) -> None:
        self.assertIsNone(self.successResultOf(self.drain(60)))
        self.assert_no_timer()
