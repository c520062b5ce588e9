"""
Machines as processes of this host: a body is a `basher` on a port of its own, with a home of its own.

It is wiped at every stop, as the root file system of a Fly Machine is. Where we are root, each boot of a
machine has a user of its own for its script. Where bubblewrap works, scripts are confined by it; where not,
they can do what their user can.
"""

from __future__ import annotations

import os
import shlex
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from bfaas.machines.emulator.state import MemoryMachines
from bfaas.machines.local.removal_watch import RemovalWatch
from bfaas.machines.local.script_users import ScriptUsers, unavailable
from bfaas.machines.local.state_directory import StateDirectory, abandoned, wipe
from bfaas.system import process_tree
from bfaas.system.confinement import (
    BASH,
    SEARCH_PATH,
    MissingProgramError,
    check_programs,
    command_prefix,
    find_program,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.internet.interfaces import IDelayedCall, IProcessTransport
    from twisted.python.failure import Failure

    from bfaas.machines.api import Machine, MachineConfig
    from bfaas.machines.emulator.backend import MachineBackend
    from bfaas.system.confinement import User

_log = Logger()

# sys.executable is empty where Python was started under a name that is not in PATH. Without -P the directory
# that we happen to be in could replace any module.
_PYTHON = sys.executable or os.path.realpath("/proc/self/exe")
WORKER = (_PYTHON, "-P", "-m", "bfaas.basher")

_IMPORTS = """
import importlib.util
missing = [name for name in {names!r} if importlib.util.find_spec(name) is None]
exit("does not find the modules " + ", ".join(missing) if missing else 0)
"""
_NEEDED = ("bfaas.basher", "twisted", "klein", "cryptography")

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
_PRIVATE = ("/tmp", "/root", "/home", "/run", "/var/tmp")  # noqa: S108 - in the sandbox, each its own
_HOME = "/home/worker"

_ACCOUNT = "worker"
"""The name of a script's user in a sandbox, where its id has none on the host."""

_FALLBACK_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - each gets a directory of ours
_CHECK_TIMEOUT = 10.0
_NOT_EXECUTABLE = 99
_CHECK = f"cd && echo '#!/bin/sh' >check && chmod 700 check && {{ ./check || exit {_NOT_EXECUTABLE}; }}"


def sandbox_for(home: str, accounts: str | None = None) -> tuple[str, ...]:
    """
    Make the prefix of commands that run in bubblewrap (https://github.com/containers/bubblewrap).

    The system is there to read, `home` to write; processes, network and all other files are not there.
    `accounts` is a directory with a passwd and a group file in place of those in /etc.
    Raises `MissingProgramError`.
    """
    bind: list[str] = []
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            bind += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            bind += ["--ro-bind", str(path), str(path)]
    for private in _PRIVATE:
        bind += ["--tmpfs", private]
    names: list[str] = []
    if accounts is not None:
        for file in ("passwd", "group"):
            bind += ["--ro-bind", f"{accounts}/{file}", f"/etc/{file}"]
        names = ["--setenv", "USER", _ACCOUNT, "--setenv", "LOGNAME", _ACCOUNT]
    return (
        find_program("bwrap"),
        "--die-with-parent",
        "--unshare-user",
        "--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts",
        "--cap-drop", "ALL",
        *bind,
        "--proc", "/proc",
        "--ro-bind", "/proc/sys", "/proc/sys",
        "--dev", "/dev",
        "--bind", home, _HOME,
        "--remount-ro", "/",
        "--setenv", "HOME", _HOME,
        *names,
        "--chdir", _HOME,
        "--",
    )  # fmt: skip


class HostError(Exception):
    """Scripts cannot be run on this host; the message is one line."""


@dataclass(frozen=True)
class Host:
    """How this host runs scripts: in bubblewrap or not, with their homes below which directory."""

    sandboxed: bool
    directory: str


class _Place:
    """Where a script runs: a directory of its own with a home, and a user or None for ourselves."""

    def __init__(self, directory: Path, users: ScriptUsers | None, *, sandboxed: bool) -> None:
        """Make it. Raises `OSError`."""
        self.user: User | None = users.acquire() if users else None
        self.directory = directory
        self.home = directory / "home"
        self._accounts = sandboxed and self.user is not None
        self._sandboxed = sandboxed
        try:
            self._make()
        except OSError:
            if users is not None and self.user is not None:
                users.release(self.user)
            raise

    def restore(self) -> None:
        """Make it again, empty. Raises `OSError`."""
        wipe(self.directory)
        self._make()

    def _make(self) -> None:
        self.directory.mkdir()
        try:
            # The modes do not depend on our umask: the script's user has to get to its home.
            self.directory.chmod(0o711)
            self.home.mkdir(mode=0o700)
            self.home.chmod(0o700)
            if self._accounts and self.user is not None:
                _write_accounts(self.directory, self.user)
            if self.user is not None:
                os.chown(self.home, *self.user)
        except OSError:
            wipe(self.directory)
            raise

    @property
    def sandbox(self) -> tuple[str, ...]:
        """The words that run a command in a sandbox; none without one."""
        if not self._sandboxed:
            return ()
        return sandbox_for(str(self.home), str(self.directory) if self._accounts else None)


def script_users() -> ScriptUsers | None:
    """Choose users for scripts; None where they can only run as ourselves."""
    return None if unavailable() else ScriptUsers()


def find_sandbox() -> bool:
    """Return whether bubblewrap works here; see `examine_host`."""
    return examine_host().sandboxed


def examine_host() -> Host:
    """
    Find out how scripts can be run here, with the commands, users and directories of their runs.

    Log a warning where they are not confined. Blocks for a moment. Raises `HostError`.
    """
    users = script_users()
    try:
        check_programs()
        _check_worker()
        directory = _choose_directory(users)
        reason = _sandbox_obstacle(directory, users)
    except MissingProgramError as error:
        raise HostError(str(error)) from None
    except subprocess.TimeoutExpired:
        raise HostError(f"a script to try this host did not end within {_CHECK_TIMEOUT:g} s") from None
    except OSError as error:
        raise HostError(f"cannot try to run a script: {error}") from None
    finally:
        if users is not None:
            users.close()
    obstacle = unavailable() if os.geteuid() == 0 else None
    if reason is not None:
        _log.warn(
            "NO SANDBOX: {reason}. Scripts run as {user}: they can read and change this user's files, "
            "reach the network, and see other processes. Let nobody but yourself send them.",
            reason=reason,
            user="a user of their own" if users else f"the user {os.environ.get('USER') or os.getuid()}",
        )
    if obstacle:
        _log.warn("scripts run as root: {reason}", reason=obstacle)
    return Host(sandboxed=reason is None, directory=directory)


def _check_worker() -> None:
    """Raise `HostError` if a worker would not find its modules."""
    command = [_PYTHON, "-P", "-c", _IMPORTS.format(names=_NEEDED)]
    tried = _run(command, env=worker_environment())
    if tried.returncode != 0:
        reason = _last_line(tried.stderr) or f"ends with status {tried.returncode}"
        raise HostError(f"no worker can be started: {_PYTHON} {reason}")


def _choose_directory(users: ScriptUsers | None) -> str:
    """Choose where homes go: the first directory in which a script can do all that it should."""
    reasons: dict[str, str] = {}
    second_choice = None
    for directory in candidate_directories():
        try:
            status, reason = _try_script(directory, users, sandboxed=False)
        except OSError as error:
            status, reason = -1, str(error)
        if status == 0:
            break
        if status == _NOT_EXECUTABLE:
            second_choice = second_choice or directory
            reason = "programs there cannot be executed (noexec)"
        reasons[directory] = reason
    else:
        if second_choice is None:
            told = "; ".join(f"{directory}: {reason}" for directory, reason in reasons.items())
            raise HostError(f"scripts cannot be run, TMPDIR may help: {told}")
        directory = second_choice
        _log.warn("homes of scripts in {directory}: {reason}", directory=directory, reason=reasons[directory])
    preferred, reason = next(iter(reasons.items()), (directory, ""))
    if preferred != directory:
        _log.warn(
            "homes of scripts go to {directory}, not to {preferred}: {reason}",
            directory=directory, preferred=preferred, reason=reason,
        )  # fmt: skip
    return directory


def candidate_directories() -> list[str]:
    """Return the directories that homes may go to, the preferred first; links are resolved."""
    candidates = [tempfile.gettempdir(), *_FALLBACK_DIRECTORIES]
    found = dict.fromkeys(os.path.realpath(path) for path in candidates)
    return [path for path in found if Path(path).is_dir()]


def _sandbox_obstacle(directory: str, users: ScriptUsers | None) -> str | None:
    """Return why bubblewrap cannot be used, or None if it can."""
    if shutil.which("bwrap") is None:  # PATH decides
        return "bubblewrap is not installed"
    status, reason = _try_script(directory, users, sandboxed=True)
    return None if status in (0, _NOT_EXECUTABLE) else f"bubblewrap does not work: {reason}"


def _try_script(directory: str, users: ScriptUsers | None, *, sandboxed: bool) -> tuple[int, str]:
    """Run a script as a worker would. Return its exit status, and what it wrote to standard error."""
    state = StateDirectory.create(directory)
    place = None
    try:
        place = _Place(state.path / "check", users, sandboxed=sandboxed)
        command = [*command_prefix(place.user, place.sandbox), BASH, "-c", "--", _CHECK]
        home = str(place.home)
        tried = _run(command, env={"PATH": SEARCH_PATH, "HOME": home}, cwd=home)
    finally:
        if users is not None and place is not None and place.user is not None:
            users.release(place.user)
        state.remove()
    return tried.returncode, _last_line(tried.stderr) or f"status {tried.returncode}"


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        check=False, timeout=_CHECK_TIMEOUT, **options,
    )  # fmt: skip


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _write_accounts(directory: Path, user: User) -> None:
    """Write a passwd and a group file in which the user has a name."""
    for name, entry in (
        ("passwd", f"{_ACCOUNT}:x:{user.uid}:{user.gid}::{_HOME}:{BASH}"),
        ("group", f"{_ACCOUNT}:x:{user.gid}:"),
    ):
        try:
            others = Path("/etc", name).read_bytes()
        except OSError:
            others = b""
        file = directory / name
        file.write_bytes(entry.encode() + b"\n" + others)
        file.chmod(0o644)


