"""Whose a request is, and how many one client may have."""

from __future__ import annotations

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import HTTPChannel
from twisted.web.server import Request

from bfaas.coordinator.client_limits import ConcurrencyLimiter, client_key


class ClientTests(SynchronousTestCase):
    def client(self, *told: bytes, peer: object = None, on_fly: bool = True) -> str:
        """Tell whose a request is, with these values in its header, from this peer."""
        channel = HTTPChannel()
        channel.makeConnection(StringTransport(peerAddress=peer or IPv4Address("TCP", "172.16.0.1", 4000)))
        request = Request(channel, parsePOSTFormSubmission=False)
        request.requestHeaders.setRawHeaders(b"Fly-Client-IP", list(told))
        return client_key(request, on_fly=on_fly)

    def test_on_fly_it_is_whom_the_proxy_names(self) -> None:
        self.assertEqual("203.0.113.7", self.client(b"203.0.113.7"))
        self.assertEqual("172.16.0.1", self.client())

    def test_elsewhere_nobody_is_believed(self) -> None:
        self.assertEqual("172.16.0.1", self.client(b"203.0.113.7", on_fly=False))

    def test_what_is_no_address_is_the_peers(self) -> None:
        for told in (
            b"", b"localhost", b"1.2.3", b"1.2.3.4.5", b"01.2.3.4", b"1.2.3.4:80", b"1.2.3.4, 5.6.7.8",
            b"\xff", b"[2001:db8::1]", b"2001:db8::/32", b"::1::", b"1" * 16_000, b":" * 16_000,
            "\u0661.2.3.4".encode(),
        ):  # fmt: skip
            self.assertEqual("172.16.0.1", self.client(told), told[:40])

    def test_the_proxy_has_the_last_word(self) -> None:
        self.assertEqual("203.0.113.7", self.client(b"198.51.100.1", b"203.0.113.7"))

    def test_a_network_of_ipv6_is_one_client(self) -> None:
        for told in (b"2001:db8:0:1::1", b"2001:DB8:0:1:ffff:ffff:ffff:ffff", b"2001:0db8:0000:0001::"):
            self.assertEqual("2001:db8:0:1::/64", self.client(told))
        self.assertEqual("2001:db8:0:2::/64", self.client(b"2001:db8:0:2::1"))
        self.assertEqual("fe80::/64", self.client(peer=IPv6Address("TCP", "fe80::1%eth0", 4000)))

    def test_ipv4_in_ipv6_is_ipv4(self) -> None:
        self.assertEqual("203.0.113.7", self.client(b"::ffff:203.0.113.7"))
        self.assertEqual("203.0.113.7", self.client(b"::ffff:cb00:7107"))
        self.assertEqual("127.0.0.1", self.client(peer=IPv6Address("TCP", "::ffff:127.0.0.1", 4000)))

    def test_peers_without_an_address_are_one_client(self) -> None:
        self.assertEqual("no address", self.client(peer=UNIXAddress("/run/coord")))


class SharesTests(SynchronousTestCase):
    def test_a_client_has_its_share_and_no_more_and_gets_back_what_it_gives(self) -> None:
        shares = ConcurrencyLimiter(2)
        self.assertEqual([True, True, False, False], [shares.acquire("a") for _ in range(4)])
        self.assertTrue(shares.acquire("b"))

        shares.release("a")

        self.assertEqual([True, False], [shares.acquire("a") for _ in range(2)])

    def test_clients_that_have_nothing_are_forgotten(self) -> None:
        shares = ConcurrencyLimiter(1)
        for number in range(100):
            shares.acquire(f"{number}")
            shares.acquire(f"{number}")
            shares.release(f"{number}")

        self.assertEqual({}, dict(shares._taken))
