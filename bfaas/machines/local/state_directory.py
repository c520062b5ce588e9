"""
The directories of local machines, each locked by the process that owns it.

An exclusive flock(2) on a directory means that its owner lives, whatever its pid. It also keeps
systemd-tmpfiles from ageing the directory and everything below it (tmpfiles.d(5)). The kernel releases the
lock when its owner dies, even by SIGKILL; the next owner of the same user then removes the directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PREFIX = "bfaas-machines-"
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # as tempfile.mkdtemp makes them
_ATTEMPTS = 10


class StateDirectory:
    """
    A directory that this process owns for as long as it lives.

    Its mode is 0711: bubblewrap is started by the script's user, which has to reach its home below it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def create(cls, parent: str) -> StateDirectory:
        """Make a new one in `parent`. Raises `OSError`."""
        for _ in range(_ATTEMPTS):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            path.chmod(0o711)
            # Until it is locked, another process may take it for abandoned.
            if (state := _lock(path)) is not None and state.intact:
                return state
        raise FileExistsError(f"{parent}: new directories disappear")

    def restore(self) -> bool:
        """Make it again, empty, under the same name if it was removed; return whether it is there."""
        if self.intact:
            return True
        try:
            self.path.mkdir()
            self.path.chmod(0o711)
        except OSError:  # somebody else has it now, or its parent is gone
            return False
        again = _lock(self.path)
        if again is None:
            return False
        os.close(self.descriptor)
        self.descriptor = again.descriptor
        return self.intact

    @property
    def intact(self) -> bool:
        """Whether the path still leads to it: a cleaner of temporary files may have removed it."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def remove(self) -> None:
        """Remove it with everything in it, and give up the lock. Blocks."""
        try:
            if self.intact:
                wipe(self.path)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give up the lock, and leave the directory to the next owner."""
        os.close(self.descriptor)


def abandoned(parents: Iterable[str]) -> list[StateDirectory]:
    """Take over the directories of this user whose owners are dead."""
    paths: list[Path] = []
    for parent in parents:
        with suppress(OSError):
            paths += [path for path in Path(parent).iterdir() if _NAME.fullmatch(path.name)]
    return [state for path in paths if (state := _lock(path)) is not None]


def _lock(path: Path) -> StateDirectory | None:
    """Lock a directory of this user; None for anything else, and where another process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o711:  # noqa: PLR2004
            raise PermissionError
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return StateDirectory(path, descriptor)


def wipe(directory: Path) -> None:
    """Remove a directory, also if a script removed its own permissions; do not follow links. Blocks."""
    try:
        if os.geteuid() != 0:
            # Modes do not stop root, which must not change them either: what a path of a script leads to
            # can change while root looks at it.
            _grant(directory)
        shutil.rmtree(directory)
    except (RecursionError, OSError):
        if not os.path.lexists(directory):
            return
        # Python goes down by recursion, and by paths that can be too long; these do not, however deep a
        # script has dug. Again: as children of ours they can be taken for what another worker has left.
        for _ in range(_ATTEMPTS):
            if os.geteuid() != 0:
                subprocess.run(["chmod", "-R", "u+rwx", "--", directory], check=False, capture_output=True)
            subprocess.run(["rm", "-rf", "--", directory], check=False, capture_output=True)
            if not os.path.lexists(directory):
                return
        raise OSError(f"{directory} cannot be removed") from None


def _grant(directory: Path) -> None:
    directory.chmod(0o700)
    for place, names, _ in os.walk(directory):
        for below in (Path(place, name) for name in names):
            if not below.is_symlink():
                below.chmod(0o700)
