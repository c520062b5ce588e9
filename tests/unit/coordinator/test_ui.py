"""The page's files over HTTP: caches ask whether theirs is still right."""

from __future__ import annotations

from klein import Klein
from twisted.internet.task import Clock

from bfaas.coordinator.ui import serve_page
from bfaas.http.server import BoundedSite, register_error_handlers
from tests.support.hostile_worker import LoopbackTestCase
from tests.support.responses import parse_response


class Pages:
    app = Klein()
    register_error_handlers(app)
    serve_page(app)


class CacheTests(LoopbackTestCase):
    async def get(self, known: str = "", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        lines = [f"{method} / HTTP/1.1", "Host: there", "Connection: close"]
        lines += [f"If-None-Match: {value}" for value in known.split("\n") if value]
        peer = await self.call(self.port, "\r\n".join([*lines, "", ""]).encode())
        heard = await peer.receive_all()
        answer, _ = parse_response(heard, method)
        return answer.status, dict(answer.getheaders()), heard.partition(b"\r\n\r\n")[2]

    def setUp(self) -> None:
        self.port = self.listen(BoundedSite(Clock(), Pages().app.resource(), 0))

    async def test_a_tag_that_matches_is_answered_304_with_the_headers_of_a_cache(self) -> None:
        status, headers, body = await self.get()
        self.assertEqual((200, str(len(body))), (status, headers["Content-Length"]))
        tag = headers["ETag"]
        self.assertRegex(tag, '^"[0-9a-f]{32}"$')
        for known in (
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
                status, fresh, body = await self.get(known, method)
                self.assertEqual((304, b""), (status, body), known)
                self.assertEqual((tag, "no-cache"), (fresh["ETag"], fresh["Cache-Control"]))
                self.assertIn("Date", fresh)
                for name in ("Content-Type", "Content-Length", "Transfer-Encoding"):
                    self.assertNotIn(name, fresh)

    async def test_any_other_is_answered_200(self) -> None:
        _, headers, body = await self.get()
        bare = headers["ETag"].strip('"')
        for known in ('"other"', 'W/"other"', bare, f'"{bare}x"', f'"x{bare}"', f'"{bare}', '"*"', '"", ""'):
            self.assertEqual((200, body), (await self.get(known))[::2], known)

    async def test_head_has_the_headers_of_get(self) -> None:
        _, headers, _ = await self.get()
        status, again, body = await self.get(method="HEAD")
        self.assertEqual((200, b""), (status, body))
        for name in ("Content-Length", "Content-Type", "ETag", "Cache-Control"):
            self.assertEqual(headers[name], again[name])
