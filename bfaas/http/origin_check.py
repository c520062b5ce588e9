"""
Rejects cross-origin requests from browsers, so that a web page cannot run scripts on the user's machine.

Browsers send requests to loopback addresses for pages of any site. They name the page's origin in headers
that the page cannot change; other clients send none of them.
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
    Return why a request may come from a page of another origin, as one line; None if it does not.

    An attacker's domain can resolve to a loopback address (DNS rebinding); to the browser, this server is
    then of that domain's origin. So a request to a loopback address must have a loopback name in `Host`. At
    other addresses, where the user chose to be reachable, any name is allowed.
    """
    host = _joined_header(request, "Host")
    arrived_at = getattr(request.getHost(), "host", "")
    if _is_loopback(arrived_at) and host is not None and not _names_loopback(host):
        return "the Host header is not a loopback name"
    origin = _joined_header(request, "Origin")
    if origin is not None and not _is_same_origin(origin, host):
        return "cross-origin requests are not allowed"
    site = _joined_header(request, "Sec-Fetch-Site")
    if site not in (None, "none", "same-origin", "same-site"):
        return "cross-site requests are not allowed"
    return None


def _joined_header(request: Request, name: str) -> str | None:
    """Return a header in lower case; repeated headers are joined into a value that nothing matches."""
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


def _is_same_origin(origin: str, host: str | None) -> bool:
    """Return whether an origin is that of `Host`. Browsers omit the default port in both headers."""
    scheme, separator, authority = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and authority == host
