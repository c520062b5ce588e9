"""
A run's files: those of its request are written before the script starts, its outputs are read after the end.

Both are done by system programs (tar, find) in processes that are confined exactly as the script is: as its
user, in its sandbox, in its working directory. So neither can reach anything that the script cannot, and what
takes too long is killed with the run. No process of the script is left when its files are read.

The worker loads this module for the first run with files.
"""

from __future__ import annotations

import shlex
import tarfile
import time
from io import BytesIO
from typing import TYPE_CHECKING

from bfaas.protocol.archive import ArchiveReader, InvalidArchiveError, Member
from bfaas.protocol.files import (
    MAX_FILES,
    InvalidPathError,
    check_path,
    literal_prefix,
    pattern_depth,
    pattern_matcher,
)
from bfaas.protocol.formats import (
    MAX_FILE_PIECE,
    FilePiece,
    OutputFailure,
    OutputProblem,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from bfaas.protocol.files import File
    from bfaas.protocol.formats import Exit

    Run = Callable[[bytes, bytes, Callable[[Stream, bytes], None]], Awaitable[Exit]]
    """Runs a script, confined as the request's, with an input and a function that receives its output."""

# Times are those of unpacking, since clocks may differ. The umask applies.
_WRITE = b"exec tar --extract --touch --no-same-owner --no-same-permissions --file=-"

_READ = (
    b"exec tar --create --format=gnu --no-recursion --hard-dereference --quoting-style=literal "
    b"--null --verbatim-files-from --files-from=- --file=-"
)

_MAX_LISTING = 2 << 20
"""Bytes of a listing of files, of which many may not match."""

_KINDS = {
    "d": OutputProblem.DIRECTORY,
    "l": OutputProblem.SYMBOLIC_LINK,
}


class FilesNotWrittenError(OSError):
    """The files of a request could not be written. The message is tar's."""


async def write_files(run: Run, files: Mapping[str, File]) -> Exit:
    """
    Write files to the script's working directory. Return the exit of the process that does it.

    Raises `FilesNotWrittenError`, unless the exit has a reason.
    """
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, file in files.items():
            # "./", since a path may begin with a dash, or be that of an option for a restored directory.
            member = tarfile.TarInfo(f"./{path}")
            member.size, member.mode, member.mtime = len(file.data), file.mode, time.time()
            tar.addfile(member, BytesIO(file.data))
    messages = bytearray()
    exit_ = await run(_WRITE, archive.getvalue(), lambda _, data: messages.extend(data[:1000]))
    if exit_.reason is None and exit_.code != 0:
        raise FilesNotWrittenError(f"files: {messages[:1000].decode('utf-8', 'replace').strip()}")
    return exit_


async def read_files(
    run: Run, patterns: Sequence[str], max_size: int, send: Callable[[FilePiece], None]
) -> tuple[Exit, list[OutputFailure]]:
    """
    Send the files in the script's working directory that match patterns, at most `max_size` bytes in total.

    Return the exit of the last process, which has a reason if the run was ended meanwhile, and the failures.
    """
    listing = bytearray()
    exit_ = await run(_list_command(patterns), b"", _collector(listing))
    if exit_.reason is not None:
        return exit_, []
    if exit_.code > 1:  # find could not run; 1 means that it could not read a directory
        return exit_, [OutputFailure.of(pattern, OutputProblem.UNREADABLE) for pattern in patterns]
    if len(listing) > _MAX_LISTING:
        return exit_, [OutputFailure.of(pattern, OutputProblem.TOO_MANY_FILES) for pattern in patterns]
    chosen, failures = _choose(patterns, _entries(bytes(listing)), max_size)
    if chosen:
        names = b"".join(f"./{name}\0".encode() for name in chosen)
        messages = bytearray()
        reader = _Sender(chosen, send)

        def receive(stream: Stream, data: bytes) -> None:
            if stream is Stream.STDOUT:
                reader.feed(data)
            elif len(messages) < _MAX_LISTING:
                messages.extend(data)

        exit_ = await run(_READ, names, receive)
        failures += reader.failures(messages.decode("utf-8", "replace").splitlines())
    return exit_, failures


def _list_command(patterns: Sequence[str]) -> bytes:
    """Return a command that lists at least everything that matches: types, sizes, modes and paths."""
    # Before the first wildcard all characters are literal, for find too.
    paths = " -o ".join(f"-path {shlex.quote('./' + _superset(pattern))}" for pattern in patterns)
    depth = max(map(pattern_depth, patterns))
    return f"exec find . -mindepth 1 -maxdepth {depth} '(' {paths} ')' -printf '%y %s %m %P\\0'".encode()


def _superset(pattern: str) -> str:
    literal = literal_prefix(pattern)
    return pattern if literal == pattern else literal + "*"


def _collector(listing: bytearray) -> Callable[[Stream, bytes], None]:
    def collect(stream: Stream, data: bytes) -> None:
        if stream is Stream.STDOUT and len(listing) <= _MAX_LISTING:
            listing.extend(data)

    return collect


def _entries(listing: bytes) -> Iterator[tuple[str, int, int, str]]:
    """Yield type, size, mode and path of each entry, sorted by path."""
    entries = []
    for record in listing.split(b"\0")[:-1]:
        kind, size, mode, path = record.split(b" ", 3)
        entries.append(
            (kind.decode(), int(size), int(mode, 8) & 0o777, path.decode("utf-8", "surrogateescape"))
        )
    yield from sorted(entries, key=lambda entry: entry[3])


def _choose(
    patterns: Sequence[str], entries: Iterator[tuple[str, int, int, str]], max_size: int
) -> tuple[dict[str, tuple[int, int]], list[OutputFailure]]:
    """Return size and mode of each file to read, by path, and what cannot be read."""
    chosen: dict[str, tuple[int, int]] = {}
    failures: list[OutputFailure] = []
    unmatched = dict.fromkeys(patterns)
    matchers = [(pattern, pattern_matcher(pattern)) for pattern in patterns]
    for kind, size, mode, path in entries:
        matching = [pattern for pattern, matches in matchers if matches(path)]
        # As in a shell, a wildcard also matches directories, which are not what is meant.
        if not matching or (kind == "d" and path not in matching):
            continue
        for pattern in matching:
            unmatched.pop(pattern, None)
        problem = _problem(kind, path)
        if problem is None and len(chosen) >= MAX_FILES:
            problem = OutputProblem.TOO_MANY_FILES
        if problem is None and size > max_size:
            problem = OutputProblem.OUTPUT_LIMIT
        if problem is None:
            chosen[path] = size, mode
            max_size -= size
        else:
            failures.append(OutputFailure.of(path, problem))
    missing = [OutputFailure.of(pattern, OutputProblem.NOT_FOUND) for pattern in unmatched]
    return chosen, missing + failures


def _problem(kind: str, path: str) -> OutputProblem | None:
    if kind != "f":
        return _KINDS.get(kind, OutputProblem.SPECIAL_FILE)
    try:
        check_path(path)
    except InvalidPathError:
        return OutputProblem.INVALID_NAME
    return None


class _Sender:
    """Sends the files in an archive; anything else in it, which an altered tree may cause, is not sent."""

    def __init__(self, chosen: Mapping[str, tuple[int, int]], send: Callable[[FilePiece], None]) -> None:
        self._missing = dict(chosen)
        self._send = send
        self._reader = ArchiveReader(self)
        self._broken = False
        self._name: str | None = None
        self._size = self._left = self._mode = 0
        self._piece = bytearray()

    def feed(self, data: bytes) -> None:
        """Read a piece of the archive."""
        if not self._broken:
            try:
                self._reader.feed(data)
            except InvalidArchiveError:
                self._broken = True

    def start_member(self, member: Member) -> None:
        """Begin a file, if it is one of those that were chosen, and as it was."""
        name = member.path.decode("utf-8", "replace").removeprefix("./")
        self._name = None
        self._piece.clear()
        if member.kind != b"0" or self._missing.get(name, (None,))[0] != member.size:
            return
        self._name, self._size, self._left = name, member.size, member.size
        self._mode = self._missing[name][1]
        if not member.size:
            self._flush()

    def member_data(self, data: bytes) -> None:
        """Send the pieces that are complete."""
        if self._name is None:
            return
        self._piece += data
        self._left -= len(data)
        while len(self._piece) >= MAX_FILE_PIECE or (self._piece and not self._left):
            self._flush()

    def _flush(self) -> None:
        assert self._name is not None  # noqa: S101 - only called within a file
        data = bytes(self._piece[:MAX_FILE_PIECE])
        del self._piece[: len(data)]
        self._send(FilePiece(self._name, self._size, self._mode, data))
        if not self._left and not self._piece:
            del self._missing[self._name]
            self._name = None

    def failures(self, messages: Sequence[str]) -> list[OutputFailure]:
        """Return the files that were not sent, and those that tar found changed; `messages` are tar's."""
        failures = [OutputFailure.of(name, OutputProblem.UNREADABLE) for name in self._missing]
        for message in messages:
            # Such as "tar: ./NAME: file changed as we read it".
            name, _, text = message.removeprefix("tar: ./").rpartition(": ")
            if text.startswith(("file changed", "File shrank", "File removed")) and name not in self._missing:
                failures.append(OutputFailure.of(name, OutputProblem.CHANGED))
        return failures
