"""The accounts of an image, in which the user of scripts gets another id."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import Self

_FIELDS = 7  # passwd(5): name, password, uid, gid, comment, home, shell


@dataclass(frozen=True)
class ImageAccounts:
    """The lines of a passwd file, and the user, by name or number, whose id is replaced."""

    lines: tuple[str, ...]
    user: str

    @classmethod
    def from_archive(cls, archive: bytes, user: str) -> Self:
        """Read a passwd file from a tar archive. Without a readable one there are no accounts."""
        text = b""
        try:
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                for member in files:
                    if member.isfile() and (file := files.extractfile(member)) is not None:
                        text = file.read()
        except (tarfile.TarError, EOFError):
            pass
        return cls(tuple(text.decode("utf-8", "replace").splitlines()), user)

    @property
    def gid(self) -> int | None:
        """The group of the user; None if it has no line."""
        return next((int(line.split(":")[3]) for line in self.lines if self._is_user(line)), None)

    def with_uid(self, uid: int) -> str:
        """Return the content of a passwd file in which the user has this id."""
        return "".join(f"{self._replaced(line, uid)}\n" for line in self.lines)

    def _replaced(self, line: str, uid: int) -> str:
        if not self._is_user(line):
            return line
        fields = line.split(":")
        return ":".join([*fields[:2], str(uid), *fields[3:]])

    def _is_user(self, line: str) -> bool:
        fields = line.split(":")
        is_account = len(fields) == _FIELDS and fields[3].isascii() and fields[3].isdigit()
        return is_account and self.user != "" and self.user in (fields[0], fields[2])
