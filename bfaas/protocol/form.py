"""
Requests as forms (`multipart/form-data`, RFC 7578), as `curl -F`, HTML forms and HTTP libraries send them.

A form is converted to the fields of a JSON request, so that one set of rules applies, and workers know one
format. The coordinator loads this module for the first form.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder

from bfaas.http.media_type import is_supported_charset
from bfaas.protocol.archive import ArchiveReader, InvalidArchiveError, Member
from bfaas.protocol.files import DEFAULT_MODE, MAX_FILES
from bfaas.protocol.request import InvalidRequestError, RunRequest, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_PARTS = 2 * MAX_FILES
_MAX_ENTRIES = 4 * MAX_FILES
"""Members of an archive, directories included."""

_REPEATED = ("env", "file", "outputs")
_NAMES = ("script", "stdin", "env", "timeout", "file", "tar", "outputs")
_OWNER_BITS = 0o600


def parse_form(body: bytes, boundary: bytes, max_unpacked: int) -> RunRequest:
    """
    Return the request in a form.

    `max_unpacked` limits a compressed archive, in bytes. Raises `InvalidRequestError`.
    """
    form = _Form(max_unpacked)
    for part, data in _parts(body, boundary):
        form.add(part, data)
    return RunRequest.from_fields(form.fields, len(body))


class _Form:
    """Collects the parts of a form as the fields of a JSON request."""

    def __init__(self, max_unpacked: int) -> None:
        self.fields: dict[str, Any] = {}
        self._max_unpacked = max_unpacked
        self._seen: set[str] = set()

    def add(self, part: Field | File, data: bytes) -> None:
        """Add a part. Raises `InvalidRequestError`."""
        name = part.name
        if name not in _NAMES:
            raise InvalidRequestError(f"unknown part {quoted(str(name))}: the parts are {', '.join(_NAMES)}")
        if name in self._seen and name not in _REPEATED:
            raise InvalidRequestError(f"duplicate part {name}")
        self._seen.add(name)
        match name:
            case "file":
                self._add_file(_filename(part), data, DEFAULT_MODE)
            case "tar":
                for path, content, mode in _unpack(data, self._max_unpacked):
                    self._add_file(path, content, mode)
            case "stdin":
                self.fields["stdin_base64"] = b64encode(data).decode()
            case "env":
                self._add_variable(_text(part, data))
            case "outputs":
                self.fields.setdefault("outputs", []).append(_text(part, data))
            case _:
                self.fields[name] = _text(part, data)

    def _add_variable(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidRequestError("env: a part is not NAME=VALUE")
        env = self.fields.setdefault("env", {})
        if name in env:
            raise InvalidRequestError(f"duplicate variable {quoted(name)}")
        env[name] = value

    def _add_file(self, path: str, data: bytes, mode: int) -> None:
        files = self.fields.setdefault("files", {})
        if path in files:
            raise InvalidRequestError(f"duplicate file {quoted(path)}")
        if len(files) >= MAX_FILES:
            raise InvalidRequestError(f"more than {MAX_FILES} files")
        files[path] = {"base64": b64encode(data).decode()}
        if mode != DEFAULT_MODE:
            files[path]["mode"] = f"{mode:04o}"


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[Field | File, bytes]]:
    decoder = MultipartDecoder(boundary, max_parts=_MAX_PARTS)
    decoder.receive_data(body)
    decoder.receive_data(None)
    part: Field | File | None = None
    pieces: list[bytes] = []
    try:
        while not isinstance(event := decoder.next_event(), Epilogue):
            if isinstance(event, Field | File):
                _check_encoding(event)
                part, pieces = event, []
            elif isinstance(event, Data) and part is not None:
                pieces.append(event.data)
                if not event.more_data:
                    yield part, b"".join(pieces)
    except RequestEntityTooLarge:
        raise InvalidRequestError(f"the form has more than {_MAX_PARTS} parts") from None
    except InvalidRequestError:
        raise
    except ValueError:
        raise InvalidRequestError("the body is not a complete multipart form") from None


def _check_encoding(part: Field | File) -> None:
    encoding = part.headers.get("Content-Transfer-Encoding", "binary").lower()
    charset = parse_options_header(part.headers.get("Content-Type"))[1].get("charset", "utf-8")
    if encoding not in ("binary", "8bit", "7bit"):
        raise InvalidRequestError(f"the part {quoted(str(part.name))} has a Content-Transfer-Encoding")
    if part.name not in ("file", "stdin", "tar") and not is_supported_charset(charset):
        raise InvalidRequestError(f"the part {quoted(str(part.name))} has an unsupported charset: send UTF-8")


def _text(part: Field | File, data: bytes) -> str:
    """Decode text. In a form's values that are not files, line ends are CRLF (HTML, 4.10.21.8)."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{part.name} is not UTF-8, at byte {error.start}") from None
    return text if isinstance(part, File) else text.replace("\r\n", "\n")


def _filename(part: Field | File) -> str:
    if not isinstance(part, File) or not part.filename:
        raise InvalidRequestError("a file part has no filename")
    if "/" in part.filename:
        raise InvalidRequestError(f"file: {quoted(part.filename)} has a path: send a tar part instead")
    return part.filename


class _Unpacked:
    """Collects the regular files of an archive."""

    def __init__(self) -> None:
        self.files: list[tuple[str, list[bytes], int]] = []
        self._entries = 0

    def start_member(self, member: Member) -> None:
        self._entries += 1
        path = member.path.decode("utf-8", "replace")
        if self._entries > _MAX_ENTRIES or len(self.files) >= MAX_FILES:
            raise InvalidRequestError(f"tar: more than {MAX_FILES} files, or {_MAX_ENTRIES} entries")
        if member.kind == b"5":
            return
        if member.kind != b"0":
            raise InvalidRequestError(f"tar: {quoted(path)} is neither a regular file nor a directory")
        if b"\xef\xbf\xbd" not in member.path and "\ufffd" in path:
            raise InvalidRequestError(f"tar: the path {quoted(path)} is not UTF-8")
        self.files.append((path.removeprefix("./"), [], member.mode | _OWNER_BITS))

    def member_data(self, data: bytes) -> None:
        self.files[-1][1].append(data)


def _unpack(data: bytes, max_unpacked: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield path, content and mode of each regular file of an archive, which may be compressed with gzip."""
    unpacked = _Unpacked()
    reader = ArchiveReader(unpacked)
    try:
        if data.startswith(b"\x1f\x8b"):
            data = _decompress(data, max_unpacked)
        reader.feed(data)
        reader.finish()
    except InvalidArchiveError as error:
        raise InvalidRequestError(f"tar: {error}") from None
    for path, pieces, mode in unpacked.files:
        yield path, b"".join(pieces), mode


def _decompress(data: bytes, max_unpacked: int) -> bytes:
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        unpacked = decompressor.decompress(data, max_unpacked + 1)
    except zlib.error:
        raise InvalidArchiveError("invalid gzip data") from None
    if len(unpacked) > max_unpacked:
        raise InvalidArchiveError(f"larger than {max_unpacked} bytes uncompressed")
    if not decompressor.eof:
        raise InvalidArchiveError("it is cut off")
    return unpacked
