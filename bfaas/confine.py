"""
What a script is held by: the user that it runs as, its limits, and being the first that dies of want.

All of it is done by the words that its command begins with. Twisted starts a process fast only where it has
nothing to change in it, and each of these programs, of util-linux, changes one thing and becomes the next.
"""

from __future__ import annotations

import os
import pwd
import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBER = re.compile(r"[0-9]{1,9}")

_LIMITS = {
    # A dump would hold what the script had in memory, and fill the disk.
    "core": (resource.RLIMIT_CORE, 0),
    # Linux's usual number; programs that close all they might have open take long with more.
    "nofile": (resource.RLIMIT_NOFILE, 1024),
    # Far more than a run can deliver, and less than a Fly Machine's disk of 8 GB: one runaway file ends by
    # SIGXFSZ, not by filling it.
    "fsize": (resource.RLIMIT_FSIZE, 1 << 30),
}
# About half of what Linux itself allows all users on a machine of 256 MB, so that root always finds a pid.
_PROCESSES = (resource.RLIMIT_NPROC, 512)

_KILL_FIRST = "1000"
"""The highest oom_score_adj: out of memory, Linux kills the script before the worker, however small it is."""


class User(NamedTuple):
    """A user that scripts can run as, and its group; it has no others."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Find a user by name, or by number, which need not have a name; raise `ValueError` where it cannot be.

        Only root can become another.
        """
        try:
            entry = pwd.getpwuid(int(text)) if _NUMBER.fullmatch(text) else pwd.getpwnam(text)
        except KeyError:
            if not _NUMBER.fullmatch(text):
                raise ValueError(f"there is no user {text!a}") from None
            user = cls(int(text), int(text))
        else:
            user = cls(entry.pw_uid, entry.pw_gid)
        if os.geteuid() not in (0, user.uid):
            raise ValueError("only root can run scripts as another user")
        return user


def in_bubblewrap(sandbox: Sequence[str]) -> bool:
    """Tell whether a sandbox's command prefix is bubblewrap's."""
    return any(Path(word).name == "bwrap" for word in sandbox)


def command_prefix(user: User | None, sandbox: Sequence[str]) -> list[str]:
    """
    Make the first words of a script's command: a session of its own, `user` if any, the sandbox, limits.

    Processes are counted by user, and (since Linux 5.14) by user namespace: they have a limit only where the
    script does not share the count with whoever runs the worker. No limit is raised above our own.
    """
    words = ["setsid", "choom", "-n", _KILL_FIRST, "--"]
    limits = dict(_LIMITS)
    if user is not None:
        words += ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
        words += ["--no-new-privs", "--"]
    if user is not None or in_bubblewrap(sandbox):
        limits["nproc"] = _PROCESSES
    # Inside the sandbox: what its namespaces count begins there.
    return [
        *words,
        *sandbox,
        "prlimit",
        *(f"--{name}={_at_most(*pair)}" for name, pair in limits.items()),
        "--",
    ]


def _at_most(kind: int, limit: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)
