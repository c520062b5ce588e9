"""
What confines a script: its user, its limits, a sandbox, and its place as the first victim of low memory.

Nearly all of it is done by a command prefix: a chain of programs (setsid, setpriv, bwrap), each of which
changes one thing and executes the next. Twisted could change the user itself, but then it cannot use
posix_spawn(3), and starting a process is slow. The last program of the chain is a bash that sets limits,
reports that everything before it has worked, and executes the script's command. A program takes about a
millisecond to load, so there is none for what can be inherited (`first_victim_of_low_memory`).
"""

from __future__ import annotations

import os
import pwd
import re
import resource
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from bfaas.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BASH = "/bin/bash"

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of scripts."""

STARTED_FD = 4
"""Descriptor to which the command prefix writes a line once all of its programs have worked."""

SANDBOX_HOME = "/home/worker"
"""The home of a script inside a sandbox."""

SANDBOX_ACCOUNT = "worker"
"""The name of a script's user inside a sandbox, where its id has no name on the host."""

_OOM_SCORE_FILE = "/proc/self/oom_score_adj"
_OOM_SCORE_ADJ = b"1000"
"""The highest value: when memory runs out, Linux kills the script before the worker, however small it is."""


@dataclass(frozen=True)
class Confinement:
    """
    How the scripts of a worker are confined.

    They run as `user`, or as the worker's own user if that is None. `sandbox` is a command prefix, such as
    bubblewrap's with its options, and may be empty.
    """

    user: User | None = None
    sandbox: tuple[str, ...] = ()

    @classmethod
    def resolve(cls, run_as: str, sandbox: Sequence[str]) -> Self:
        """
        Find the user and the program that the settings RUN_AS and SANDBOX name; both may be empty.

        Raises `SettingsError`.
        """
        problems: list[str] = []
        user = None
        program = list(sandbox[:1])
        try:
            # An absolute path: what is executed must not depend on the PATH of the script.
            program = [find_program(word) for word in program]
        except MissingProgramError as error:
            problems.append(f"SANDBOX: {error}")
        try:
            user = User.parse(run_as) if run_as else None
        except ValueError as error:
            problems.append(f"RUN_AS: {error}")
        if problems:
            raise SettingsError(tuple(problems))
        # A worker that is not root is that user already, and could not drop its groups.
        if user is not None and user.uid == os.geteuid() != 0:
            user = None
        return cls(user, (*program, *sandbox[1:]))

    @property
    def user_name(self) -> str:
        """The name of the user that scripts run as, or its number if it has no name."""
        uid = os.geteuid() if self.user is None else self.user.uid
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return str(uid)

    @property
    def uses_bubblewrap(self) -> bool:
        """Whether the sandbox is bubblewrap."""
        return any(Path(word).name == "bwrap" for word in self.sandbox)

    def command_prefix(self) -> list[str]:
        """
        Return the words to put before a command, so that it runs confined in a session of its own.

        Immediately before the command is executed, a line is written to `STARTED_FD`, if that is open, and
        the descriptor is closed. Without that line the command was never executed, whatever the exit status.

        Linux counts processes by user, and since 5.14 also by user namespace. Their number is limited only if
        the script does not share that count with the worker. No limit is raised above that of this process.
        Raises `MissingProgramError`.
        """
        # Bubblewrap's own process, which stays outside, then remains in the session of this one.
        creates_session = self.uses_bubblewrap and "--new-session" in self.sandbox
        words = [] if creates_session else [find_program("setsid")]
        if not os.access(_OOM_SCORE_FILE, os.W_OK):  # as for a worker that is not root, and not dumpable
            words += [find_program("choom"), "-n", _OOM_SCORE_ADJ.decode(), "--"]
        if self.user is not None:
            words += [find_program("setpriv"), f"--reuid={self.user.uid}", f"--regid={self.user.gid}"]
            words += ["--clear-groups", "--no-new-privs", "--"]
        words += self.sandbox
        limits = [*_LIMITS]
        if self.uses_bubblewrap and not creates_session:
            # Bubblewrap forks: without another session, the script's process group would include bwrap.
            words.append(find_program("setsid"))
        if self.user is not None or self.uses_bubblewrap:
            limits.append(_PROCESS_LIMIT)
        # Inside the sandbox, because the counts of its namespaces start there.
        return [*words, BASH, "-c", _last_step(limits), "bfaas"]


_USER_NUMBER = re.compile(r"[0-9]{1,10}")

_MAX_ID = (1 << 32) - 2
"""The highest user id of Linux; the next number means "no change" to setresuid(2)."""

_CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
"""Bits of CapEff (linux/capability.h) that are needed to run a process as another user and to kill it."""


