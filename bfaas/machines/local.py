"""
Machines as processes of this host: a body is a `basher` on a port of its own, with a home of its own.

It is wiped at every stop, as the root file system of a Fly Machine is. Scripts of a host that is root run as
nobody. Where bubblewrap works, they are confined by it; where not, they can do what their user can.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from bfaas import tree
from bfaas.confine import User, command_prefix
from bfaas.deadline import sleep
from bfaas.machines.memory import MemoryMachines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.internet.interfaces import IProcessTransport
    from twisted.python.failure import Failure

    from bfaas.machines.api import Machine, MachineConfig
    from bfaas.machines.bodies import Bodies

_log = Logger()

WORKER = (sys.executable, "-m", "bfaas.basher")

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
_PRIVATE = ("/tmp", "/root", "/home", "/run", "/var/tmp")  # noqa: S108 - in the sandbox, each its own
_HOME = "/home/worker"

_NOBODY = User(65534, 65534)


def sandbox_for(home: str) -> tuple[str, ...]:
    """
    Make the prefix of commands that run in bubblewrap (https://github.com/containers/bubblewrap).

    The system is there to read, `home` to write; processes, network and all other files are not there.
    """
    bind: list[str] = []
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            bind += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            bind += ["--ro-bind", str(path), str(path)]
    for private in _PRIVATE:
        bind += ["--tmpfs", private]
    return (
        "bwrap",
        "--die-with-parent",
        "--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts",
        "--cap-drop", "ALL",
        *bind,
        "--proc", "/proc",
        "--ro-bind", "/proc/sys", "/proc/sys",
        "--dev", "/dev",
        "--bind", home, _HOME,
        "--remount-ro", "/",
        "--setenv", "HOME", _HOME,
        "--chdir", _HOME,
        "--",
    )  # fmt: skip


def script_user() -> User | None:
    """
    Choose whom scripts run as; None for ourselves.

    Root without capabilities still is the user that owns the kernel's files, in a sandbox too.
    """
    return _NOBODY if os.geteuid() == 0 else None


def find_sandbox() -> bool:
    """Tell whether bubblewrap is installed and works here; warn loudly where not. Blocks for a moment."""
    trouble = "bubblewrap is not installed"
    user = script_user()
    if shutil.which("bwrap"):
        with tempfile.TemporaryDirectory() as directory:
            home = _make_home(Path(directory), user)
            command = [*command_prefix(user, sandbox_for(str(home))), "/bin/bash", "-c", "--", "/bin/true; :"]
            tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        if tried.returncode == 0:
            return True
        trouble = f"bubblewrap does not work: {tried.stderr.strip()}"
    _log.warn(
        "NO SANDBOX: {trouble}. Scripts run as the user {user}: they can read and change this user's files, "
        "reach the network, and see other processes. Let nobody but yourself send them.",
        trouble=trouble,
        user="nobody" if user else os.environ.get("USER") or os.getuid(),
    )
    return False


class _Body(ProcessProtocol):
    """A worker process. Its last lines are told when it fails."""

    transport: IProcessTransport

    def __init__(self, machine_id: str, home: Path, exited: Callable[[], None]) -> None:
        self._machine_id = machine_id
        self._exited = exited
        self._lines: deque[str] = deque(maxlen=20)
        self.home = home
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
                machine=self._machine_id, status=status, lines="\n".join(self._lines),
            )  # fmt: skip
        self.ended.callback(None)
        self._exited()


class LocalBodies:
    """
    Gives machines bodies that are processes, `command` with an endpoint to listen on.

    Takes every other child of this process that appears later for what a worker has left, and kills it.
    """

    _SWEEP_LIMIT = 2.0

    def __init__(self, reactor: Any, *, sandboxed: bool, command: Sequence[str] = WORKER) -> None:
        self._bystanders: frozenset[int] | None = None
        self._reactor = reactor
        self._sandboxed = sandboxed
        self._command = command
        self._state: Path | None = None
        self._bodies: dict[str, _Body] = {}
        self._killing = DeferredLock()
        self._wiping: set[Deferred[None]] = set()

    def place(self) -> str:
        """Choose a port that is free."""
        return f"http://127.0.0.1:{free_port()}"

    async def boot(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start a worker; it may not listen yet."""
        if self._bystanders is None:
            # What a worker leaves that dies before its script becomes ours, to be killed. Only now, as the
            # program may have become a daemon, another process, since it began.
            tree.become_subreaper()
            self._bystanders = frozenset(tree.children(os.getpid()))
        directory = self._directory() / machine.id
        directory.mkdir()
        user = script_user()
        home = _make_home(directory, user)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "FLY_MACHINE_ID": machine.id,
            "FLY_REGION": machine.region,
            "SANDBOX": shlex.join(sandbox_for(str(home))) if self._sandboxed else "",
            "RUN_AS": str(user.uid) if user else "",
            **config.env,
        }
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        endpoint = f"tcp:{urlsplit(machine.url or '').port}:interface=127.0.0.1"
        leaders = _leaders(sandboxed=self._sandboxed)
        command = [*leaders, *self._command, "--attached", "--listen", endpoint]
        body = _Body(machine.id, directory, exited)
        try:
            self._reactor.spawnProcess(body, command[0], command, env=environment)
        except OSError:
            _wipe(directory)
            raise
        self._bodies[machine.id] = body

    async def kill(self, machine_id: str) -> None:
        """Kill the worker and everything below it, and wipe its home."""
        body = self._bodies.get(machine_id)
        if body is None:
            return
        body.killed = True
        async with self._killing:
            # A look through /proc takes its time. What is written, such as the ending of the run, goes out
            # first; and many that end at once do so one by one.
            await sleep(self._reactor, 0)
            pid = body.transport.pid
            if pid is not None:
                tree.kill_tree(pid)
        await _when(body.ended)
        left = await tree.end_below_us(self._reactor, self._not_orphans, self._SWEEP_LIMIT)
        if left:
            _log.error("{count} processes of {machine} survive SIGKILL", count=left, machine=machine_id)
        if self._bodies.get(machine_id) is body:  # and not another kill was first, or this one cancelled
            del self._bodies[machine_id]
            await self._wipe_aside(body.home)

    def _not_orphans(self) -> frozenset[int]:
        pids = (body.transport.pid for body in self._bodies.values())
        return (self._bystanders or frozenset()).union(pid for pid in pids if pid is not None)

    async def freeze(self, machine_id: str) -> None:
        """Stop the processes, where they are."""
        pid = self._bodies[machine_id].transport.pid
        if pid is not None:
            tree.stop_tree(pid)

    async def thaw(self, machine_id: str) -> None:
        """Let the processes go on."""
        pid = self._bodies[machine_id].transport.pid
        if pid is not None:
            tree.continue_tree(pid)

    async def close(self) -> None:
        """Remove what is left on disk."""
        await DeferredList(list(self._wiping))
        if self._state is not None:
            _wipe(self._state)
            self._state = None

    def _wipe_aside(self, directory: Path) -> Deferred[None]:
        """Wipe in a thread, for a script may have left a million files; who waits may stop to."""
        wiped = deferToThreadPool(self._reactor, self._reactor.getThreadPool(), _wipe, directory)
        waiting: Deferred[None] = Deferred()

        def tell(result: None) -> None:
            self._wiping.discard(wiped)
            waiting.callback(result)

        self._wiping.add(wiped)
        wiped.addBoth(tell)
        return waiting

    def _directory(self) -> Path:
        if self._state is None:
            self._state = Path(tempfile.mkdtemp(prefix="bfaas-"))
            self._state.chmod(0o711)  # bubblewrap is started by the script's user
        return self._state


