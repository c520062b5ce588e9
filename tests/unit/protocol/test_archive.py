"""Tar archives as GNU tar, bsdtar, git and Python write them, and hostile ones."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.protocol.archive import ArchiveReader, InvalidArchiveError, Member

LONG = "long" * 30 + "/" + "name" * 40
DEEP = "/".join(["directory"] * 12) + "/file"
CONTENT = {
    "a.txt": b"hello\n",
    "empty": b"",
    "b/big": os.urandom(70_000),
    "caf\u00e9": b"x" * 512,
    LONG: b"1",
    DEEP: b"2",
}


class Collector:
    def __init__(self) -> None:
        self.members: list[tuple[Member, bytearray]] = []

    def start_member(self, member: Member) -> None:
        self.members.append((member, bytearray()))

    def member_data(self, data: bytes) -> None:
        self.members[-1][1].extend(data)


def read(archive: bytes, size: int = 1 << 20) -> list[tuple[Member, bytes]]:
    collector = Collector()
    reader = ArchiveReader(collector)
    for start in range(0, len(archive), size):
        reader.feed(archive[start : start + size])
    reader.finish()
    return [(member, bytes(data)) for member, data in collector.members]


def header(name: bytes = b"a", size: bytes = b"0", kind: bytes = b"0", mode: bytes = b"644") -> bytes:
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:108] = mode.rjust(7, b"0") + b"\0"
    block[124:136] = size.rjust(11, b"0") + b"\0" if len(size) < 12 else size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    data = b"".join(records)
    return header(size=b"%o" % len(data), kind=kind) + padded(data)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length))
    if len(str(length)) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %b=%b\n" % (length, key, value)


class WritersTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.top = Path(self.mktemp())
        for path, data in CONTENT.items():
            (self.top / path).parent.mkdir(parents=True, exist_ok=True)
            (self.top / path).write_bytes(data)
        (self.top / "a.txt").chmod(0o755)

    def check(self, archive: bytes, expected: dict[str, bytes] = CONTENT) -> None:
        for size in (1 << 20, 4096, 77):
            members = read(archive, size)
            files = {
                member.path.decode().removeprefix("./"): data
                for member, data in members
                if member.kind == b"0"
            }
            self.assertEqual(expected, files)
            modes = {member.path.decode().removeprefix("./"): member.mode for member, _ in members}
            self.assertEqual((0o755, 0o644), (modes["a.txt"], modes["empty"]))
            self.assertEqual(set(), {member.kind for member, _ in members} - {b"0", b"5"})

    def run_program(self, *command: str) -> bytes:
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, cwd=self.top, capture_output=True, check=True, env=environment).stdout

    def test_gnu_tar(self) -> None:
        for form in ("gnu", "oldgnu", "pax"):
            self.check(self.run_program("tar", "-c", f"--format={form}", "."))
        short = {path: data for path, data in CONTENT.items() if path not in (LONG, DEEP)}
        for form in ("ustar", "v7"):
            self.check(self.run_program("tar", "-c", f"--format={form}", *short), short)

    def test_bsdtar(self) -> None:
        if shutil.which("bsdtar") is None:
            self.skipTest("bsdtar is not installed")
        for form in ("pax", "gnutar"):
            self.check(self.run_program("bsdtar", "-c", "-f", "-", f"--format={form}", "."))

    def test_git_archive(self) -> None:
        if shutil.which("git") is None:
            self.skipTest("git is not installed")
        self.run_program("git", "init", "-q")
        self.run_program("git", "add", ".")
        identity = ["-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false"]
        self.run_program("git", *identity, "commit", "-qm", "x")
        archive = self.run_program("git", "-c", "tar.umask=022", "archive", "HEAD")
        self.assertIn(b"comment=", archive)
        self.check(archive)

    def test_python(self) -> None:
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
                tar.add(self.top, arcname=".")
            self.check(buffer.getvalue())

    def test_special_entries_are_reported_by_their_kind_without_data(self) -> None:
        (self.top / "link").symlink_to("/etc/passwd")
        os.link(self.top / "a.txt", self.top / "hard")
        os.mkfifo(self.top / "fifo")
        with (self.top / "sparse").open("wb") as file:
            file.truncate(100 << 20)
        for form in ("gnu", "pax"):
            names = ["a.txt", "link", "hard", "fifo", "sparse", "b/big"]
            members = read(self.run_program("tar", "-cS", f"--format={form}", *names))
            kinds = [member.kind for member, _ in members]
            self.assertEqual([b"0", b"2", b"1", b"6", b"S", b"0"], kinds)
            self.assertEqual(CONTENT["b/big"], members[-1][1])


class HostileTests(SynchronousTestCase):
    def test_invalid_archives_are_rejected(self) -> None:
        good = header()
        for archive, message in [
            (b"x" * 512, "not a tar archive"),
            (b"\x1f\x8b" + bytes(510), "not a tar archive"),
            (b"PK\x03\x04" + bytes(600), "not a tar archive"),
            (good[:400], "cut off"),
            (header(size=b"1000") + b"x" * 511, "cut off"),
            (header(size=b"1001") + b"x" * 513, "cut off"),
            (good[:100] + b"000064x\0" + good[108:], "not a tar archive"),
            (header(size=b"-1"), "not a tar archive"),
            (header(size=b"9"), "not a tar archive"),
            (header(size=b"\xff" * 12), "not a tar archive"),
            (header(size=b"777777777", kind=b"x"), "headers are too large"),
            (header(size=b"777777777", kind=b"L"), "headers are too large"),
            (header(size=b"\x80" + b"\xff" * 11, kind=b"x"), "headers are too large"),
            (header(kind=b"x") * 17, "headers are too large"),
            (header(kind=b"g") * 17, "headers are too large"),
            (pax(b"5 a=\n"), "cut off"),
            (pax(b"0 a=\n"), "invalid pax"),
            (pax(b"-5 a=b\n"), "invalid pax"),
            (pax(b"99 a=b\n"), "invalid pax"),
            (pax(b"7 a=bb\n"), "cut off"),
            (pax(b"6 abc\n"), "invalid pax"),
            (pax(b"1" * 8000), "invalid pax"),
            (pax(b"5 a=b"), "invalid pax"),
            (pax(record(b"size", b"-1")) + good, "invalid pax"),
            (pax(record(b"size", b"1" * 19)) + good, "invalid pax"),
            (pax(record(b"size", b"\xc2\xb2")) + good, "invalid pax"),
            (pax(record(b"path", b"x"), kind=b"g") + good, "global header"),
            (pax(record(b"size", b"1"), kind=b"g") + good, "global header"),
        ]:
            error = self.assertRaises(InvalidArchiveError, read, archive)
            self.assertIn(message, str(error))
            self.assertRegex(str(error), r"\A[ -~]{1,60}\Z")

    def test_what_follows_the_end_is_ignored(self) -> None:
        self.assertEqual(1, len(read(header() + bytes(1024) + b"anything")))
        self.assertEqual([], read(b""))
        self.assertEqual([], read(bytes(10240)))

    def test_names_and_sizes_of_pax_headers_win(self) -> None:
        archive = (
            pax(record(b"path", b"other"), record(b"size", b"3")) + header() + padded(b"abc") + header(b"b")
        )
        self.assertEqual(
            [(b"other", b"abc"), (b"b", b"")], [(member.path, data) for member, data in read(archive)]
        )

    def test_the_size_of_other_kinds_is_not_that_of_data(self) -> None:
        for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            members = read(header(size=b"777777777", kind=kind) + header(b"b"))
            self.assertEqual([b"a", b"b"], [member.path for member, _ in members])

    def test_huge_sizes_use_no_memory(self) -> None:
        collector = Collector()
        reader = ArchiveReader(collector)
        reader.feed(header(size=b"\x80" + b"\x7f" * 11) + b"x" * 100)
        self.assertEqual(b"x" * 100, bytes(collector.members[0][1]))
        self.assertRaises(InvalidArchiveError, reader.finish)

    @given(st.binary(max_size=200), st.integers(0, 511), st.integers(1, 700))
    def test_altered_archives_are_read_or_rejected(self, noise: bytes, at: int, size: int) -> None:
        archive = bytearray(pax(record(b"path", b"other")) + header(size=b"3") + padded(b"abc"))
        archive[at : at + len(noise)] = noise
        try:
            whole: object = read(bytes(archive))
        except InvalidArchiveError as error:
            whole = str(error)
        try:
            pieces: object = read(bytes(archive), size)
        except InvalidArchiveError as error:
            pieces = str(error)
        self.assertEqual(whole, pieces)

    @given(st.binary())
    def test_noise_is_rejected(self, noise: bytes) -> None:
        with contextlib.suppress(InvalidArchiveError):
            read(noise)
