"""
The web page at `/`. Its files are in this directory, and are served unchanged.

The page loads nothing from other hosts, and its content security policy forbids it.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.web.http import NOT_MODIFIED

if TYPE_CHECKING:
    from klein import Klein
    from twisted.web.server import Request

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The page shows the output of arbitrary scripts, as text. If that ever failed, the policy would still
# prevent inline scripts, the conversion of strings into markup or code, and requests to other hosts.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Caches revalidate each time, so that a new version is used at once.
    "Cache-Control": "no-cache",
}


def serve_page(app: Klein) -> None:
    """Add routes for the page at `/` and the files that it loads. The files are read once, now."""
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in _TYPES:
            name = "" if path.name == "index.html" else path.name
            _serve(app, f"/{name}", _TYPES[path.suffix], path.read_bytes())


def _serve(app: Klein, url: str, type_: str, content: bytes) -> None:
    etag = f'"{sha256(content).hexdigest()[:32]}"'

    def render(_: object, request: Request) -> bytes:
        for name, value in _HEADERS.items():
            request.setHeader(name, value)
        request.setHeader("ETag", etag)
        if _matches(request, etag):
            request.setResponseCode(NOT_MODIFIED)
            return b""
        request.setHeader("Content-Type", type_)
        request.setHeader("Content-Length", str(len(content)))
        return content

    route: Any = app.route(url, methods=["GET"], endpoint=f"page {url}")
    route(render)


# RFC 9110, 8.8.3. The prefix of a weak tag is not part of the match.
_TAG = re.compile(r'"[^"\s]*"')


def _matches(request: Request, etag: str) -> bool:
    """Return whether `If-None-Match` contains the tag, by weak comparison (RFC 9110, 13.1.2)."""
    tags = ",".join(request.requestHeaders.getRawHeaders("If-None-Match", []))
    return tags.strip() == "*" or etag in _TAG.findall(tags)
