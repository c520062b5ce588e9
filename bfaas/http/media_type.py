"""
Decides by a request's headers whether its body is a script or a JSON request.

A body in an unsupported coding, media type or charset must not run: bash would take the first lines of a
compressed script for unknown commands, and execute the rest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bfaas.http.errors import HTTPError

if TYPE_CHECKING:
    from twisted.web.http_headers import Headers

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110, 5.6.2
_PARAMETER = rf'({_TOKEN})=(?:({_TOKEN})|"((?:[^"\\]|\\.)*+)")'
# Possessive, since a client may send thousands of spaces and semicolons.
_MEDIA_TYPE = re.compile(rf"({_TOKEN}/{_TOKEN})((?:[ \t]*+;[ \t]*+(?:{_PARAMETER})?+)*+)[ \t]*+")
_PARAMETERS = re.compile(_PARAMETER)

_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})

_BINARY_TYPES = frozenset({"multipart", "image", "audio", "video", "font", "model"})
_OTHER_JSON = frozenset({"json", "x-json", "json5", "json-seq", "ndjson", "x-ndjson", "jsonl", "x-jsonl"})
_ARCHIVES = frozenset(
    {"br", "bzip2", "gzip", "tar", "xz", "zip", "zstd", "x-7z-compressed", "x-brotli", "x-bzip", "x-bzip2"}
    | {"x-compress", "x-compressed", "x-gzip", "x-lzma", "x-tar", "x-xz", "x-zip-compressed", "x-zstd"}
)

# `name=value` pairs. As a script these could only set variables: they have no blank, quote, `;`, `|`, `$` or
# line end, and no part without `=`, which could be a command.
_PAIR = rb"[\w.~%+*\[\]-]+=[\w.~%+*\[\]!'():/@,?=-]*"
_PAIRS = re.compile(rb"%b(?:&%b)*" % (_PAIR, _PAIR))
# Percent-encoded text, with `%20` or `+` for a blank and `%0A` for a line end.
_ENCODED = re.compile(rb"(?:[\w.~+*&=-]++|%[0-9A-Fa-f]{2})*+")


def body_is_json(headers: Headers, body: bytes) -> bool:
    """
    Return whether a body is a JSON request; otherwise it is the script itself.

    Raises `HTTPError`: 415 for an unsupported coding, media type or charset, 400 for a partial body or an
    invalid or repeated media type.
    """
    _check_coding(headers)
    if headers.hasHeader("Content-Range"):
        raise HTTPError(400, "Content-Range is not supported")
    values = headers.getRawHeaders("Content-Type", [])
    if len(values) > 1:
        raise HTTPError(400, "more than one Content-Type")
    value = "".join(values).strip(" \t")
    if not value:
        return False
    match = _MEDIA_TYPE.fullmatch(value)
    if match is None:
        raise HTTPError(400, "invalid Content-Type")
    media_type = match[1].lower()
    for name, token, quoted in _PARAMETERS.findall(match[2]):
        if name.lower() == "charset" and (token or quoted).lower() not in _CHARSETS:
            raise _unsupported("unsupported charset: send UTF-8")
    _check_media_type(media_type)
    if media_type == FORM and is_form(body):
        raise _unsupported("the body is form data: send the script itself, or send it as text/plain")
    return media_type == JSON


def is_form(body: bytes) -> bool:
    """
    Return whether a body of the form media type is form data, and not a script.

    `curl -d` sends scripts with that type. So a body counts as form data only if it is useless as a script:
    `name=value` pairs joined by `&`, or percent-encoded text.
    """
    if _PAIRS.fullmatch(body):
        return True
    return b"%" in body and _ENCODED.fullmatch(body) is not None


def _check_coding(headers: Headers) -> None:
    codings = ",".join(headers.getRawHeaders("Content-Encoding", [])).lower().split(",")
    if any(coding.strip(" \t") not in ("", "identity") for coding in codings):
        # RFC 9110, 15.5.16: the header names what would be accepted.
        message = "Content-Encoding is not supported: send the body uncompressed"
        raise HTTPError(415, message, {"Accept-Encoding": "identity"})


def _check_media_type(media_type: str) -> None:
    """Raise `HTTPError` for media types that are neither a JSON request nor a script."""
    family, _, name = media_type.partition("/")
    suffix = name.rpartition("+")[2]
    if family == "multipart":
        raise _unsupported("form data is not supported: send the script itself as the body")
    if media_type != JSON and (name in _OTHER_JSON or suffix == "json"):
        raise _unsupported("unsupported JSON type: send application/json")
    if family in _BINARY_TYPES or name in _ARCHIVES or ("+" in name and suffix in _ARCHIVES):
        raise _unsupported("unsupported Content-Type: send text/plain or application/json")


def _unsupported(message: str) -> HTTPError:
    return HTTPError(415, message, {"Accept": f"text/plain, {JSON}"})
