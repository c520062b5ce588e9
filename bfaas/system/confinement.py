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
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The PATH that scripts get. Programs that confine them are searched along it, then along our own PATH."""

BASH = "/bin/bash"

SANDBOX_HOME = "/home/worker"
"""The home of a script inside a sandbox."""

SANDBOX_ACCOUNT = "worker"
"""The name of a script's user inside a sandbox, where its id has no name on the host."""

_READ_ONLY = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
_PRIVATE = ("/tmp", "/root", "/home", "/run", "/var/tmp")  # noqa: S108 - empty and private in each sandbox

_UTIL_LINUX = ("setsid", "choom", "setpriv")

_NUMBER = re.compile(r"[0-9]{1,10}")
_MAX_ID = (1 << 32) - 2
"""The last user id of Linux; the one after it is "no change" to setresuid(2)."""

# Bits of CapEff (linux/capability.h) that it takes to run a process as another user, and to kill it.
_CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}

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
        except (KeyError, OverflowError):  # the latter for numbers that no user can have
            if not _NUMBER.fullmatch(text) or int(text) > _MAX_ID:
                raise ValueError(f"there is no user {text!a}") from None
            user = cls(int(text), int(text))
        else:
            user = cls(entry.pw_uid, entry.pw_gid)
        if os.geteuid() not in (0, user.uid):
            raise ValueError("only root can run scripts as another user")
        if os.geteuid() != user.uid and (reason := user.unavailable()):
            raise ValueError(reason)
        return user

    def unavailable(self) -> str | None:
        """Return why this process cannot run programs as the user, or None if it can."""
        lacking = missing_capabilities(_CAPABILITIES)
        if lacking:
            return f"cannot change the user without {', '.join(lacking)}"
        for kind, number in (("uid", self.uid), ("gid", self.gid)):
            if not _is_mapped(kind, number):
                return f"{kind} {number} does not exist in this user namespace"
        if _read("/proc/self/setgroups").strip() == "deny":
            return "cannot drop groups in this user namespace"
        return None


def missing_capabilities(needed: dict[str, int]) -> list[str]:
    """Return the names of capabilities, by their bits, that are not effective in this process."""
    line = re.search(r"^CapEff:\s*([0-9a-f]+)", _read("/proc/self/status"), re.MULTILINE)
    if line is None:  # not Linux
        return []
    return [name for name, bit in needed.items() if not int(line[1], 16) >> bit & 1]


def _is_mapped(kind: str, number: int) -> bool:
    # Lines of "first inside, first outside, count" (user_namespaces(7)).
    lines = [[int(word) for word in line.split()] for line in _read(f"/proc/self/{kind}_map").splitlines()]
    return not lines or any(first <= number < first + count for first, _, count in lines)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


class MissingProgramError(Exception):
    """A program that confining a script takes is not installed."""


def find_program(name: str) -> str:
    """
    Return the absolute path of a program that confines scripts; look for it once, and then use it always.

    Standard directories come first for util-linux: the script's user can enter them, and they exist in a
    sandbox. Others, such as a newer bubblewrap, are searched along our own PATH first.
    Raises `MissingProgramError`.
    """
    return _find_program(name, os.environ.get("PATH", os.defpath))


@cache
def _find_program(name: str, path: str) -> str:
    order = (SEARCH_PATH, path) if name in _UTIL_LINUX else (path, SEARCH_PATH)
    found = shutil.which(name, path=os.pathsep.join(order))
    if found is None:
        package = " (it is part of util-linux)" if name in _UTIL_LINUX else ""
        raise MissingProgramError(f"{name} is not installed{package}")
    return str(Path(found).absolute())


def check_programs() -> None:
    """Find everything that a script's command begins with. Raises `MissingProgramError`."""
    for name in _UTIL_LINUX:
        find_program(name)
    if not os.access(BASH, os.X_OK):
        raise MissingProgramError(f"{BASH} is not installed")


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
    Raises `MissingProgramError`.
    """
    words = [find_program("setsid"), find_program("choom"), "-n", _KILL_FIRST, "--"]
    if user is not None:
        words += [find_program("setpriv"), f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
        words += ["--no-new-privs", "--"]
    words += sandbox
    limits = _LIMITS
    if in_bubblewrap(sandbox):
        # Bubblewrap forks: without a session inside of it, its own processes are in the script's group.
        words.append(find_program("setsid"))
    if user is not None or in_bubblewrap(sandbox):
        limits = (*limits, _PROCESSES)
    # Inside the sandbox: what its namespaces count begins there.
    options = " ".join(f"-{name} {_at_most(kind, limit) // unit}" for name, kind, limit, unit in limits)
    return [*words, BASH, "-c", _LAST_STEP.format(options=options), "bfaas"]


# Without a process of its own: the shell becomes the command. A twistd in the background has a umask of 077.
_LAST_STEP = (
    f'umask 022 && ulimit {{options}} || exit; {{{{ echo >&{BEGUN}; }}}} 2>/dev/null; exec {BEGUN}>&- "$@"'
)


def _at_most(kind: int, limit: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def sandbox_prefix(home: str, accounts: str | None = None) -> tuple[str, ...]:
    """
    Return the words that run a command in bubblewrap (https://github.com/containers/bubblewrap).

    In the sandbox, system directories are read-only and `home` is writable; the processes, the network and
    the other files of the host do not exist. `accounts` is a directory with a passwd and a group file that
    replace those in /etc (see `write_accounts`). Raises `MissingProgramError`.
    """
    mounts: list[str] = []
    for path in map(Path, _READ_ONLY):
        if path.is_symlink():
            mounts += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            mounts += ["--ro-bind", str(path), str(path)]
    for private in _PRIVATE:
        mounts += ["--tmpfs", private]
    names: list[str] = []
    if accounts is not None:
        for file in ("passwd", "group"):
            mounts += ["--ro-bind", f"{accounts}/{file}", f"/etc/{file}"]
        names = ["--setenv", "USER", SANDBOX_ACCOUNT, "--setenv", "LOGNAME", SANDBOX_ACCOUNT]
    return (
        find_program("bwrap"),
        "--die-with-parent",
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts"),
        *("--cap-drop", "ALL"),
        *mounts,
        *("--proc", "/proc"),
        *("--ro-bind", "/proc/sys", "/proc/sys"),
        *("--dev", "/dev"),
        *("--bind", home, SANDBOX_HOME),
        *("--remount-ro", "/"),
        *("--setenv", "HOME", SANDBOX_HOME),
        *names,
        *("--chdir", SANDBOX_HOME),
        "--",
    )


def write_accounts(directory: Path, user: User) -> None:
    """
    Write a passwd and a group file in which the user has a name, for `sandbox_prefix`.

    The other entries are those of /etc. Raises `OSError`.
    """
    for name, entry in (
        ("passwd", f"{SANDBOX_ACCOUNT}:x:{user.uid}:{user.gid}::{SANDBOX_HOME}:{BASH}"),
        ("group", f"{SANDBOX_ACCOUNT}:x:{user.gid}:"),
    ):
        try:
            host_entries = Path("/etc", name).read_bytes()
        except OSError:
            host_entries = b""
        file = directory / name
        file.write_bytes(entry.encode() + b"\n" + host_entries)
        file.chmod(0o644)
