"""
User ids for the scripts of local machines, if this process may run programs as other users.

Linux counts the processes of a user (RLIMIT_NPROC) on the whole host, and allows processes of one user to
signal and read each other. So each start of a machine gets an id that nothing else on the host uses.
"""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import re
import struct
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING

from bfaas.system.confinement import User, missing_capabilities

if TYPE_CHECKING:
    from collections.abc import Container

# Ranges that are not assigned to users, containers or services: https://systemd.io/UIDS-GIDS/. The second is
# for use inside containers, which often have only ids below 65536.
UID_RANGES = (range(1_900_000_000, 1_900_065_536), range(60_578, 61_184))

# Bits of CapEff (linux/capability.h) that are needed to change the owner of a home, and to remove it.
_CAPABILITIES = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3}

_SUBORDINATE = re.compile(r"[^:]*:([0-9]{1,10}):([0-9]{1,10})")

_LOCKS = Path("/run/bfaas-uids.lock")


class NoUserError(OSError):
    """All user ids are in use."""


def unavailable_reason() -> str | None:
    """Return why scripts cannot run as users of their own, or None if they can."""
    if os.geteuid() != 0:
        return "only root can run scripts as other users"
    missing = missing_capabilities(_CAPABILITIES)
    if missing:
        return f"cannot change the owner of a home without {', '.join(missing)}"
    reasons = [User(ids[0], ids[0]).unavailable() for ids in UID_RANGES]
    return None if None in reasons else reasons[0]


class ScriptUsers:
    """Users for scripts. Ids in use are locked, so that other processes of bfaas do not choose them."""

    def __init__(self, random: SystemRandom | None = None) -> None:
        ids = next((ids for ids in UID_RANGES if User(ids[0], ids[0]).unavailable() is None), UID_RANGES[0])
        self._ids = ids
        self._assigned = _assigned_ids()
        # Where ids cannot be locked, random starts make collisions between processes rare.
        self._next = (random or SystemRandom()).randrange(len(ids))
        self._used: set[int] = set()
        self._locks: int | None = None

    def acquire(self) -> User:
        """Reserve a user that has no processes. Raises `NoUserError`."""
        busy = _owners_of_processes() | self._used
        for _ in self._ids:
            number = self._ids[self._next]
            # Reuse ids as late as possible: files that a script left outside its home still have its id.
            self._next = (self._next + 1) % len(self._ids)
            if number in busy or any(number in assigned for assigned in self._assigned):
                continue
            if self._lock(number, fcntl.F_WRLCK):
                self._used.add(number)
                return User(number, number)
        raise NoUserError("no user id is free for a script")

    def release(self, user: User) -> None:
        """Release a user whose processes have been killed."""
        if user.uid in self._used:
            self._used.remove(user.uid)
            self._lock(user.uid, fcntl.F_UNLCK)

    def close(self) -> None:
        """Release all users."""
        self._used.clear()
        if self._locks is not None:
            os.close(self._locks)
            self._locks = None

    def _lock(self, number: int, kind: int) -> bool:
        """
        Lock or unlock an id, which is a byte of the lock file, by F_OFD_SETLK of fcntl(2).

        Return False if another process has the lock; True also if locking is impossible.
        """
        try:
            if self._locks is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._locks = os.open(_LOCKS, flags, 0o600)
        except OSError:
            return True
        # struct flock: l_type, l_whence, l_start, l_len, l_pid
        request = struct.pack("hhqqi0q", kind, os.SEEK_SET, number, 1, 0)
        try:
            fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, request)
        except OSError:
            return False
        return True


def _assigned_ids() -> list[Container[int]]:
    """Return the ids of users and groups, and the ranges that users may assign to containers (subuid(5))."""
    assigned: list[Container[int]] = [
        {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    ]
    for path in ("/etc/subuid", "/etc/subgid"):
        with suppress(OSError):
            for line in Path(path).read_text("utf-8", "replace").splitlines():
                match = _SUBORDINATE.fullmatch(line)
                if match:
                    assigned.append(range(int(match[1]), int(match[1]) + int(match[2])))
    return assigned


def _owners_of_processes() -> set[int]:
    owners = set()
    with suppress(FileNotFoundError), os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                with suppress(OSError):
                    owners.add(entry.stat().st_uid)
    return owners
