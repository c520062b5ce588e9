"""Tests of the identity of clients, and of the limit on concurrent requests of each."""

from __future__ import annotations

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import HTTPChannel
from twisted.web.server import Request

from bfaas.coordinator.client_limits import ConcurrencyLimiter, client_key

PEER = "172.16.0.1"


class ClientKeyTests(SynchronousTestCase):
    def key(self, *header_values: bytes, peer: object = None, on_fly: bool = True) -> str:
        """Return the key of a client whose request has these values of `Fly-Client-IP`."""
        channel = HTTPChannel()
        channel.makeConnection(StringTransport(peerAddress=peer or IPv4Address("TCP", PEER, 4000)))
        request = Request(channel, parsePOSTFormSubmission=False)
        request.requestHeaders.setRawHeaders(b"Fly-Client-IP", list(header_values))
        return client_key(request, on_fly=on_fly)

    def test_on_fly_the_header_names_the_client(self) -> None:
        self.assertEqual("203.0.113.7", self.key(b"203.0.113.7"))

    def test_on_fly_the_peer_counts_without_the_header(self) -> None:
        self.assertEqual(PEER, self.key())

    def test_elsewhere_the_header_is_ignored(self) -> None:
        self.assertEqual(PEER, self.key(b"203.0.113.7", on_fly=False))

    def test_invalid_header_is_ignored(self) -> None:
        for value in (
            b"",
            b"localhost",
            b"1.2.3",
            b"1.2.3.4.5",
            b"01.2.3.4",
            b"1.2.3.4:80",
            b"1.2.3.4, 5.6.7.8",
            b"\xff",
            b"[2001:db8::1]",
            b"2001:db8::/32",
            b"::1::",
            b"1" * 16_000,
            b":" * 16_000,
            "\u0661.2.3.4".encode(),
        ):
            self.assertEqual(PEER, self.key(value), value[:40])

    def test_last_header_counts(self) -> None:
        self.assertEqual("203.0.113.7", self.key(b"198.51.100.1", b"203.0.113.7"))

    def test_ipv6_network_is_one_client(self) -> None:
        for value in (b"2001:db8:0:1::1", b"2001:DB8:0:1:ffff:ffff:ffff:ffff", b"2001:0db8:0000:0001::"):
            self.assertEqual("2001:db8:0:1::/64", self.key(value))
        self.assertEqual("2001:db8:0:2::/64", self.key(b"2001:db8:0:2::1"))
        self.assertEqual("fe80::/64", self.key(peer=IPv6Address("TCP", "fe80::1%eth0", 4000)))

    def test_ipv4_mapped_address_is_ipv4(self) -> None:
        self.assertEqual("203.0.113.7", self.key(b"::ffff:203.0.113.7"))
        self.assertEqual("203.0.113.7", self.key(b"::ffff:cb00:7107"))
        self.assertEqual("127.0.0.1", self.key(peer=IPv6Address("TCP", "::ffff:127.0.0.1", 4000)))

    def test_peers_without_an_address_are_one_client(self) -> None:
        self.assertEqual("no address", self.key(peer=UNIXAddress("/run/coord")))


class ConcurrencyLimiterTests(SynchronousTestCase):
    def test_each_client_is_limited_by_itself(self) -> None:
        limiter = ConcurrencyLimiter(2)
        self.assertEqual([True, True, False, False], [limiter.acquire("a") for _ in range(4)])
        self.assertTrue(limiter.acquire("b"))

    def test_released_request_makes_room_for_one(self) -> None:
        limiter = ConcurrencyLimiter(2)
        for _ in range(3):
            limiter.acquire("a")
        limiter.release("a")
        self.assertEqual([True, False], [limiter.acquire("a") for _ in range(2)])

    def test_idle_clients_are_forgotten(self) -> None:
        limiter = ConcurrencyLimiter(1)
        for number in range(100):
            limiter.acquire(f"{number}")
            limiter.acquire(f"{number}")
            limiter.release(f"{number}")
        self.assertEqual({}, dict(limiter._active))