def worker_environment() -> dict[str, str]:
    """
    Make the part of a worker's environment that it needs to be found.

    It imports what we can import, although its HOME, and with it its user's own packages, is another.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    if site.ENABLE_USER_SITE:
        environment["PYTHONUSERBASE"] = site.getuserbase()
    found = set() if not sys.executable else {
        sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *site.getsitepackages(),
        *([site.getusersitepackages()] if site.ENABLE_USER_SITE else []),
    }  # fmt: skip
    paths = [str(Path(path).absolute()) for path in sys.path]
    more = [path for path in paths if path not in found and Path(path).exists()]
    if more:
        environment["PYTHONPATH"] = os.pathsep.join(more)
    return environment


class _Body(ProcessProtocol):
    """A worker process. Its last lines are told when it fails."""

    transport: IProcessTransport

    def __init__(self, machine_id: str, place: _Place, exited: Callable[[], None]) -> None:
        self.machine_id = machine_id
        self.exited = exited
        self._lines: deque[str] = deque(maxlen=20)
        self.place = place
        self.killed = False
        self.ended: Deferred[None] = Deferred()

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: ARG002 - both are the same to us
        """Keep the last lines."""
        self._lines.extend(data.decode("utf-8", "replace").splitlines())

    def processEnded(self, reason: Failure) -> None:
        """Tell that nothing is left."""
        status = getattr(reason.value, "exitCode", None)
        if status != 0 and not self.killed:
            _log.warn(
                "the worker of {machine} ended with {status}: {lines}",
                machine=self.machine_id, status=status, lines="\n".join(self._lines),
            )  # fmt: skip
        self.ended.callback(None)
        self.exited()


class LocalProcesses:
    """
    Gives machines bodies that are processes, `command` with an endpoint to listen on.

    Takes every other child of this process that appears later for what a worker has left, and kills it.
    """

    _SWEEP_LIMIT = 2.0
    _PDEATHSIG_PERIOD = 0.005
    _RESTORE_DELAY = 0.01  # so that a cleaner that removes a directory entry by entry comes to its end

    def __init__(
        self, reactor: Any, *, sandboxed: bool, directory: str | None = None, command: Sequence[str] = WORKER
    ) -> None:
        self._preexisting_children: frozenset[int] | None = None
        self._reactor = reactor
        self._sandboxed = sandboxed
        self._parent = directory
        self._command = command
        self._users = script_users()
        self._state: StateDirectory | None = None
        self._watch: RemovalWatch | None = None
        self._restoring: IDelayedCall | None = None
        self._bodies: dict[str, _Body] = {}
        self._killing = DeferredLock()
        self._wiping: set[Deferred[None]] = set()

    def place(self) -> str:
        """Choose a port that is free."""
        return f"http://127.0.0.1:{free_port()}"

    async def boot(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start a worker; it may not listen yet."""
        if self._preexisting_children is None:
            # What a worker leaves that dies before its script becomes ours, to be killed. Only now, as the
            # program may have become a daemon, another process, since it began.
            process_tree.become_subreaper()
            self._preexisting_children = frozenset(process_tree.children(os.getpid()))
        place = _Place(self._directory() / machine.id, self._users, sandboxed=self._sandboxed)
        environment = {
            **worker_environment(),
            "HOME": str(place.home),
            "FLY_MACHINE_ID": machine.id,
            "FLY_REGION": machine.region,
            "SANDBOX": shlex.join(place.sandbox),
            "RUN_AS": str(place.user.uid) if place.user else "",
            **config.env,
        }
        endpoint = f"tcp:{urlsplit(machine.url or '').port}:interface=127.0.0.1"
        leaders = _leaders(sandboxed=self._sandboxed)
        command = [*leaders, *self._command, "--exit-on-stdin-eof", "--listen", endpoint]
        body = _Body(machine.id, place, exited)
        try:
            self._reactor.spawnProcess(body, command[0], command, env=environment)
        except OSError:
            self._wipe(place)
            raise
        self._bodies[machine.id] = body
        self._watch_for_removal(place.directory)

    async def kill(self, machine_id: str) -> None:
        """Kill the worker and everything below it, and wipe its home."""
        body = self._bodies.get(machine_id)
        if body is None:
            return
        body.killed = True
        async with self._killing:
            # A look through /proc takes its time. What is written, such as the ending of the run, goes out
            # first; and many that end at once do so one by one.
            await deferLater(self._reactor, 0)
            pid = body.transport.pid
            if pid is not None:
                process_tree.kill_tree(pid)
        await _when(body.ended)
        left = await process_tree.kill_descendants(self._reactor, self._not_orphans, self._SWEEP_LIMIT)
        if left:
            _log.error("{count} processes of {machine} survive SIGKILL", count=left, machine=machine_id)
        if self._bodies.get(machine_id) is body:  # and not another kill was first, or this one cancelled
            del self._bodies[machine_id]
            await self._aside(self._wipe, body.place)

    def _not_orphans(self) -> frozenset[int]:
        pids = (body.transport.pid for body in self._bodies.values())
        return (self._preexisting_children or frozenset()).union(pid for pid in pids if pid is not None)

    async def freeze(self, machine_id: str) -> None:
        """Stop the processes, where they are."""
        body = self._bodies[machine_id]
        # A stopped process notices our death by the signal alone that setpriv has set by then.
        while _is_before_pdeathsig(body.transport.pid):
            await deferLater(self._reactor, self._PDEATHSIG_PERIOD)
        pid = body.transport.pid
        if pid is not None:
            process_tree.stop_tree(pid)

    async def thaw(self, machine_id: str) -> None:
        """Let the processes go on."""
        pid = self._bodies[machine_id].transport.pid
        if pid is not None:
            process_tree.continue_tree(pid)

    def remove_abandoned(self) -> None:
        """Remove what processes of this user that were killed have left on disk, in the background."""
        for state in abandoned({*candidate_directories(), *([self._parent] if self._parent else [])}):
            self._aside(state.remove)

    async def close(self) -> None:
        """Remove what is left on disk."""
        if self._watch is not None:
            self._watch.close()
            if self._restoring is not None and self._restoring.active():
                self._restoring.cancel()
            self._watch = None
        await DeferredList(list(self._wiping))
        if self._state is not None:
            self._state.remove()
            self._state = None
        if self._users is not None:
            self._users.close()

    def _aside(self, work: Callable[..., None], *arguments: object) -> Deferred[None]:
        """Work in a thread, for a script may have left a million files; the wait can be cancelled."""
        working = deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work, *arguments)
        waiting: Deferred[None] = Deferred()

        def finish(result: None) -> None:
            self._wiping.discard(working)
            waiting.callback(result)

        self._wiping.add(working)
        working.addErrback(lambda failure: _log.failure("while removing a directory", failure))
        working.addBoth(finish)
        return waiting

    def _wipe(self, place: _Place) -> None:
        """Kill what the script's user still runs, and remove its files."""
        if place.user is not None and not process_tree.kill_user(place.user.uid):
            _log.error("processes of user {uid} survive SIGKILL", uid=place.user.uid)
            return  # with the id still taken
        wipe(place.directory)
        if place.user is not None and self._users is not None:
            self._users.release(place.user)

    def _directory(self) -> Path:
        if self._state is not None and not self._state.intact:
            _log.warn("{path} was removed; it is made again", path=str(self._state.path))
            if self._state.restore():
                self._watch_for_removal(self._state.path)
            else:
                self._state.abandon()
                self._state = None
        if self._state is None:
            self._state = StateDirectory.create(self._parent or tempfile.gettempdir())
            self._watch_for_removal(self._state.path)
        return self._state.path

    def _watch_for_removal(self, directory: Path) -> None:
        """Notice when something is removed from a directory of ours, or the directory itself."""
        try:
            if self._watch is None:
                self._watch = RemovalWatch(self._reactor, self._note_removal)
            self._watch.add(directory)
        except OSError as error:  # fs.inotify.max_user_instances, max_user_watches
            _log.warn("cannot watch {path}: {error}", path=str(directory), error=error)

    def _note_removal(self) -> None:
        if self._restoring is None or not self._restoring.active():
            self._restoring = self._reactor.callLater(self._RESTORE_DELAY, self._restore)

    def _restore(self) -> None:
        """Make homes of idle workers again that a cleaner of temporary files has removed."""
        for body in list(self._bodies.values()):
            if body.killed or body.place.home.exists():
                continue
            if body.transport.pid is None or process_tree.children(body.transport.pid):
                continue  # a script may remove its own home
            try:
                if self._directory() != body.place.directory.parent:
                    raise FileNotFoundError("its directory is gone")
                body.place.restore()
                self._watch_for_removal(body.place.directory)
            except OSError as error:
                _log.warn(
                    "the home of {machine} was removed, its worker ends: {error}",
                    machine=body.machine_id, error=error,
                )  # fmt: skip
                body.killed = True
                body.exited()
            else:
                _log.warn("the home of {machine} was removed; it is made again", machine=body.machine_id)


