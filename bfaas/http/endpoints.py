"""
TCP and TLS connections to a host, by any name or address that the system resolves, and UNIX sockets.

Twisted's `HostnameEndpoint` and `optionsForClientTLS` accept names of IDNA 2008 only. Those have no
underscores, unlike Fly's `_api.internal` and some names in /etc/hosts and in private zones.
"""

from __future__ import annotations

import socket
from collections import deque
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote
from weakref import ref

from OpenSSL.SSL import VERIFY_FAIL_IF_NO_PEER_CERT, VERIFY_PEER, X509VerificationCodes
from OpenSSL.SSL import Error as TLSError
from service_identity import CertificateError as BadIdentityError
from service_identity import VerificationError
from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity
from service_identity.pyopenssl import extract_patterns
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    UNIXClientEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import DNSLookupError
from twisted.internet.error import TimeoutError as ConnectTimeoutError
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IStreamClientEndpoint
from twisted.internet.ssl import CertificateOptions, platformTrust
from twisted.python.failure import Failure
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from bfaas.deadline import Deadline, DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from OpenSSL.crypto import X509
    from OpenSSL.SSL import Connection
    from twisted.internet.interfaces import IDelayedCall, IProtocol, IProtocolFactory
    from twisted.protocols.tls import TLSMemoryBIOProtocol
    from twisted.web.client import URI

CONNECT_TIMEOUT = 5.0
"""Seconds that connecting to one address may take."""

LOOKUP_TIMEOUT = 10.0
"""Seconds that a lookup may take: two attempts of resolv.conf(5)."""

UNIX_SCHEME = "http+unix"
"""
Scheme of URLs for HTTP over a UNIX socket, whose percent-encoded path is the host, as in other clients
(https://pypi.org/project/requests-unixsocket/).
"""

UNIX_HOST = b"localhost"
"""The Host header of requests to a UNIX socket, whose path is not a valid one."""

_ATTEMPT_DELAY = 0.25
"""Seconds after which the next address is tried too (RFC 8305, section 8)."""


class CertificateError(Exception):
    """The server's certificate is not trusted, or not valid for this host."""


def unix_url(path: str) -> str:
    """Return the URL of the HTTP server that listens on a UNIX socket."""
    return f"{UNIX_SCHEME}://{quote(path, safe='')}"


def unix_path(url: str) -> str:
    """Return the path in a URL of `unix_url`."""
    return unquote(url.removeprefix(f"{UNIX_SCHEME}://"))


