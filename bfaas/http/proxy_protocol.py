"""
Parser for the PROXY protocol, versions 1 and 2, in which a proxy sends a client's address.

https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt. Twisted's parser closes connections whose header
is `PROXY UNKNOWN` or arrives in two pieces, and `dataReceived` raises an exception for an invalid port.
"""

from __future__ import annotations

from ipaddress import IPv4Address as IPv4
from ipaddress import IPv6Address as IPv6
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet.address import IPv4Address, IPv6Address

if TYPE_CHECKING:
    from twisted.internet.interfaces import IAddress

_V1 = b"PROXY "
_V1_MAX_LENGTH = 107
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED = 16
_V2_LOCAL, _V2_PROXY = 0x20, 0x21
_V2_NO_IP = (0, 3)  # address families: unspecified, UNIX
_V2_WIDTHS = {1: 4, 2: 16}  # bytes of an address, by address family: IPv4, IPv6
_V2_MAX_LENGTH = 16 << 10
"""Far more than a proxy sends: up to 216 bytes of addresses, and some hundred bytes of extensions."""

_V1_FIELDS = 6
_PORT_COUNT = 1 << 16


class ProxyHeader(NamedTuple):
    """
    The content of a PROXY header, and the data after it in `rest`.

    `source` is the client, `destination` the address that it connected to. Both are None if the header has
    no IP addresses: for the proxy's own connections (health checks) and for UNIX sockets.
    """

    source: IAddress | None
    destination: IAddress | None
    rest: bytes


class ProxyHeaderReader:
    """Parses a header incrementally."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> ProxyHeader | None:
        """Return the parsed header, None while incomplete. Raises `ValueError` for an invalid header."""
        self._data += data
        if _V2.startswith(self._data[: len(_V2)]):
            return self._version_2()
        if _V1.startswith(self._data[: len(_V1)]):
            return self._version_1()
        raise ValueError("not a PROXY protocol header")

    def _version_1(self) -> ProxyHeader | None:
        line, end, rest = self._data.partition(b"\r\n")
        if not end and len(line) < _V1_MAX_LENGTH:
            return None
        if len(line) + len(end) > _V1_MAX_LENGTH:
            raise ValueError("PROXY protocol header too long")
        fields = line.decode("ascii").split(" ")
        if fields[1] == "UNKNOWN":
            return ProxyHeader(None, None, rest)
        if len(fields) != _V1_FIELDS or fields[1] not in ("TCP4", "TCP6"):
            raise ValueError("invalid PROXY protocol header")
        _, family, source, destination, *ports = fields
        source_port, destination_port = map(_port, ports)
        if family == "TCP4":
            return ProxyHeader(_ipv4(source, source_port), _ipv4(destination, destination_port), rest)
        return ProxyHeader(_ipv6(source, source_port), _ipv6(destination, destination_port), rest)

    def _version_2(self) -> ProxyHeader | None:
        data = self._data
        if len(data) < _V2_FIXED:
            return None
        version_and_command, family_and_transport = data[12], data[13]
        end = _V2_FIXED + int.from_bytes(data[14:16], "big")
        if version_and_command not in (_V2_LOCAL, _V2_PROXY) or end > _V2_MAX_LENGTH:
            raise ValueError("invalid PROXY protocol header")
        if len(data) < end:
            return None
        addresses, rest = data[_V2_FIXED:end], data[end:]
        family = family_and_transport >> 4
        if version_and_command == _V2_LOCAL or family in _V2_NO_IP:
            return ProxyHeader(None, None, rest)
        width = _V2_WIDTHS.get(family)
        if width is None or len(addresses) < 2 * width + 4:
            raise ValueError("invalid PROXY protocol header")
        source, destination = addresses[:width], addresses[width : 2 * width]
        ports = addresses[2 * width : 2 * width + 4]
        source_port, destination_port = int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:], "big")
        address = _ipv4 if width == _V2_WIDTHS[1] else _ipv6
        return ProxyHeader(address(source, source_port), address(destination, destination_port), rest)


def _ipv4(address: str | bytes, port: int) -> IPv4Address:
    return IPv4Address("TCP", str(IPv4(address)), port)


def _ipv6(address: str | bytes, port: int) -> IPv6Address:
    return IPv6Address("TCP", str(IPv6(address)), port)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < _PORT_COUNT):  # noqa: PLR2004
        raise ValueError("invalid port in a PROXY protocol header")
    return int(text)
