"""
The directory of the sockets and files that the containers of one pool mount.

Only the coordinator's user can enter it. A lock shows that no other coordinator of the same name is alive:
they would remove each other's containers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bfaas.machines.local.host import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_SOCKET_PATH = 107  # bytes; sun_path of unix(7) without its end
_SOCKET = Path("run", "worker.sock")
_TOKEN_DIGITS = 12


def default_parent(environ: Mapping[str, str]) -> str:
    """
    Return the directory that contains those of pools: systemd's RuntimeDirectory, or one of this user.

    It must have the same path for the engine. So it is not in /tmp if there is another, because that is often
    private to a service.
    """
    if directory := environ.get("RUNTIME_DIRECTORY", ""):
        return directory.partition(":")[0]
    if os.geteuid() == 0:
        return "/run/bfaas"
    if directory := environ.get("XDG_RUNTIME_DIR", ""):
        return f"{directory}/bfaas"
    return f"{tempfile.gettempdir()}/bfaas-{os.geteuid()}"


class SocketDirectory:
    """A pool's directory, which this process has locked. Each machine has a directory in it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def create(cls, parent: str, pool: str) -> Self:
        """Create or take over the directory, and empty it. Raises `HostError`."""
        path = Path(parent, pool)
        longest = len(os.fsencode(path / ("0" * _TOKEN_DIGITS) / _SOCKET))
        if longest > _MAX_SOCKET_PATH:
            raise HostError(f"WORKER_SOCKETS: {path} is too long by {longest - _MAX_SOCKET_PATH} characters")
        try:
            Path(parent).mkdir(mode=0o711, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"WORKER_SOCKETS: cannot create {path}: {error.strerror}") from None
        problem = None
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:  # noqa: PLR2004
            problem = f"WORKER_SOCKETS: {path} belongs to another user, or others may enter it"
        else:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"another coordinator named {pool} is running on this host (FLY_MACHINE_ID)"
        if problem is not None:
            os.close(descriptor)
            raise HostError(problem)
        directory = cls(path, descriptor)
        for entry in path.iterdir():
            shutil.rmtree(entry, ignore_errors=True)
        return directory

    def new_socket(self) -> str:
        """Return a path for the socket of a new machine. Nothing is created yet."""
        return str(self.path / os.urandom(_TOKEN_DIGITS // 2).hex() / _SOCKET)

    def prepare(self, socket: str, accounts: str) -> tuple[Path, Path]:
        """
        Create what a container mounts, anew: the directory of its socket, and its passwd file.

        Root in the container may write into the directory as a member of this process's group. A script,
        which has another user and no groups, cannot enter it. Raises `OSError`.
        """
        self.discard(socket)
        run = Path(socket).parent
        run.parent.mkdir(mode=0o700)
        run.mkdir()
        run.chmod(0o770)
        passwd = run.parent / "passwd"
        passwd.write_text(accounts, "utf-8")
        passwd.chmod(0o644)
        return run, passwd

    def discard(self, socket: str) -> None:
        """Remove what `prepare` has created."""
        shutil.rmtree(Path(socket).parent.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove the directory, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)
