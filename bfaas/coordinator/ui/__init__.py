"""
The page: what a browser is shown at `/`. Its files stand beside this one and are served as they are.

It loads nothing from elsewhere, and is forbidden to: see `_POLICY`.
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

# Scripts write what they like to the page. It is shown as text; should that ever fail, then nothing inline
# runs, strings are not made into markup or code, and there is nowhere to send anything but here.
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
    # To be kept, and asked about each time: a new version is seen at once.
    "Cache-Control": "no-cache",
}


def serve_page(app: Klein) -> None:
    """Give an app the page at `/`, and the files that it loads beside it. They are read now, once."""
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
        if _is_known(request, etag):
            request.setResponseCode(NOT_MODIFIED)
            return b""
        request.setHeader("Content-Type", type_)
        request.setHeader("Content-Length", str(len(content)))
        return content

    route: Any = app.route(url, methods=["GET"], endpoint=f"page {url}")
    route(render)


# RFC 9110, 8.8.3; what makes a tag a weak one stands before it.
_TAG = re.compile(r'"[^"\s]*"')


def _is_known(request: Request, etag: str) -> bool:
    """Return whether `If-None-Match` has the tag, which is compared weakly (RFC 9110, 13.1.2)."""
    listed = ",".join(request.requestHeaders.getRawHeaders("If-None-Match", []))
    return listed.strip() == "*" or etag in _TAG.findall(listed)