class User(NamedTuple):
    """A user that scripts can run as, with its only group."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Find a user by name or number. A number does not need to have a name, and is then its group, too.

        Raises `ValueError` if there is no such user, or if this process cannot run programs as that user.
        """
        try:
            entry = pwd.getpwuid(int(text)) if _USER_NUMBER.fullmatch(text) else pwd.getpwnam(text)
        except (KeyError, OverflowError):  # OverflowError: larger than any user id
            if not _USER_NUMBER.fullmatch(text) or int(text) > _MAX_ID:
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
        missing = missing_capabilities(_CAPABILITIES)
        if missing:
            return f"cannot change the user without {', '.join(missing)}"
        for kind, number in (("uid", self.uid), ("gid", self.gid)):
            if not _is_mapped(kind, number):
                return f"{kind} {number} does not exist in this user namespace"
        if _read("/proc/self/setgroups").strip() == "deny":
            return "cannot drop groups in this user namespace"
        return None


def missing_capabilities(required: dict[str, int]) -> list[str]:
    """Return those names of capabilities whose bits are not set in this process's effective set."""
    line = re.search(r"^CapEff:\s*([0-9a-f]+)", _read("/proc/self/status"), re.MULTILINE)
    if line is None:  # not Linux
        return []
    return [name for name, bit in required.items() if not int(line[1], 16) >> bit & 1]


def _is_mapped(kind: str, number: int) -> bool:
    # Lines of "first id inside, first id outside, count" (user_namespaces(7)).
    lines = [[int(word) for word in line.split()] for line in _read(f"/proc/self/{kind}_map").splitlines()]
    return not lines or any(first <= number < first + count for first, _, count in lines)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


_UTIL_LINUX = ("setsid", "choom", "setpriv")


class MissingProgramError(Exception):
    """A program that is needed to confine scripts is not installed."""


def find_program(name: str) -> str:
    """
    Return the absolute path of a program that confines scripts. Each is looked up only once.

    Programs of util-linux are searched along `SEARCH_PATH` first: the script's user can read those
    directories, and they exist in a sandbox. Others, such as a newer bubblewrap, are searched along this
    process's PATH first. Raises `MissingProgramError`.
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
    """Look up the programs that every command prefix needs. Raises `MissingProgramError`."""
    for name in _UTIL_LINUX:
        find_program(name)
    if not os.access(BASH, os.X_OK):
        raise MissingProgramError(f"{BASH} is not installed")


class _Limit(NamedTuple):
    """A resource limit; `option` and `unit` are those of bash's `ulimit`."""

    option: str
    kind: int
    value: int
    unit: int

    @property
    def argument(self) -> str:
        hard = resource.getrlimit(self.kind)[1]
        value = self.value if hard == resource.RLIM_INFINITY else min(self.value, hard)
        return f"-{self.option} {value // self.unit}"


_LIMITS = (
    # A core dump would hold the script's memory, and fill the disk.
    _Limit("c", resource.RLIMIT_CORE, 0, 1024),
    # Linux's usual value. Programs that close all possible descriptors take long with a larger one.
    _Limit("n", resource.RLIMIT_NOFILE, 1024, 1),
    # Far more than a run can deliver, and less than the 8 GB disk of a Fly Machine: a script that writes a
    # file without end is killed by SIGXFSZ before the disk is full.
    _Limit("f", resource.RLIMIT_FSIZE, 1 << 30, 1024),
)

_PROCESS_LIMIT = _Limit("u", resource.RLIMIT_NPROC, 512, 1)
"""About half of the limit that Linux sets for a machine with 256 MB, so that root can always fork."""


def _last_step(limits: Sequence[_Limit]) -> str:
    """Return a bash script that sets limits, writes to `STARTED_FD`, and executes its arguments."""
    options = " ".join(limit.argument for limit in limits)
    # A daemon of twistd has the umask 077; scripts get the usual one.
    return (
        f"umask 022 && ulimit {options} || exit; "
        f'{{ echo >&{STARTED_FD}; }} 2>/dev/null; exec {STARTED_FD}>&- "$@"'
    )


@contextmanager
def first_victim_of_low_memory() -> Iterator[None]:
    """
    Let Linux kill processes that are started in this context first when memory runs out.

    They inherit the value of this process, which then restores its own; that needs no privilege. Does nothing
    where this process may not change its value: there, the command prefix does it with a program.
    """
    if not os.access(_OOM_SCORE_FILE, os.W_OK):
        yield
        return
    file = Path(_OOM_SCORE_FILE)
    original = file.read_bytes()
    file.write_bytes(_OOM_SCORE_ADJ)
    try:
        yield
    finally:
        file.write_bytes(original)


_READ_ONLY = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
_PRIVATE = ("/tmp", "/root", "/home", "/run", "/var/tmp")  # noqa: S108 - empty and private in each sandbox


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
        *("--die-with-parent", "--new-session"),
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
