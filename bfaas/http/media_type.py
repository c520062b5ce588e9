"""
Decides by a request's headers whether its body is a script, a JSON request or a form.

A body in an unsupported coding, media type or charset must not run: bash would take the first lines of a
compressed script for unknown commands, and execute the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfaas.http.errors import HTTPError

if TYPE_CHECKING:
    from twisted.web.http_headers import Headers

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110, 5.6.2
_PARAMETER = rf'({_TOKEN})=(?:({_TOKEN})|"((?:[^"\\]|\\.)*+)")'
# Possessive, since a client may send thousands of spaces and semicolons.
_MEDIA_TYPE = re.compile(rf"({_TOKEN}/{_TOKEN})((?:[ \t]*+;[ \t]*+(?:{_PARAMETER})?+)*+)[ \t]*+")
_PARAMETERS = re.compile(_PARAMETER)

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046, 5.1.1

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


@dataclass(frozen=True)
class BodyType:
    """What a body is: a JSON request, a form if `boundary` is set, or otherwise the script itself."""

    is_json: bool = False
    boundary: bytes | None = None


def body_type(headers: Headers, body: bytes, *, multipart: bool = False) -> BodyType:
    """
    Return what a body is. Forms (`multipart/form-data`) are supported only with `multipart`.

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
        return BodyType()
    media_type, boundary = _parse(value)
    if multipart and media_type == MULTIPART:
        if not _BOUNDARY.fullmatch(boundary):
            raise HTTPError(400, "a multipart form without a valid boundary")
        return BodyType(boundary=boundary.encode())
    _check_media_type(media_type)
    if media_type == FORM and is_form(body):
        raise _unsupported("the body is form data: send the script itself, or send it as text/plain")
    return BodyType(is_json=media_type == JSON)


def _parse(value: str) -> tuple[str, str]:
    """Return the media type, in lower case, and its boundary, which may be empty. Raises `HTTPError`."""
    match = _MEDIA_TYPE.fullmatch(value)
    if match is None:
        raise HTTPError(400, "invalid Content-Type")
    boundaries = []
    for name, token, quoted in _PARAMETERS.findall(match[2]):
        if name.lower() == "charset" and not is_supported_charset(token or quoted):
            raise _unsupported("unsupported charset: send UTF-8")
        if name.lower() == "boundary":
            boundaries.append(token or quoted)
    if len(boundaries) > 1:
        raise HTTPError(400, "more than one boundary")
    return match[1].lower(), "".join(boundaries)


def is_supported_charset(name: str) -> bool:
    """Return whether text in a charset is UTF-8."""
    return name.lower() in _CHARSETS


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
        raise _unsupported("unsupported multipart type: send multipart/form-data to a coordinator")
    if media_type != JSON and (name in _OTHER_JSON or suffix == "json"):
        raise _unsupported("unsupported JSON type: send application/json")
    if family in _BINARY_TYPES or name in _ARCHIVES or ("+" in name and suffix in _ARCHIVES):
        raise _unsupported("unsupported Content-Type: send text/plain or application/json")


def _unsupported(message: str) -> HTTPError:
    return HTTPError(415, message, {"Accept": f"text/plain, {JSON}, {MULTIPART}"})