class LocalMachines(MemoryMachines):
    """The machines of this host."""

    def __init__(
        self,
        reactor: Any,
        wall: Callable[[], float],
        *,
        sandboxed: bool,
        directory: str | None = None,
        command: Sequence[str] = WORKER,
        rate_limited: bool = False,
    ) -> None:
        self._processes = LocalProcesses(reactor, sandboxed=sandboxed, directory=directory, command=command)
        reactor.callWhenRunning(self._processes.remove_abandoned)
        super().__init__(reactor, wall, self._processes, rate_limited=rate_limited)

    async def shutdown(self) -> None:
        """End all workers, and leave nothing of them."""
        await super().shutdown()
        await self._processes.close()


def _leaders(*, sandboxed: bool) -> list[str]:
    """
    Choose what a worker is started through; each runs the next in its own place.

    A session of its own keeps a terminal's Ctrl-C from it. In a sandbox, where a script dies with its
    worker, the worker dies with us at once, even if it is stopped. Elsewhere it continues if it is stopped,
    so that it notices the end of its input, and kills its script first.
    """
    end = "KILL" if sandboxed else "CONT"
    return [find_program("setsid"), find_program("setpriv"), "--pdeathsig", end, "--"]


def _is_before_pdeathsig(pid: int | None) -> bool:
    """Whether a worker's process still runs its leaders, up to the one that sets its parent-death signal."""
    if pid is None:
        return False
    try:
        return b"\0--pdeathsig\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def free_port() -> int:
    """Choose a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _when(event: Deferred[None]) -> Deferred[None]:
    """Wait for an event that others wait for too; cancelling the wait leaves the event alone."""
    waiting: Deferred[None] = Deferred()

    def tell(result: None) -> None:
        if not waiting.called:
            waiting.callback(None)
        return result

    event.addCallback(tell)
    return waiting


_check: type[MachineBackend] = LocalProcesses
