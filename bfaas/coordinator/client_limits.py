"""Identity of clients, and the limit on concurrent requests of each."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from bfaas.http.client_address import address_key, peer_key

if TYPE_CHECKING:
    from twisted.web.server import Request

_CLIENT_IP = b"fly-client-ip"


class Client(NamedTuple):
    """
    What a request counts for: fairness and the limit on concurrent requests are by `key`.

    `token` is the name of its access token, which is then the key. It is None if clients need no token; the
    key is that of the client's address.
    """

    key: str
    token: str | None = None


def client_key(request: Request, *, on_fly: bool) -> str:
    """
    Return the key that identifies a request's client: its IPv4 address, or the /64 of its IPv6 address.

    On Fly the address is in a header that the proxy sets; elsewhere any client could set that header, so the
    address is the peer's. An invalid header is ignored. A client can usually choose any address of its IPv6
    /64, so the /64 counts as one client. An IPv4-mapped IPv6 address counts as the IPv4 address. Peers on
    UNIX sockets have no address and count as one client.
    """
    forwarded = request.getHeader(_CLIENT_IP) if on_fly else None
    if forwarded is not None:
        try:
            return address_key(forwarded.decode("ascii"))
        except ValueError:
            pass
    return peer_key(request.getClientAddress()) or "no address"


class ConcurrencyLimiter:
    """Limits the concurrent requests of each client to `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._active: Counter[str] = Counter()

    def acquire(self, client: str) -> bool:
        """Count one more request of a client. Return False, and count nothing, if it is at its limit."""
        if self._active[client] >= self._limit:
            return False
        self._active[client] += 1
        return True

    def release(self, client: str) -> None:
        """Count one request of a client as ended."""
        self._active[client] -= 1
        if not self._active[client]:
            del self._active[client]
