"""
Directories that contain the homes of local machines, each locked by the process that owns it.

An exclusive flock(2) on a directory shows that its owner is alive, independently of pids. It also keeps
systemd-tmpfiles from removing old files in it (tmpfiles.d(5)). The kernel releases the lock when the owner
dies, even by SIGKILL; the next process of the same user that runs local machines then removes the
directory.
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
    A directory that this process owns until it ends.

    Its mode is 0711, because the script's user, who starts bubblewrap, has to reach its home inside.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def create(cls, parent: str) -> StateDirectory:
        """Create a directory in `parent`. Raises `OSError`."""
        for _ in range(_ATTEMPTS):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            path.chmod(0o711)
            # Before it is locked, another process may consider it abandoned and remove it.
            if (state := _lock(path)) is not None and state.intact:
                return state
        raise FileNotFoundError(f"{parent}: new directories are removed at once")

    def restore(self) -> bool:
        """Create the directory again, empty, if it was removed. Return whether it exists."""
        if self.intact:
            return True
        try:
            self.path.mkdir()
            self.path.chmod(0o711)
        except OSError:  # another process created the path, or its parent was removed
            return False
        created = _lock(self.path)
        if created is None:
            return False
        os.close(self.descriptor)
        self.descriptor = created.descriptor
        return self.intact

    @property
    def intact(self) -> bool:
        """Whether the path still is this directory, not removed by a cleaner of temporary files."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the directory with its contents, and release the lock. Blocks."""
        try:
            if self.intact:
                wipe(self.path)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Release the lock, and leave the directory to the next owner."""
        os.close(self.descriptor)


def abandoned(parents: Iterable[str]) -> list[StateDirectory]:
    """Lock and return the directories of this user whose owners have died."""
    paths: list[Path] = []
    for parent in parents:
        with suppress(OSError):
            paths += [path for path in Path(parent).iterdir() if _NAME.fullmatch(path.name)]
    return [state for path in paths if (state := _lock(path)) is not None]


def _lock(path: Path) -> StateDirectory | None:
    """Lock a directory of this user. Return None for anything else, or if another process holds the lock."""
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
    """
    Remove a directory, including subdirectories without permissions; do not follow links.

    Blocks. Raises `OSError`.
    """
    try:
        if os.geteuid() != 0:
            # Root needs no permissions, and must not change any: a script's process could replace a path by a
            # link just before root changes its mode.
            _add_permissions(directory)
        shutil.rmtree(directory)
    except (RecursionError, OSError):
        if not os.path.lexists(directory):
            return
        # In a very deep tree, Python exceeds its recursion limit or the maximum length of a path; chmod and
        # rm do not. They are repeated, because as children of this process they may be killed as orphans of
        # a worker.
        for _ in range(_ATTEMPTS):
            if os.geteuid() != 0:
                subprocess.run(["chmod", "-R", "u+rwx", "--", directory], check=False, capture_output=True)
            subprocess.run(["rm", "-rf", "--", directory], check=False, capture_output=True)
            if not os.path.lexists(directory):
                return
        raise OSError(f"{directory} cannot be removed") from None


def _add_permissions(directory: Path) -> None:
    directory.chmod(0o700)
    for parent, names, _ in os.walk(directory):
        for subdirectory in (Path(parent, name) for name in names):
            if not subdirectory.is_symlink():
                subdirectory.chmod(0o700)
