"""Cross-origin requests of browsers, at loopback and other addresses."""

from __future__ import annotations

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource

from bfaas.http.origin_check import cross_origin_reason
from bfaas.http.server import BoundedSite
from tests.support.responses import parse_response
from tests.support.transport import ServerTransport

HERE = IPv4Address("TCP", "127.0.0.1", 8000)
LAN = IPv4Address("TCP", "192.168.1.5", 8000)

NAME = "the Host header is not a loopback name"
ORIGIN = "cross-origin requests are not allowed"
SITE = "cross-site requests are not allowed"


class Root(Resource):
    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0

    def render(self, _: object) -> bytes:
        self.requests += 1
        return b"ran"


class CrossOriginTests(SynchronousTestCase):
    def rejection(self, at: object, *headers: str, version: str = "1.1") -> str | None:
        """Send a request with these headers; return why it is rejected, or None."""
        root = Root()
        site = BoundedSite(Clock(), root, 10, request_filter=cross_origin_reason)
        connection = site.buildProtocol(None)
        transport = ServerTransport(hostAddress=at)
        connection.makeConnection(transport)
        lines = [f"POST /run HTTP/{version}", "Content-Length: 0", *headers, "", ""]
        connection.dataReceived("\r\n".join(lines).encode())
        response, body = parse_response(transport.value())
        self.assertEqual({200: 1, 403: 0}[response.status], root.requests)
        if response.status == 200:
            return None
        self.assertEqual("text/plain; charset=utf-8", response.getheader("content-type"))
        return body.decode().removesuffix("\n")

    def test_clients_other_than_browsers_are_accepted(self) -> None:
        for host in ("localhost:8000", "LocalHost", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"):
            self.assertIsNone(self.rejection(HERE, f"Host: {host}"), host)
        self.assertIsNone(self.rejection(HERE, version="1.0"))

    def test_same_origin_pages_are_accepted(self) -> None:
        host = "Host: localhost:8000"
        own = "Origin: http://localhost:8000"
        self.assertIsNone(self.rejection(HERE, host, own, "Sec-Fetch-Site: same-origin"))
        self.assertIsNone(self.rejection(HERE, host, "Sec-Fetch-Site: none"))
        self.assertIsNone(self.rejection(HERE, host, "Sec-Fetch-Site: same-site"))
        self.assertIsNone(self.rejection(LAN, "Host: laptop.local", "Origin: http://laptop.local"))

    def test_cross_origin_pages_are_rejected(self) -> None:
        host = "Host: localhost:8000"
        for origin in (
            "http://evil.example", "https://localhost", "http://localhost:3000", "http://127.0.0.1:8000",
            "null", "", "http://", "localhost:8000", "file://localhost:8000", "http://localhost:8000@evil",
            "http://localhost:8000, http://evil.example",
        ):  # fmt: skip
            for at in (HERE, LAN):
                self.assertEqual(ORIGIN, self.rejection(at, host, f"Origin: {origin}"), origin)
            self.assertEqual(
                ORIGIN, self.rejection(HERE, host, f"Origin: {origin}", "Sec-Fetch-Site: same-site"), origin
            )
        twice = ["Origin: http://localhost:8000"] * 2
        self.assertEqual(ORIGIN, self.rejection(HERE, host, *twice))
        for site in ("cross-site", "Cross-Site ", "cross-site, none", "nonsense"):
            for at in (HERE, LAN):
                self.assertEqual(SITE, self.rejection(at, host, f"Sec-Fetch-Site: {site}"), site)

    def test_dns_rebinding_to_loopback_is_rejected(self) -> None:
        six = IPv6Address("TCP", "::1", 8000)
        mapped = IPv6Address("TCP", "::ffff:127.0.0.1", 8000)
        for host in (
            "evil.example:8000", "localhost.evil.example", "localhost.", "127.0.0.1.nip.io", "192.168.1.5",
            "0.0.0.0:8000", "[::2]", "[::1", "", "x@localhost", "[::ffff:8.8.8.8]", "localhost:80:80",
        ):  # fmt: skip
            for at in (HERE, six, mapped):
                self.assertEqual(
                    NAME, self.rejection(at, f"Host: {host}", f"Origin: http://{host}"), (host, at)
                )

    def test_other_addresses_accept_any_host_name(self) -> None:
        for at in (LAN, IPv6Address("TCP", "fd00::5", 8000), UNIXAddress("/run/bfaas")):
            self.assertIsNone(self.rejection(at, "Host: laptop.local:8000"))
