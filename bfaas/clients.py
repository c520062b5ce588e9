"""Whose a request is, and how many requests one client may have under way."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twisted.web.server import Request

_CLIENT_IP = b"fly-client-ip"
_HOST_BITS = 64


def client_of(request: Request, *, on_fly: bool) -> str:
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
            return counted_as(told.decode("ascii"))
        except ValueError:
            pass
    peer = getattr(request.getClientAddress(), "host", None)
    return "no address" if peer is None else counted_as(peer)


def counted_as(address: str) -> str:
    """Tell the address, or the network, that counts as one client; raise `ValueError` if it is none."""
    ip = ip_address(address)
    if not isinstance(ip, IPv6Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(IPv6Network((int(ip) >> _HOST_BITS << _HOST_BITS, 128 - _HOST_BITS)))


class Shares:
    """How many requests each client has under way: `most` at the most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    def take(self, client: str) -> bool:
        """Note one more of a client; False, and it is not noted, if it has as many as it may."""
        if self._taken[client] >= self._most:
            return False
        self._taken[client] += 1
        return True

    def give_back(self, client: str) -> None:
        """Note that one has ended."""
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
