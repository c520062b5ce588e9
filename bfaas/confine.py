"""
What a script is held by: the user that it runs as, its limits, and being the first that dies of want.

All of it is done by the words that its command begins with. Twisted starts a process fast only where it has
nothing to change in it, and each of these programs changes one thing and becomes the next. The last one is
a bash that sets limits, reports that everything before it has worked, and becomes the script's.
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

# The option of bash's `ulimit`, the limit, its value, and the unit in which bash counts it.
_LIMITS: tuple[tuple[str, int, int, int], ...] = (
    # A dump would hold what the script had in memory, and fill the disk.
    ("c", resource.RLIMIT_CORE, 0, 1024),
    # Linux's usual number; programs that close all they might have open take long with more.
    ("n", resource.RLIMIT_NOFILE, 1024, 1),
    # Far more than a run can deliver, and less than a Fly Machine's disk of 8 GB: one runaway file ends by
    # SIGXFSZ, not by filling it.
    ("f", resource.RLIMIT_FSIZE, 1 << 30, 1024),
)
# About half of what Linux itself allows all users on a machine of 256 MB, so that root always finds a pid.
_PROCESSES = ("u", resource.RLIMIT_NPROC, 512, 1)

BEGUN = 4
"""The descriptor on which a line is written once all that confines a command has worked."""

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


def name_of(user: User | None) -> str:
    """Return a user's name, or its number where it has no name; None is the user that we run as."""
    uid = os.geteuid() if user is None else user.uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def command_prefix(user: User | None, sandbox: Sequence[str]) -> list[str]:
    """
    Make the first words of a script's command: a session of its own, `user` if any, the sandbox, limits.

    Before the command proper begins, a line is written to the descriptor `BEGUN`, if it is open, and the
    descriptor is closed. A run without that line has not begun, whatever its exit code.

    Processes are counted by user, and (since Linux 5.14) by user namespace: they have a limit only where the
    script does not share the count with the worker's user. No limit is raised above our own.
    """
    words = ["setsid", "choom", "-n", _KILL_FIRST, "--"]
    if user is not None:
        words += ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
        words += ["--no-new-privs", "--"]
    words += sandbox
    limits = _LIMITS
    if in_bubblewrap(sandbox):
        # Bubblewrap forks: without a session inside of it, its own processes are in the script's group.
        words.append("setsid")
    if user is not None or in_bubblewrap(sandbox):
        limits = (*limits, _PROCESSES)
    # Inside the sandbox: what its namespaces count begins there.
    options = " ".join(f"-{name} {_at_most(kind, limit) // unit}" for name, kind, limit, unit in limits)
    return [*words, "/bin/bash", "-c", _LAST_STEP.format(options=options), "bfaas"]


# Without a process of its own: the shell becomes the command. A twistd in the background has a umask of 077.
_LAST_STEP = (
    f'umask 022 && ulimit {{options}} || exit; {{{{ echo >&{BEGUN}; }}}} 2>/dev/null; exec {BEGUN}>&- "$@"'
)


def _at_most(kind: int, limit: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)
