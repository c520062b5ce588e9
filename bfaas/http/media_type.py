"""
What the head of a request says about its body: coding, media type, character set.

A body that is not what it is taken for must not run: of a compressed script, bash would take the first lines
for unknown commands, and execute the rest.
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
# Possessive, since the head is the client's, and may have thousands of spaces and semicolons.
_MEDIA_TYPE = re.compile(rf"({_TOKEN}/{_TOKEN})((?:[ \t]*+;[ \t]*+(?:{_PARAMETER})?+)*+)[ \t]*+")
_PARAMETERS = re.compile(_PARAMETER)

_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})

_NO_TEXT = frozenset({"multipart", "image", "audio", "video", "font", "model"})
_OTHER_JSON = frozenset({"json", "x-json", "json5", "json-seq", "ndjson", "x-ndjson", "jsonl", "x-jsonl"})
_ARCHIVES = frozenset(
    {"br", "bzip2", "gzip", "tar", "xz", "zip", "zstd", "x-7z-compressed", "x-brotli", "x-bzip", "x-bzip2"}
    | {"x-compress", "x-compressed", "x-gzip", "x-lzma", "x-tar", "x-xz", "x-zip-compressed", "x-zstd"}
)

# A form of pairs. As a script it could do no more than set variables: no blank, quote, `;`, `|`, `$`, or line
# end, and no part without `=`, which could be a command.
_PAIR = rb"[\w.~%+*\[\]-]+=[\w.~%+*\[\]!'():/@,?=-]*"
_PAIRS = re.compile(rb"%b(?:&%b)*" % (_PAIR, _PAIR))
# Any text in the encoding of forms, which has `%20` or `+` for a blank and `%0A` for a line end.
_ENCODED = re.compile(rb"(?:[\w.~+*&=-]++|%[0-9A-Fa-f]{2})*+")


def body_is_json(headers: Headers, body: bytes) -> bool:
    """
    Return whether a body is a JSON request; otherwise it is the script itself.

    Raises `HTTPError`: 415 for a body in a coding, media type or character set that is not supported, 400
    for a part of a body or an unclear media type.
    """
    _check_coding(headers)
    if headers.hasHeader("Content-Range"):
        raise HTTPError(400, "Content-Range: a part of a body is not supported")
    values = headers.getRawHeaders("Content-Type", [])
    if len(values) > 1:
        raise HTTPError(400, "more than one Content-Type")
    value = "".join(values).strip(" \t")
    if not value:
        return False
    match = _MEDIA_TYPE.fullmatch(value)
    if match is None:
        raise HTTPError(400, "invalid Content-Type")
    kind = match[1].lower()
    for name, token, quoted in _PARAMETERS.findall(match[2]):
        if name.lower() == "charset" and (token or quoted).lower() not in _CHARSETS:
            raise _unsupported("the charset is not supported: send UTF-8")
    _check_kind(kind)
    if kind == FORM and is_form(body):
        raise _unsupported("the body is a form: send the script itself, or as text/plain")
    return kind == JSON


def is_form(body: bytes) -> bool:
    """
    Return whether a body of the type of forms is one, and not a script.

    `curl -d` gives scripts that type, so a body counts as a form only if it would be of no use as a script:
    if it is `name=value` pairs joined by `&`, or text in percent-encoding.
    """
    if _PAIRS.fullmatch(body):
        return True
    return b"%" in body and _ENCODED.fullmatch(body) is not None


def _check_coding(headers: Headers) -> None:
    codings = ",".join(headers.getRawHeaders("Content-Encoding", [])).lower().split(",")
    if any(coding.strip(" \t") not in ("", "identity") for coding in codings):
        # RFC 9110, 15.5.16: the header names what would have been accepted.
        line = "a Content-Encoding is not supported: send the body as it is"
        raise HTTPError(415, line, {"Accept-Encoding": "identity"})


def _check_kind(kind: str) -> None:
    """Raise `HTTPError` for media types that are neither a request in JSON nor a script."""
    family, _, name = kind.partition("/")
    suffix = name.rpartition("+")[2]
    if family == "multipart":
        raise _unsupported("a form is not supported: send the script itself as the body")
    if kind != JSON and (name in _OTHER_JSON or suffix == "json"):
        raise _unsupported("this JSON type is not supported: send application/json")
    if family in _NO_TEXT or name in _ARCHIVES or ("+" in name and suffix in _ARCHIVES):
        raise _unsupported("this Content-Type is not supported: send text/plain or application/json")


def _unsupported(line: str) -> HTTPError:
    return HTTPError(415, line, {"Accept": f"text/plain, {JSON}"})