class LocalMachines(MemoryMachines):
    """The machines of this host."""

    def __init__(
        self,
        reactor: Any,
        wall: Callable[[], float],
        *,
        sandboxed: bool,
        command: Sequence[str] = WORKER,
        rate_limited: bool = False,
    ) -> None:
        self._processes = LocalBodies(reactor, sandboxed=sandboxed, command=command)
        super().__init__(reactor, wall, self._processes, rate_limited=rate_limited)

    async def shutdown(self) -> None:
        """End all workers, and leave nothing of them."""
        await super().shutdown()
        await self._processes.close()


def _make_home(directory: Path, user: User | None) -> Path:
    """Make a home for scripts in a directory of ours, which they may cross."""
    directory.chmod(0o711)
    home = directory / "home"
    home.mkdir(mode=0o700)
    if user is not None:
        os.chown(home, *user)
    return home


def _leaders(*, sandboxed: bool) -> list[str]:
    """
    Choose what a worker is started through; each runs the next in its own place.

    A session of its own keeps a terminal's Ctrl-C from it. In a sandbox, where a script dies with its
    worker, the worker dies with us at once, even if it is stopped. Elsewhere it is better that it notices
    the end of its input, and kills its script first.
    """
    setpriv = shutil.which("setpriv") if sandboxed else None
    return ["setsid", *([setpriv, "--pdeathsig", "KILL"] if setpriv else [])]


def free_port() -> int:
    """Choose a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wipe(directory: Path) -> None:
    """Remove a directory, also if a script took its own right to do so; links are not followed."""
    try:
        directory.chmod(0o700)
        for place, names, _ in os.walk(directory):
            for below in (Path(place, name) for name in names):
                if not below.is_symlink():
                    below.chmod(0o700)
        shutil.rmtree(directory)
    except (RecursionError, OSError):
        # Python goes down by recursion, and by paths that can be too long; these do not, however deep a
        # script has dug.
        subprocess.run(["chmod", "-R", "u+rwx", "--", str(directory)], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", "--", str(directory)], check=True)


def _when(event: Deferred[None]) -> Deferred[None]:
    """Wait for an event that others wait for too; cancelling the wait leaves the event alone."""
    waiting: Deferred[None] = Deferred()

    def tell(result: None) -> None:
        if not waiting.called:
            waiting.callback(None)
        return result

    event.addCallback(tell)
    return waiting


_check: type[Bodies] = LocalBodies
