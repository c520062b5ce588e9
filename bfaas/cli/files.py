"""The files of `bfaas run`: those it sends, and those it writes when a run returns them."""

from __future__ import annotations

import os
import secrets
import stat
from base64 import b64decode, b64encode
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bfaas.protocol.files import DEFAULT_MODE
from bfaas.system.stdio import InputError, OutputError, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_OWNER_BITS = 0o600


def files_to_send(arguments: Sequence[str]) -> dict[str, object]:
    """
    Return the `files` of a JSON request for the values of `--file`, each `PATH` or `NAME=PATH`.

    A file is sent under the last component of its path, or as `NAME`; a directory with all that is in it.
    Raise `InputError` if one cannot be read or is not supported, `ValueError` if two have one name.
    """
    files: dict[str, object] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            name, path = os.path.basename(os.path.abspath(argument)), argument  # noqa: PTH100, PTH119 - also ".."
        for sent_as, found in _regular_files(name, path):
            if sent_as in files:
                raise ValueError(f"--file: two files have the name {sent_as!r}")
            files[sent_as] = _content(found)
    return files


def _regular_files(name: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield name and path of a file, or of all files in a directory, which must not contain links."""
    if not os.path.isdir(path):  # noqa: PTH112 - paths are text here, as the user wrote them
        yield name, path
        return
    try:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _regular_files(f"{name}/{entry.name}", entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield f"{name}/{entry.name}", entry.path
            else:
                raise InputError(f"{entry.path}: neither a regular file nor a directory")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _content(path: str) -> object:
    """Return a file as JSON: as text if possible, which is shorter; with its mode if that is unusual."""
    data = read_file(path)
    mode = _mode(path)
    if mode == DEFAULT_MODE:
        with suppress(UnicodeDecodeError):
            return data.decode()
    return {"base64": b64encode(data).decode(), "mode": f"{mode:04o}"}


def _mode(path: str) -> int:
    with suppress(OSError):  # a FIFO may be gone after it was read
        status = Path(path).stat()
        if stat.S_ISREG(status.st_mode):
            return status.st_mode & 0o777 | _OWNER_BITS
    return DEFAULT_MODE


class ReceivedFiles:
    """
    Writes the files of a run below a directory.

    A file gets its name, and replaces one that exists, when it is complete. The caller has checked names.
    Methods raise `OutputError`.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._fd: int | None = None
        self._temporary = self._path = Path()
        self._left = 0
        self.incomplete: str | None = None
        """The name of the file whose rest has not been received."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Write a `file` event; those of a file follow each other."""
        data = b64decode(event["base64"])
        try:
            if self._fd is None:
                self._create(event["name"], event["size"], int(event["mode"], 8))
            self._write(data)
            if not self._left:
                self._complete()
        except OSError as error:
            self.close()
            raise OutputError(f"{self._path}: {error.strerror}") from None

    def _create(self, name: str, size: int, mode: int) -> None:
        self._path = self._directory / name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_name(f".bfaas-{secrets.token_hex(8)}")
        # The umask applies to the mode, and no link is followed.
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        self._left, self.incomplete = size, name

    def _write(self, data: bytes) -> None:
        assert self._fd is not None  # noqa: S101 - set by _create
        self._left -= len(data)
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[os.write(self._fd, remaining) :]

    def _complete(self) -> None:
        assert self._fd is not None  # noqa: S101 - set by _create
        fd, self._fd = self._fd, None
        os.close(fd)
        try:
            self._temporary.replace(self._path)
        except OSError:
            self._temporary.unlink()
            raise
        self.incomplete = None

    def close(self) -> None:
        """Remove the file that is incomplete, if any."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._temporary.unlink(missing_ok=True)