class Resolver:
    """
    The system's resolver (getaddrinfo), in threads.

    Concurrent lookups of a name share one thread. It is a daemon thread, unlike those of the reactor's pool,
    so that a lookup that hangs does not delay the exit of the process.
    """

    def __init__(self, reactor: Any, getaddrinfo: Callable[..., Sequence[Any]] = socket.getaddrinfo) -> None:
        self._reactor = reactor
        self._getaddrinfo = getaddrinfo
        self._waiting: dict[str, list[Deferred[list[str]]]] = {}

    def lookup(self, host: str) -> Deferred[list[str]]:
        """Return the addresses of `host`, best first. Raises `DNSLookupError`."""
        if host not in self._waiting:
            thread = Thread(target=self._run, args=(host,), name=f"lookup of {host}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # too many threads
                return fail(DNSLookupError(f"{host}: {error}"))
            self._waiting[host] = []
        waiting = self._waiting[host]
        addresses: Deferred[list[str]] = Deferred(waiting.remove)
        waiting.append(addresses)
        return addresses

    def _run(self, host: str) -> None:
        """Look the name up, in a thread. It is passed as bytes, which `socket` does not encode with IDNA."""
        try:
            results = self._getaddrinfo(host.encode(), None, type=socket.SOCK_STREAM)
            outcome: Any = list(dict.fromkeys(address[0] for *_, address in results))
        except OSError as error:
            outcome = Failure(DNSLookupError(f"{host}: {error.strerror}"))
        except Exception as error:  # noqa: BLE001 - a name that getaddrinfo rejects
            outcome = Failure(DNSLookupError(f"{host}: {error}"))
        self._reactor.callFromThread(self._finish, host, outcome)

    def _finish(self, host: str, outcome: Any) -> None:
        waiting = self._waiting.pop(host)
        while waiting:  # a callback may cancel another lookup
            waiting.pop(0).callback(outcome)


class _Race:
    """Connects to the first endpoint that accepts; tries the next if one fails or is slow (RFC 8305)."""

    def __init__(
        self, clock: Any, endpoints: Sequence[IStreamClientEndpoint], factory: IProtocolFactory
    ) -> None:
        self._clock = clock
        self._remaining = deque(endpoints)
        self._factory = factory
        self._attempts: list[Deferred[IProtocol]] = []
        self._timer: IDelayedCall | None = None
        self._stopped = False
        self.winner: Deferred[IProtocol] = Deferred(lambda _: self._stop())
        self._try_next()

    def _try_next(self) -> None:
        self._cancel_timer()
        attempt = self._remaining.popleft().connect(self._factory)
        self._attempts.append(attempt)
        if self._remaining:
            self._timer = self._clock.callLater(_ATTEMPT_DELAY, self._try_next)
        attempt.addCallbacks(self._succeeded, self._failed, callbackArgs=(attempt,), errbackArgs=(attempt,))

    def _succeeded(self, protocol: IProtocol, attempt: Deferred[IProtocol]) -> None:
        self._attempts.remove(attempt)
        self._stop()
        self.winner.callback(protocol)

    def _failed(self, failure: Failure, attempt: Deferred[IProtocol]) -> None:
        self._attempts.remove(attempt)
        if self._stopped:
            return
        if self._remaining:
            self._try_next()
        elif not self._attempts:
            self.winner.errback(failure)

    def _stop(self) -> None:
        self._stopped = True
        self._cancel_timer()
        for attempt in list(self._attempts):
            attempt.cancel()

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()


@implementer(IStreamClientEndpoint)
class HostEndpoint:
    """
    TCP to a host, given as an address or a name.

    Connecting fails with the errors of Twisted's endpoints: `DNSLookupError` or a `ConnectError`.
    """

    def __init__(self, reactor: Any, resolver: Resolver, host: str, port: int) -> None:
        self._reactor = reactor
        self._resolver = resolver
        self._host = host
        self._port = port

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect. Cancelling closes all open connections."""
        if isIPAddress(self._host) or isIPv6Address(self._host):
            return self._endpoint_at(self._host).connect(protocolFactory)
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        try:
            addresses = await Deadline(self._reactor, LOOKUP_TIMEOUT).run(self._resolver.lookup(self._host))
        except DeadlineExceededError:
            raise DNSLookupError(f"{self._host}: no response within {LOOKUP_TIMEOUT:g} s") from None
        return await _Race(self._reactor, list(map(self._endpoint_at, addresses)), factory).winner

    def _endpoint_at(self, address: str) -> IStreamClientEndpoint:
        kind = TCP6ClientEndpoint if isIPv6Address(address) else TCP4ClientEndpoint
        endpoint: IStreamClientEndpoint = kind(self._reactor, address, self._port, timeout=CONNECT_TIMEOUT)
        return endpoint


@implementer(IOpenSSLClientConnectionCreator)
class _VerifiedTLS:
    """TLS to a host, whose certificate must be trusted by the system and match the host."""

    def __init__(self, options: CertificateOptions, host: str) -> None:
        self._options = options
        # Neither SNI (RFC 6066, section 3) nor a certificate's name has the dot of an absolute name.
        self._host = host.rstrip(".").lower()
        self._is_address = isIPAddress(host) or isIPv6Address(host)

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Connection:
        """Create the connection."""
        connection = self._options.clientConnectionForTLS(tlsProtocol)
        if not self._is_address:
            connection.set_tlsext_host_name(self._host.encode())
        # A reference to the protocol from its own connection would be a cycle.
        protocol = ref(tlsProtocol)

        def verify(_: Connection, certificate: X509, code: int, depth: int, trusted: int) -> bool:
            problem = self._problem(certificate, code, depth, trusted=bool(trusted))
            if problem is None:
                return True
            if (failing := protocol()) is not None:
                failing.failVerification(Failure(CertificateError(problem)))
            return False

        connection.set_verify(VERIFY_PEER | VERIFY_FAIL_IF_NO_PEER_CERT, verify)
        return connection

    def _problem(self, certificate: X509, code: int, depth: int, *, trusted: bool) -> str | None:
        """Return why a certificate is rejected, or None. OpenSSL would lose exceptions, so all are caught."""
        if not trusted:
            return f"the certificate is not trusted: {_reason(code)}"
        if depth > 0:
            return None
        try:
            identity = (IPAddress_ID if self._is_address else DNS_ID)(self._host)
            verify_service_identity(extract_patterns(certificate), [identity], [])
        except (VerificationError, BadIdentityError):
            return f"the certificate is not valid for {self._host}"
        except Exception as error:  # noqa: BLE001
            return f"the certificate cannot be verified: {error!r}"
        return None


def _reason(code: int) -> str:
    """Return a verification error's name, such as "cert has expired" for ERR_CERT_HAS_EXPIRED."""
    names = (name for name, number in vars(X509VerificationCodes).items() if number == code)
    return next(names, f"error {code}").removeprefix("ERR_").replace("_", " ").lower()


@implementer(IStreamClientEndpoint)
class _QuietEndpoint:
    """Connects without a log line for each connection made and closed."""

    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self._endpoint = endpoint

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        """Connect."""
        protocolFactory.noisy = False
        return self._endpoint.connect(protocolFactory)


@implementer(IAgentEndpointFactory)
class Endpoints:
    """
    Chooses TCP, TLS or a UNIX socket by a URL's scheme.

    By default certificates are verified against the system's trust store, or SSL_CERT_FILE and SSL_CERT_DIR.
    """

    def __init__(
        self, reactor: Any, resolver: Resolver | None = None, tls: CertificateOptions | None = None
    ) -> None:
        self._reactor = reactor
        self._resolver = resolver or Resolver(reactor)
        self._tls = tls

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Return the endpoint."""
        host = uri.host.decode("ascii")
        if uri.scheme.decode("ascii") == UNIX_SCHEME:
            return _QuietEndpoint(UNIXClientEndpoint(self._reactor, unquote(host), timeout=CONNECT_TIMEOUT))
        endpoint: IStreamClientEndpoint = HostEndpoint(self._reactor, self._resolver, host, uri.port)
        if uri.scheme == b"https":
            if self._tls is None:  # once, since it reads the whole trust store
                self._tls = CertificateOptions(trustRoot=platformTrust())
            endpoint = wrapClientTLS(_VerifiedTLS(self._tls, host), endpoint)
        return _QuietEndpoint(endpoint)


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost error of one wrapped by Twisted's agent or by `raise ... from`."""
    reasons = getattr(error, "reasons", None)  # of twisted.web.client.ResponseFailed and similar errors
    if reasons:
        return root_cause(reasons[0].value)
    return error if error.__cause__ is None else root_cause(error.__cause__)


def describe(error: BaseException) -> str:
    """Return why a request got no response, as one line."""
    cause = root_cause(error)
    if isinstance(cause, ConnectTimeoutError):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(cause, TLSError):
        reasons = cause.args[0] if cause.args and isinstance(cause.args[0], list) else []
        return f"TLS: {', '.join(str(reason[-1]) for reason in reasons) or 'the connection was closed'}"
    return " ".join(str(cause).split()) or type(cause).__name__
