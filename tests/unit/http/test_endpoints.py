"""Connections by name and address, with sockets on loopback, a fake resolver and a fake clock."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from OpenSSL.SSL import TLS_METHOD
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError as RefusedConnectionError
from twisted.internet.error import DNSLookupError
from twisted.internet.error import TimeoutError as ConnectTimeoutError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions, DefaultOpenSSLContextFactory, platformTrust
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import Agent

from bfaas.http.client import send_request
from bfaas.http.endpoints import (
    CONNECT_TIMEOUT,
    LOOKUP_TIMEOUT,
    CertificateError,
    Endpoints,
    HostEndpoint,
    Resolver,
    describe,
    root_cause,
)
from bfaas.http.strict_agent import StrictAgent
from tests.support.certificates import Authority
from tests.support.hostile_worker import LoopbackTestCase, Peer, reactor
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Names:
    """A fake getaddrinfo, with a fixed set of names; lookups block until `answers` is set."""

    def __init__(self, **known: Sequence[str]) -> None:
        self.known = {name.encode(): addresses for name, addresses in known.items()}
        self.lookups: list[bytes] = []
        self.answers = threading.Event()
        self.answers.set()

    def __call__(self, host: bytes, port: None, type: int) -> list[Any]:  # noqa: A002 - getaddrinfo's
        self.lookups.append(host)
        assert self.answers.wait(30)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, type, 6, "", (address, 0))
            for address in self.known[host]
        ]


class Server(Peer):
    """Responds to a request and closes the connection."""

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        if self.request() is not None:
            self.transport.write(OK)
            self.transport.loseConnection()


class EndpointTestCase(LoopbackTestCase):
    def setUp(self) -> None:
        self.servers: list[Server] = []
        self.names = Names()
        self.resolver = Resolver(reactor, self.names)
        self.addCleanup(self.names.answers.set)

    def serve(self, interface: str = "127.0.0.1") -> int:
        """Listen at an address and return the port."""
        port = reactor.listenTCP(0, self.factory(), interface=interface)
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    def factory(self) -> Factory[Any]:
        def build() -> Server:
            self.servers.append(Server())
            return self.servers[-1]

        factory: Factory[Any] = Factory.forProtocol(build)
        factory.noisy = False
        return factory

    def know(self, name: str, *addresses: str) -> None:
        self.names.known[name.encode()] = addresses

    def connect(self, host: str, port: int) -> Deferred[Any]:
        factory = Factory.forProtocol(Peer)
        factory.noisy = False
        return HostEndpoint(reactor, self.resolver, host, port).connect(factory)

    async def close(self, peer: Any) -> None:
        peer.transport.abortConnection()
        await wait_until(lambda: peer.end and all(server.end for server in self.servers))


class NameTests(EndpointTestCase):
    async def test_connects_to_any_name_that_the_system_resolves(self) -> None:
        port = self.serve()
        for name in ("_api.internal", "my_app.flycast", "app", "name.example.", "-a-.b", "a" * 64 + ".b"):
            self.know(name, "127.0.0.1")
            await self.close(await self.connect(name, port))
            self.assertEqual(name.encode(), self.names.lookups[-1])

    async def test_addresses_are_not_resolved(self) -> None:
        for address in ("127.0.0.1", "::1"):
            await self.close(await self.connect(address, self.serve(address)))
        self.assertEqual([], self.names.lookups)

    async def test_default_resolver_is_that_of_the_system(self) -> None:
        self.resolver = Resolver(reactor)
        await self.close(await self.connect("localhost", self.serve()))
        with self.assertRaisesRegex(DNSLookupError, r"nowhere\.invalid"):
            await self.connect("nowhere.invalid", 1)
        with self.assertRaises(DNSLookupError):
            await self.connect("a..b", 1)

    async def test_connects_to_a_name_with_only_an_ipv6_address(self) -> None:
        self.know("six", "::1")
        await self.close(await self.connect("six", self.serve("::1")))

    async def test_tries_the_next_address_after_a_refused_connection(self) -> None:
        self.know("several", "::1", "127.0.0.2", "127.0.0.1")
        await self.close(await self.connect("several", self.serve()))

    async def test_errors_name_the_reason(self) -> None:
        port = self.serve()
        self.know("refuses", "127.0.0.2", "::1")
        with self.assertRaises(RefusedConnectionError):
            await self.connect("refuses", port)
        with self.assertRaisesRegex(DNSLookupError, "unknown: Name or service not known"):
            await self.connect("unknown", port)

    async def test_concurrent_lookups_of_a_name_share_one_thread(self) -> None:
        port = self.serve()
        self.know("slow", "127.0.0.1")
        self.names.answers.clear()
        first, second, third = (self.connect("slow", port) for _ in range(3))
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.names.answers.set()
        for peer in [await first, await third]:
            peer.transport.abortConnection()
        await wait_until(lambda: all(server.end for server in self.servers))
        self.assertEqual([b"slow"], self.names.lookups)
        self.assertEqual(2, len(self.servers))

    async def test_lookup_fails_without_a_thread_and_the_next_one_succeeds(self) -> None:
        port = self.serve()
        self.know("name", "127.0.0.1")
        stack = threading.stack_size(1 << 46)  # more than the address space
        connecting = self.connect("name", port)
        threading.stack_size(stack)
        with self.assertRaisesRegex(DNSLookupError, "name: can't start new thread"):
            await connecting
        await self.close(await self.connect("name", port))

    async def test_cancelled_lookup_makes_no_connection(self) -> None:
        port = self.serve()
        self.know("slow", "127.0.0.1")
        self.names.answers.clear()
        connecting = self.connect("slow", port)
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        self.names.answers.set()
        await self.close(await self.connect("slow", port))
        await deferLater(reactor, 0.05)
        self.assertEqual(1, len(self.servers))


class TimeoutTests(SynchronousTestCase):
    """With an in-memory reactor, whose connections succeed or fail when the test says so."""

    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        self.found: Deferred[list[str]] = Deferred()
        test = self

        class Later(Resolver):
            def lookup(self, host: str) -> Deferred[list[str]]:
                return test.found

        self.connecting = HostEndpoint(self.reactor, Later(self.reactor), "name", 1).connect(
            Factory.forProtocol(Protocol)
        )

    def tried(self) -> list[str]:
        return [client[0] for client in self.reactor.tcpClients]

    def test_lookup_times_out(self) -> None:
        self.reactor.advance(LOOKUP_TIMEOUT)
        failure = self.failureResultOf(self.connecting, DNSLookupError)
        self.assertIn("name: no response within 10 s", str(failure.value))
        self.assertEqual([], self.reactor.getDelayedCalls())

    def test_next_address_is_tried_soon_after_a_silent_one(self) -> None:
        self.found.callback(["fdaa::1", "fdaa::2", "127.0.0.1"])
        self.assertEqual(["fdaa::1"], self.tried())
        self.assertEqual(CONNECT_TIMEOUT, self.reactor.tcpClients[0][3])
        self.reactor.advance(0.3)
        self.reactor.advance(0.3)
        self.assertEqual(["fdaa::1", "fdaa::2", "127.0.0.1"], self.tried())
        connected: Any = self.reactor.tcpClients[1][2]
        connected.buildProtocol(None).makeConnection(object())
        self.successResultOf(self.connecting)
        self.assertEqual([], self.reactor.getDelayedCalls())

    def test_last_failure_is_raised(self) -> None:
        self.found.callback(["fdaa::1", "127.0.0.1"])
        for place in (0, 1):
            self.assertNoResult(self.connecting)
            failed: Any = self.reactor.tcpClients[place][2]
            failed.clientConnectionFailed(None, RefusedConnectionError() if place else ConnectTimeoutError())
        self.failureResultOf(self.connecting, RefusedConnectionError)
        self.assertEqual([], self.reactor.getDelayedCalls())

    def test_cancelling_stops_all_attempts(self) -> None:
        self.found.callback(["fdaa::1", "127.0.0.1", "127.0.0.2"])
        self.reactor.advance(0.3)
        self.connecting.cancel()
        self.failureResultOf(self.connecting, CancelledError)
        self.assertEqual([], self.reactor.getDelayedCalls())
        self.assertEqual(2, len(self.tried()))
        self.assertTrue(all(connector.stoppedConnecting for connector in self.reactor.connectors))


class RequestTests(EndpointTestCase):
    """Requests through both kinds of agent."""

    async def request(self, agent: Any, base: str) -> list[str]:
        response = await send_request(agent, "GET", base, "/a%20b?c=d")
        self.assertEqual(200, response.code)
        lines, _ = self.servers[-1].request() or ([], b"")
        await wait_until(lambda: all(server.end for server in self.servers))
        return lines

    async def test_host_and_path_are_sent_unchanged(self) -> None:
        endpoints = Endpoints(reactor, self.resolver)
        for agent in (Agent.usingEndpointFactory(reactor, endpoints), StrictAgent(endpoints)):
            for host, address in (
                ("_api.internal", "::1"),
                ("my_app.flycast", "127.0.0.1"),
                ("name.example.", "127.0.0.1"),
                ("[::1]", "::1"),
                ("127.0.0.1", "127.0.0.1"),
            ):
                self.know(host, address)
                port = self.serve(address)
                lines = await self.request(agent, f"http://{host}:{port}")
                self.assertEqual("GET /a%20b?c=d HTTP/1.1", lines[0])
                self.assertIn(f"Host: {host}:{port}", lines)


class TLSTests(EndpointTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.authority = Authority()
        self.trusted = Path(self.mktemp())
        self.trusted.write_bytes(self.authority.certificate)
        self.asked_for: list[bytes | None] = []

    def serve_tls(self, host: str, address: str = "127.0.0.1", *, by: Authority, days: float = 30) -> int:
        """Listen with a certificate for a host and return the port."""
        both = Path(self.mktemp())
        both.write_bytes(b"".join(by.issue(host, days)))
        context = DefaultOpenSSLContextFactory(str(both), str(both), TLS_METHOD)
        context.getContext().set_tlsext_servername_callback(
            lambda connection: self.asked_for.append(connection.get_servername())
        )
        port = reactor.listenSSL(0, self.factory(), context, interface=address)
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    def request(self, host: str, port: int) -> Deferred[Any]:
        tls = CertificateOptions(trustRoot=platformTrust())
        tls.getContext().load_verify_locations(str(self.trusted))
        agent = Agent.usingEndpointFactory(reactor, Endpoints(reactor, self.resolver, tls))
        return Deferred.fromCoroutine(send_request(agent, "GET", f"https://{host}:{port}", "/"))

    async def test_accepts_trusted_certificates_for_the_host(self) -> None:
        for host, name, address in (
            ("api.machines.dev", "api.machines.dev", "127.0.0.1"),
            ("API.Machines.dev", "api.machines.dev", "127.0.0.1"),
            ("api.machines.dev.", "api.machines.dev", "127.0.0.1"),
            ("a.machines.dev", "*.machines.dev", "127.0.0.1"),
            ("_api.internal", "_api.internal", "::1"),
            ("[::1]", "::1", "::1"),
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ):
            self.know(host, address)
            response = await self.request(host, self.serve_tls(name, address, by=self.authority))
            self.assertEqual(200, response.code)
            await wait_until(lambda: all(server.end for server in self.servers))
            sent = None if name == address else host.rstrip(".").lower().encode()
            self.assertEqual(sent, self.asked_for[-1], host)

    async def refused(self, host: str, port: int) -> str:
        """Return why a request fails; check that the server received nothing."""
        with self.assertRaises(Exception) as caught:
            await self.request(host, port)
        self.assertIsInstance(root_cause(caught.exception), CertificateError)
        await wait_until(lambda: all(server.end for server in self.servers))
        self.assertEqual([], [server for server in self.servers if server.received])
        return describe(caught.exception)

    async def test_rejects_all_other_certificates(self) -> None:
        self.know("right", "127.0.0.1")
        for name, by, days, why in (
            ("wrong", self.authority, 30, "the certificate is not valid for right"),
            ("*", self.authority, 30, "the certificate is not valid for right"),
            ("127.0.0.1", self.authority, 30, "the certificate is not valid for right"),
            ("right", Authority(), 30, "the certificate is not trusted: "),
            ("right", self.authority, -1, "the certificate is not trusted: cert has expired"),
        ):
            self.assertIn(why, await self.refused("right", self.serve_tls(name, by=by, days=days)))
        port = self.serve_tls("localhost", by=self.authority)
        self.assertEqual("the certificate is not valid for 127.0.0.1", await self.refused("127.0.0.1", port))

    async def test_error_of_a_server_without_tls_mentions_tls(self) -> None:
        with self.assertRaises(Exception) as caught:
            await self.request("127.0.0.1", self.listen(_Plain()))
        self.assertIn("TLS: ", describe(caught.exception))


class _Plain(Factory):
    """Sends plain HTTP at once."""

    noisy = False

    def buildProtocol(self, _: object) -> Protocol:
        class Greeter(Protocol):
            def connectionMade(self) -> None:
                assert self.transport is not None
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                self.transport.loseConnection()

        return Greeter()
