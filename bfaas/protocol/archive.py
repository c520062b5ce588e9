"""
A strict, incremental reader of tar archives, for archives from clients and from a script's directory.

It accepts regular files and directories of the formats that GNU tar, bsdtar and Python's tarfile write
(POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar Format").
Links, devices and sparse files are not unpacked. Its time and memory are linear in what it reads, whereas
`tarfile` in supported versions of Python can loop forever (CVE-2025-8194) or take quadratic time
(CVE-2024-6232) in this process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

_BLOCK = 512
_MAX_EXTENSION = 16 * 1024
"""Bytes of a long name or a pax header: paths are shorter, and other keys are ignored."""

_MAX_EXTENSIONS = 16
"""Consecutive headers without a member."""

_NAME_KINDS = {b"L": "path", b"K": "linkpath"}


class InvalidArchiveError(ValueError):
    """An archive is invalid. The message is a short phrase of ASCII."""


@dataclass(frozen=True)
class Member:
    """
    An entry of an archive. `path` may be invalid in any way.

    `kind` is tar's type flag: b"0" for regular files, b"5" for directories, others are not supported.
    """

    path: bytes
    kind: bytes
    size: int
    mode: int


class MemberReceiver(Protocol):
    """Receives the members of an archive."""

    def start_member(self, member: Member) -> None:
        """Begin a member; `data` follows for `size` bytes, if it has any."""
        ...

    def member_data(self, data: bytes) -> None:
        """Add a piece of the current member."""
        ...


class ArchiveReader:
    """Parses an archive in pieces. Exceptions of the receiver pass through."""

    def __init__(self, receiver: MemberReceiver) -> None:
        self._receiver = receiver
        self._buffer = bytearray()
        self._left = 0  # bytes of the current member's data
        self._padding = 0
        self._extension: bytes | None = None  # the kind of the header whose data is read
        self._extensions = 0
        self._overrides: dict[str, bytes] = {}
        self.ended = False
        """Whether the end of the archive was read."""

    def feed(self, data: bytes) -> None:
        """Parse a piece. Raises `InvalidArchiveError`."""
        self._buffer += data
        while not self.ended and self._step():
            pass

    def finish(self) -> None:
        """Raise `InvalidArchiveError` if the archive is incomplete. The final zero blocks may be missing."""
        if not self.ended and (self._buffer or self._left or self._padding or self._overrides):
            raise InvalidArchiveError("it is cut off")

    def _step(self) -> bool:
        """Parse one item. Return whether there was enough data."""
        buffer = self._buffer
        if self._extension is not None:
            return self._read_extension(self._extension)
        if self._left:
            piece = bytes(buffer[: self._left])
            if piece:
                del buffer[: len(piece)]
                self._left -= len(piece)
                self._receiver.member_data(piece)
            return bool(piece)
        if self._padding:
            skipped = min(self._padding, len(buffer))
            del buffer[:skipped]
            self._padding -= skipped
            return bool(skipped)
        if len(buffer) < _BLOCK:
            return False
        header = bytes(buffer[:_BLOCK])
        del buffer[:_BLOCK]
        self._read_header(header)
        return True

    def _read_header(self, header: bytes) -> None:
        if not header.strip(b"\0"):
            self.ended = True
            return
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _number(header[148:156]) != checksum:
            raise InvalidArchiveError("it is not a tar archive, or damaged")
        kind, size = header[156:157], _number(header[124:136])
        if kind in (b"x", b"g", *_NAME_KINDS):
            self._extensions += 1
            if size > _MAX_EXTENSION or self._extensions > _MAX_EXTENSIONS:
                raise InvalidArchiveError("its headers are too large")
            self._extension, self._left = kind, size
            self._padding = -size % _BLOCK
            return
        overrides, self._overrides, self._extensions = self._overrides, {}, 0
        if any(key.startswith("GNU.sparse.") for key in overrides):
            kind = b"S"
        if "size" in overrides:
            size = _decimal(overrides["size"])
        # Only regular files have data, whatever the size of a link or directory says.
        regular = kind in (b"0", b"\0", b"7")
        kind = b"0" if regular else kind
        if not regular and kind != b"S":
            size = 0
        member = Member(overrides.get("path") or _path(header), kind, size, _number(header[100:108]) & 0o777)
        self._left, self._padding = size, -size % _BLOCK
        self._receiver.start_member(member)

    def _read_extension(self, kind: bytes) -> bool:
        if len(self._buffer) < self._left:
            return False
        data = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left, self._extension = 0, None
        if kind in _NAME_KINDS:
            self._overrides[_NAME_KINDS[kind]] = data.rstrip(b"\0")
        elif kind == b"x":
            self._overrides |= _pax_records(data)
        elif not {"path", "size"}.isdisjoint(_pax_records(data)):
            raise InvalidArchiveError("a global header sets a path or size")  # git sets a comment
        return True


def _path(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # Old GNU archives have times where POSIX has a prefix; their magic is "ustar  ".
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """Decode an octal number, or one in GNU's base 256. Raises `InvalidArchiveError`."""
    if field[0] == 0x80:  # noqa: PLR2004 - the flag of a positive number
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise InvalidArchiveError("it is not a tar archive, or damaged")
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", digits):
        raise InvalidArchiveError("invalid pax header")
    return int(digits)


def _pax_records(data: bytes) -> Mapping[str, bytes]:
    """Decode records of "LENGTH KEY=VALUE" and a line feed."""
    records = {}
    at = 0
    while at < len(data):
        length = re.compile(rb"([1-9][0-9]{0,5}) ").match(data, at)
        end = at + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise InvalidArchiveError("invalid pax header")
        key, equals, value = data[length.end() : end - 1].partition(b"=")
        if not equals:
            raise InvalidArchiveError("invalid pax header")
        records[key.decode("utf-8", "replace")] = value
        at = end
    return records
