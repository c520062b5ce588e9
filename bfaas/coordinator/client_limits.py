"""Whose a request is, and how many requests one client may have under way."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bfaas.http.client_address import address_key

if TYPE_CHECKING:
    from twisted.web.server import Request

_CLIENT_IP = b"fly-client-ip"


def client_key(request: Request, *, on_fly: bool) -> str:
    """
    Name the client that a request is from, by its address.

    On Fly the proxy tells it in a header, which elsewhere anybody could write; there, and where the header
    is no address, it is the peer's. An IPv6 address counts as its /64, since that is the least that one
    client has, to choose from as it likes; an IPv4 address in an IPv6 one counts as itself. Peers without an
    address, on a UNIX socket, are one client.
    """
    told = request.getHeader(_CLIENT_IP) if on_fly else None
    if told is not None:
        try:
            return address_key(told.decode("ascii"))
        except ValueError:
            pass
    peer = getattr(request.getClientAddress(), "host", None)
    return "no address" if peer is None else address_key(peer)


class ConcurrencyLimiter:
    """How many requests each client has under way: `most` at the most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    def acquire(self, client: str) -> bool:
        """Note one more of a client; False, and it is not noted, if it has as many as it may."""
        if self._taken[client] >= self._most:
            return False
        self._taken[client] += 1
        return True

    def release(self, client: str) -> None:
        """Note that one has ended."""
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
