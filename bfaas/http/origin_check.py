"""
What a page in the user's browser must not do: have scripts run on the user's machine.

A browser sends anybody's page's requests to loopback, too. It says what page they come from, in headers that
a page cannot change; other clients send none of them.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twisted.web.server import Request

_HOST = re.compile(r"(?:(?P<name>[^:\[\]]+)|\[(?P<six>[^\[\]]+)\])(?::[0-9]{1,5})?")


def cross_origin_reason(request: Request) -> str | None:
    """
    Tell in a line why this may come from a page that is not ours; None if it does not.

    A page can give its own name our address, and is then, to the browser, the page of that name and we its
    server. So whoever comes to a loopback address must call it by a loopback name. At other addresses, where
    the user has chosen to be reached, any name will do.
    """
    host = _only(request, "Host")
    arrived_at = getattr(request.getHost(), "host", "")
    if _is_loopback(arrived_at) and host is not None and not _names_loopback(host):
        return "the Host header does not name this machine"
    origin = _only(request, "Origin")
    if origin is not None and not _is_same(origin, host):
        return "a page of another origin may not ask this"
    site = _only(request, "Sec-Fetch-Site")
    if site not in (None, "none", "same-origin", "same-site"):
        return "a page of another site may not ask this"
    return None


def _only(request: Request, name: str) -> str | None:
    """Give a header's value; two of them make one that nothing matches."""
    values = request.requestHeaders.getRawHeaders(name)
    return None if values is None else ",".join(values).strip().lower()


def _is_loopback(address: str) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_loopback


def _names_loopback(host: str) -> bool:
    name = _HOST.fullmatch(host)
    return name is not None and (name["name"] == "localhost" or _is_loopback(name["six"] or name["name"]))


def _is_same(origin: str, host: str | None) -> bool:
    """Tell whether an origin is our own; a port that its scheme implies is not written in either."""
    scheme, separator, authority = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and authority == host
