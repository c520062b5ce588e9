"""Tests of the page's files over HTTP, and of their revalidation by caches."""

from __future__ import annotations

from klein import Klein
from twisted.internet.task import Clock

from bfaas.coordinator.ui import serve_page
from bfaas.http.server import BoundedSite, register_error_handlers
from tests.support.hostile_worker import LoopbackTestCase
from tests.support.responses import parse_response


class PageApp:
    app = Klein()
    register_error_handlers(app)
    serve_page(app)


class RevalidationTests(LoopbackTestCase):
    async def get(self, if_none_match: str = "", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        lines = [f"{method} / HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"If-None-Match: {value}" for value in if_none_match.split("\n") if value]
        peer = await self.call(self.port, "\r\n".join([*lines, "", ""]).encode())
        received = await peer.receive_all()
        response, _ = parse_response(received, method)
        return response.status, dict(response.getheaders()), received.partition(b"\r\n\r\n")[2]

    def setUp(self) -> None:
        self.port = self.listen(BoundedSite(Clock(), PageApp().app.resource(), 0))

    async def test_matching_tag_gets_304_with_the_headers_for_caches(self) -> None:
        status, headers, body = await self.get()
        self.assertEqual((200, str(len(body))), (status, headers["Content-Length"]))
        tag = headers["ETag"]
        self.assertRegex(tag, '^"[0-9a-f]{32}"$')
        for if_none_match in (
            tag,
            f"W/{tag}",
            f'"a", W/{tag}',
            f'"a,b",{tag}',
            f'W/"x" ,{tag} , "y"',
            "*",
            " * ",
            f'"other"\n{tag}',
        ):
            for method in ("GET", "HEAD"):
                status, headers_of_304, body = await self.get(if_none_match, method)
                self.assertEqual((304, b""), (status, body), if_none_match)
                self.assertEqual((tag, "no-cache"), (headers_of_304["ETag"], headers_of_304["Cache-Control"]))
                self.assertIn("Date", headers_of_304)
                for name in ("Content-Type", "Content-Length", "Transfer-Encoding"):
                    self.assertNotIn(name, headers_of_304)

    async def test_other_tags_get_200(self) -> None:
        _, headers, body = await self.get()
        bare = headers["ETag"].strip('"')
        for if_none_match in (
            '"other"',
            'W/"other"',
            bare,
            f'"{bare}x"',
            f'"x{bare}"',
            f'"{bare}',
            '"*"',
            '"", ""',
        ):
            self.assertEqual((200, body), (await self.get(if_none_match))[::2], if_none_match)

    async def test_head_has_the_headers_of_get(self) -> None:
        _, headers, _ = await self.get()
        status, headers_of_head, body = await self.get(method="HEAD")
        self.assertEqual((200, b""), (status, body))
        for name in ("Content-Length", "Content-Type", "ETag", "Cache-Control"):
            self.assertEqual(headers[name], headers_of_head[name])
