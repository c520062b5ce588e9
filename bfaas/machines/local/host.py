"""
Examine this host: whether it can run workers, in which directory, and whether in a sandbox.

For that, small scripts run with the commands, users and directories of real runs.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from bfaas.machines.local.script_home import ScriptHome
from bfaas.machines.local.script_users import ScriptUsers, unavailable_reason
from bfaas.machines.local.state_directory import StateDirectory
from bfaas.system.confinement import BASH, SEARCH_PATH, Confinement, MissingProgramError, check_programs

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = Logger()

# sys.executable is empty where Python was started under a name that is not in PATH. Without -P, modules in
# the current directory could replace any module of a worker.
_PYTHON = sys.executable or os.path.realpath("/proc/self/exe")

FORK_SERVER = (_PYTHON, "-P", "-m", "bfaas.basher", "--fork-server")
"""The command of the process that forks workers."""

_IMPORT_CHECK = """
import importlib.util
missing = [name for name in {names!r} if importlib.util.find_spec(name) is None]
exit("does not find the modules " + ", ".join(missing) if missing else 0)
"""
_WORKER_MODULES = ("bfaas.basher", "twisted", "klein", "cryptography")

_FALLBACK_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - homes are in a private subdirectory

_CHECK_TIMEOUT = 10.0  # seconds
_NOT_EXECUTABLE = 99  # exit status of the check script
_CHECK_SCRIPT = (
    f"cd && echo '#!/bin/sh' >check && chmod 700 check && {{ ./check || exit {_NOT_EXECUTABLE}; }}"
)


class HostError(Exception):
    """Scripts cannot run on this host. The message is one line."""


@dataclass(frozen=True)
class Host:
    """
    How this host runs scripts.

    `directory` contains their homes. `sandbox_obstacle` is why bubblewrap cannot be used, or None if it can.
    """

    directory: str
    sandbox_obstacle: str | None

    @property
    def sandboxed(self) -> bool:
        """Whether scripts run in bubblewrap."""
        return self.sandbox_obstacle is None


def examine_host() -> Host:
    """
    Find out how this host can run scripts.

    Logs a warning for each way in which scripts are not confined. Blocks for a moment. Raises `HostError`.
    """
    users = available_script_users()
    try:
        check_programs()
        _check_worker()
        directory = _choose_directory(users)
        sandbox_obstacle = _sandbox_obstacle(directory, users)
    except MissingProgramError as error:
        raise HostError(str(error)) from None
    except subprocess.TimeoutExpired:
        raise HostError(f"a test script did not end within {_CHECK_TIMEOUT:g} s") from None
    except OSError as error:
        raise HostError(f"cannot run a test script: {error}") from None
    finally:
        if users is not None:
            users.close()
    if sandbox_obstacle is not None:
        _log.warn(
            "NO SANDBOX: {reason}. Scripts run as {user}: they can read and change this user's files, "
            "reach the network, and see other processes. Accept scripts from yourself only.",
            reason=sandbox_obstacle,
            user="a user of their own" if users else f"the user {os.environ.get('USER') or os.getuid()}",
        )
    user_obstacle = unavailable_reason() if os.geteuid() == 0 else None
    if user_obstacle:
        _log.warn("scripts run as root: {reason}", reason=user_obstacle)
    return Host(directory, sandbox_obstacle)


def available_script_users() -> ScriptUsers | None:
    """Return users for scripts; None where scripts can run only as the user of this process."""
    return None if unavailable_reason() else ScriptUsers()


def _check_worker() -> None:
    """Raise `HostError` if a worker would not find its modules."""
    command = [_PYTHON, "-P", "-c", _IMPORT_CHECK.format(names=_WORKER_MODULES)]
    completed = _run(command, env=worker_environment())
    if completed.returncode != 0:
        reason = _last_line(completed.stderr) or f"ends with status {completed.returncode}"
        raise HostError(f"no worker can be started: {_PYTHON} {reason}")


def _choose_directory(users: ScriptUsers | None) -> str:
    """
    Choose the directory for homes: the first in which a script can write and execute files.

    Where none allows execution, choose the first in which a script can write. Raises `HostError`.
    """
    obstacles: dict[str, str] = {}
    writable = None
    for directory in candidate_directories():
        try:
            status, reason = _run_test_script(directory, users, sandboxed=False)
        except OSError as error:
            status, reason = -1, str(error)
        if status == 0:
            break
        if status == _NOT_EXECUTABLE:
            writable = writable or directory
            reason = "programs there cannot be executed (noexec)"
        obstacles[directory] = reason
    else:
        if writable is None:
            reasons = "; ".join(f"{directory}: {reason}" for directory, reason in obstacles.items())
            raise HostError(f"scripts cannot be run, TMPDIR may help: {reasons}")
        directory = writable
        _log.warn(
            "homes of scripts in {directory}: {reason}", directory=directory, reason=obstacles[directory]
        )
    preferred, reason = next(iter(obstacles.items()), (directory, ""))
    if preferred != directory:
        _log.warn(
            "homes of scripts go to {directory}, not to {preferred}: {reason}",
            directory=directory,
            preferred=preferred,
            reason=reason,
        )
    return directory


def candidate_directories() -> list[str]:
    """Return the directories that may contain homes, the preferred one first, with links resolved."""
    candidates = [tempfile.gettempdir(), *_FALLBACK_DIRECTORIES]
    resolved = dict.fromkeys(os.path.realpath(path) for path in candidates)
    return [path for path in resolved if Path(path).is_dir()]


def _sandbox_obstacle(directory: str, users: ScriptUsers | None) -> str | None:
    """Return why bubblewrap cannot be used, or None if it can."""
    if shutil.which("bwrap") is None:  # only in our own PATH, so that PATH can turn the sandbox off
        return "bubblewrap is not installed"
    status, reason = _run_test_script(directory, users, sandboxed=True)
    return None if status in (0, _NOT_EXECUTABLE) else f"bubblewrap does not work: {reason}"


def _run_test_script(directory: str, users: ScriptUsers | None, *, sandboxed: bool) -> tuple[int, str]:
    """Run a script as a worker would. Return its exit status and the last line of its standard error."""
    state = StateDirectory.create(directory)
    home = None
    try:
        home = ScriptHome(state.path / "check", users, sandboxed=sandboxed)
        command = [*Confinement(home.user, home.sandbox).command_prefix(), BASH, "-c", "--", _CHECK_SCRIPT]
        environment = {"PATH": SEARCH_PATH, "HOME": str(home.home)}
        completed = _run(command, env=environment, cwd=str(home.home))
    finally:
        if users is not None and home is not None and home.user is not None:
            users.release(home.user)
        state.remove()
    return completed.returncode, _last_line(completed.stderr) or f"status {completed.returncode}"


def _run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=_CHECK_TIMEOUT,
        **options,
    )


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def worker_environment() -> dict[str, str]:
    """
    Return the variables with which a worker finds its programs and modules.

    A worker can import what this process can import, although its HOME differs, and with it the user's
    packages directory.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    if site.ENABLE_USER_SITE:
        environment["PYTHONUSERBASE"] = site.getuserbase()
    standard: set[str | None] = set()
    if sys.executable:
        standard = {
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("platstdlib"),
            *site.getsitepackages(),
        }
        if site.ENABLE_USER_SITE:
            standard.add(site.getusersitepackages())
    paths = [str(Path(path).absolute()) for path in sys.path]
    additional = [path for path in paths if path not in standard and Path(path).exists()]
    if additional:
        environment["PYTHONPATH"] = os.pathsep.join(additional)
    return environment
