"""PROXY protocol headers, and the connection limits of clients behind a proxy."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, ClassVar

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.trial.unittest import SynchronousTestCase

from bfaas.http.proxy_protocol import ProxyHeader, ProxyHeaderReader
from tests.support.hostile_worker import Peer, post
from tests.support.waiting import wait_until
from tests.unit.http.test_server import SiteTestCase

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def version_1(source: str, family: str = "TCP4", destination: str = "192.0.2.1") -> bytes:
    return f"PROXY {family} {source} {destination} 56324 443\r\n".encode()


def version_2(command: int, family: int, addresses: bytes, more: bytes = b"") -> bytes:
    length = len(addresses) + len(more)
    return SIGNATURE + struct.pack("!BBH", command, family, length) + addresses + more


def inet(family: socket.AddressFamily, source: str, destination: str) -> bytes:
    return socket.inet_pton(family, source) + socket.inet_pton(family, destination) + b"\xdc\x04\x01\xbb"


FOUR = ProxyHeader(IPv4Address("TCP", "198.51.100.7", 56324), IPv4Address("TCP", "192.0.2.1", 443), b"")
SIX = ProxyHeader(IPv6Address("TCP", "2001:db8::7", 56324), IPv6Address("TCP", "2001:db8::1", 443), b"")
NONE = ProxyHeader(None, None, b"")

HEADERS = {
    version_1("198.51.100.7"): FOUR,
    version_1("2001:db8::7", "TCP6", "2001:db8::1"): SIX,
    b"PROXY UNKNOWN\r\n": NONE,
    b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n": NONE,
    version_2(0x21, 0x11, inet(socket.AF_INET, "198.51.100.7", "192.0.2.1")): FOUR,
    version_2(0x21, 0x21, inet(socket.AF_INET6, "2001:db8::7", "2001:db8::1")): SIX,
    # A value of type PP2_TYPE_NOOP follows the addresses.
    version_2(0x21, 0x11, inet(socket.AF_INET, "198.51.100.7", "192.0.2.1"), b"\x04\0\x03abc"): FOUR,
    version_2(0x20, 0x00, b""): NONE,
    version_2(0x20, 0x11, inet(socket.AF_INET, "198.51.100.7", "192.0.2.1")): NONE,
    # The family of a proxy's own connection is ignored.
    version_2(0x20, 0xF1, b"abc"): NONE,
    version_2(0x21, 0x00, b"", b"\x04\0\x03abc"): NONE,
    version_2(0x21, 0x31, b"/client".ljust(108, b"\0") + b"/server".ljust(108, b"\0")): NONE,
}

NO_HEADERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"PROXY\r\n",
    b"PROXY TCP4\r\n",
    b"PROXY TCP5 198.51.100.7 192.0.2.1 1 2\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 1\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 1 2 3\r\n",
    b"PROXY TCP4  198.51.100.7 192.0.2.1 1 2\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 a b\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 -1 2\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 1 65536\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 \xb2 2\r\n",
    b"PROXY TCP4 198.51.100.777 192.0.2.1 1 2\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
    b"PROXY TCP6 198.51.100.7 192.0.2.1 1 2\r\n",
    b"PROXY " + b"x" * 101,
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    version_2(0x11, 0x11, b"\0" * 12),
    version_2(0x22, 0x11, b"\0" * 12),
    version_2(0x21, 0x11, b"\0" * 11),
    version_2(0x21, 0x21, b"\0" * 35),
    version_2(0x21, 0x41, b"\0" * 12),
    SIGNATURE + b"\x21\x11\xff\xff",
]


class HeaderTests(SynchronousTestCase):
    def test_headers_are_parsed_wherever_they_are_split(self) -> None:
        for header, proxied in HEADERS.items():
            expected = proxied._replace(rest=b"GET")
            self.assertEqual(expected, ProxyHeaderReader().feed(header + b"GET"), header)
            reader = ProxyHeaderReader()
            pieces = [header[at : at + 1] for at in range(len(header) - 1)]
            self.assertEqual({None}, set(map(reader.feed, pieces)), header)
            self.assertEqual(expected, reader.feed(header[-1:] + b"GET"), header)

    def test_invalid_headers_raise_value_error(self) -> None:
        for data in NO_HEADERS:
            self.assertRaises(ValueError, ProxyHeaderReader().feed, data)

    @given(st.sampled_from([b"PROXY ", b"PROXY TCP4 ", SIGNATURE, b""]), st.binary(), st.binary())
    def test_any_input_is_parsed_or_raises_value_error(self, start: bytes, one: bytes, other: bytes) -> None:
        reader = ProxyHeaderReader()
        for data in (start + one, other):
            try:
                proxied = reader.feed(data)
            except ValueError:
                return
            if proxied is not None:
                return


class ProxiedSiteTests(SiteTestCase):
    limits: ClassVar = {"max_connections": 8, "max_per_address": 2}

    def setUp(self) -> None:
        super().setUp()
        self.site.proxied = True

    async def connect_as(self, source: str, family: str = "TCP4") -> Peer:
        peer = await self.call(self.port, version_1(source, family, "::1" if ":" in source else "192.0.2.1"))
        await wait_until(lambda: peer.end or all(c._header is None for c in self.site.protocols))
        return peer

    async def test_closed_connections_are_no_longer_counted(self) -> None:
        for number in range(3 * 8):
            peer = await self.call(self.port, version_1(f"198.51.100.{number % 3}") + post("/run", b""))
            self.assertIn(b"ran", await peer.receive_all())
            await wait_until(lambda: not self.site.protocols)
        self.assertEqual({}, dict(self.site._connections_from))

    async def test_limit_applies_to_clients_and_not_to_the_proxy(self) -> None:
        first = [await self.connect_as("198.51.100.7") for _ in range(2)]
        third = await self.connect_as("198.51.100.7")
        await third.receive_all()
        others = [await self.connect_as(f"198.51.100.{number}") for number in range(8, 12)]
        self.assertEqual([None] * 6, [peer.end for peer in first + others])
        await self.connect_as("2001:db8::1", "TCP6")
        await self.connect_as("2001:db8::2", "TCP6")
        self.assertEqual(8, len(self.site.protocols))
        first[0].transport.abortConnection()
        await wait_until(lambda: len(self.site.protocols) == 7)
        await (await self.connect_as("2001:db8::3", "TCP6")).receive_all()  # of the same /64
        self.assertIsNone((await self.connect_as("198.51.100.7")).end)
        self.assertEqual([], self.flushLoggedErrors())

    async def test_connections_without_a_header_are_closed_uncounted(self) -> None:
        for data in NO_HEADERS:
            peer = await self.call(self.port, data + post("/run", b""))
            self.assertEqual(b"", await peer.receive_all())
        await wait_until(lambda: not self.site.protocols)
        self.assertEqual([], self.app.bodies)
        self.assertEqual({}, dict(self.site._connections_from))
        self.assertEqual([], self.flushLoggedErrors())
        self.assert_no_timer()

    async def test_connection_with_an_incomplete_header_times_out(self) -> None:
        peer = await self.call(self.port, b"PRO")
        await wait_until(lambda: self.site.protocols)
        self.clock.advance(60)
        self.assertEqual(b"", await peer.receive_all())

    async def test_connections_of_the_proxy_itself_are_served(self) -> None:
        for header in (b"PROXY UNKNOWN\r\n", version_2(0x20, 0, b"")):
            peer = await self.call(self.port, header + post("/run", b""))
            self.assertIn(b"ran", await peer.receive_all())

    async def test_drain_closes_a_connection_that_sent_only_a_header(self) -> None:
        peer = await self.connect_as("198.51.100.7")
        drained: Deferred[None] = self.drain(60)
        await peer.receive_all()
        await drained
        self.assertTrue(peer.closed_cleanly)
