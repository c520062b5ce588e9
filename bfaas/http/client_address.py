"""Maps client addresses to the key under which they are counted: IPv6 addresses by their /64."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twisted.internet.interfaces import IAddress

_HOST_BITS = 64


def address_key(address: str) -> str:
    """Return the IPv4 address or IPv6 /64 of a client. Raises `ValueError` for an invalid address."""
    ip = ip_address(address)
    if not isinstance(ip, IPv6Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(IPv6Network((int(ip) >> _HOST_BITS << _HOST_BITS, 128 - _HOST_BITS)))


def peer_key(address: IAddress | None) -> str:
    """Return the key of a connection's peer; an empty string for a peer without an address (UNIX socket)."""
    host = getattr(address, "host", "")
    try:
        return address_key(host)
    except ValueError:
        return str(host)
