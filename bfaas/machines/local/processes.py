"""
Machines as processes of this host: each started machine is a `basher` on its own port, with its own home.

The home is wiped at every stop, as the root file system of a Fly Machine is. Where this process is root,
each start of a machine reserves a user for its script. Where bubblewrap works, it confines scripts; elsewhere
they have all rights of their user.
"""

from __future__ import annotations

import os
import shlex
import socket
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from bfaas.machines.emulator.backend import MachineBackend
from bfaas.machines.emulator.state import EmulatedMachines
from bfaas.machines.local.host import (
    WORKER_COMMAND,
    available_script_users,
    candidate_directories,
    worker_environment,
)
from bfaas.machines.local.removal_watch import RemovalWatch
from bfaas.machines.local.script_home import ScriptHome
from bfaas.machines.local.state_directory import StateDirectory, abandoned, wipe
from bfaas.system import process_tree
from bfaas.system.confinement import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.internet.interfaces import IDelayedCall, IProcessTransport
    from twisted.python.failure import Failure

    from bfaas.machines.api import Machine, MachineConfig

_log = Logger()

_PDEATHSIG_POLL_INTERVAL = 0.005  # seconds
_RESTORE_DELAY = 0.01  # seconds, so that a cleaner that removes a directory entry by entry can finish


class _Worker(ProcessProtocol):
    """A worker process. Its last lines of output are logged if it fails."""

    transport: IProcessTransport

    def __init__(self, machine_id: str, home: ScriptHome, exited: Callable[[], None]) -> None:
        self.machine_id = machine_id
        self.home = home
        self.exited = exited
        self.killed = False
        self.ended: Deferred[None] = Deferred()
        self._last_lines: deque[str] = deque(maxlen=20)

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: ARG002 - both outputs are kept
        """Keep the last lines."""
        self._last_lines.extend(data.decode("utf-8", "replace").splitlines())

    def processEnded(self, reason: Failure) -> None:
        """Report the end of the process, once its output is closed too."""
        status = getattr(reason.value, "exitCode", None)
        if status != 0 and not self.killed:
            _log.warn(
                "the worker of {machine} ended with {status}: {lines}",
                machine=self.machine_id,
                status=status,
                lines="\n".join(self._last_lines),
            )
        self.ended.callback(None)
        self.exited()


class LocalProcesses(MachineBackend):
    """
    Backend that runs machines as processes: `command`, with options for its endpoint.

    This process becomes the subreaper of processes that outlive their worker. Every child that appears after
    the first start, and is not a worker, is treated as such an orphan and killed.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        sandboxed: bool,
        directory: str | None = None,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._reactor = reactor
        self._sandboxed = sandboxed
        self._parent = directory
        self._command = command
        self._users = available_script_users()
        self._preexisting_children: frozenset[int] | None = None
        self._state: StateDirectory | None = None
        self._watch: RemovalWatch | None = None
        self._restoring: IDelayedCall | None = None
        self._workers: dict[str, _Worker] = {}
        self._kill_lock = DeferredLock()
        self._removals: set[Deferred[None]] = set()

    def allocate_url(self) -> str:
        """Return the URL of a free port."""
        return f"http://127.0.0.1:{_free_port()}"

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start a worker. It may not listen yet when this returns. Raises `OSError`."""
        if self._preexisting_children is None:
            # Processes that outlive their worker become our children, to be killed. Done at the first start,
            # because a daemon forks after it is composed.
            process_tree.become_subreaper()
            self._preexisting_children = frozenset(process_tree.children(os.getpid()))
        home = ScriptHome(self._ensure_directory() / machine.id, self._users, sandboxed=self._sandboxed)
        environment = {
            **worker_environment(),
            "HOME": str(home.home),
            "FLY_MACHINE_ID": machine.id,
            "FLY_REGION": machine.region,
            "SANDBOX": shlex.join(home.sandbox),
            "RUN_AS": str(home.user.uid) if home.user else "",
            **config.env,
        }
        endpoint = f"tcp:{urlsplit(machine.url or '').port}:interface=127.0.0.1"
        prefix = _worker_prefix(sandboxed=self._sandboxed)
        command = [*prefix, *self._command, "--exit-on-stdin-eof", "--listen", endpoint]
        worker = _Worker(machine.id, home, exited)
        try:
            self._reactor.spawnProcess(worker, command[0], command, env=environment)
        except OSError:
            self._remove_home(home)
            raise
        self._workers[machine.id] = worker
        self._watch_for_removal(home.directory)

    async def kill(self, machine_id: str) -> None:
        """Kill the worker with all its descendants, and wipe its home. Do nothing if none runs."""
        worker = self._workers.get(machine_id)
        if worker is None:
            return
        worker.killed = True
        async with self._kill_lock:
            # Reading /proc takes time. Pending output, such as the end of the run, is written first, and
            # workers that end at the same time are killed one by one.
            await deferLater(self._reactor, 0)
            pid = worker.transport.pid
            if pid is not None:
                process_tree.kill_tree(pid)
        await _wait_for(worker.ended)
        survivors = await process_tree.kill_descendants(self._reactor, self._not_orphans)
        if survivors:
            _log.error("{count} processes of {machine} survive SIGKILL", count=survivors, machine=machine_id)
        if self._workers.get(machine_id) is worker:  # False where a concurrent kill was first
            del self._workers[machine_id]
            await self._run_in_thread(self._remove_home, worker.home)

    def _not_orphans(self) -> frozenset[int]:
        pids = (worker.transport.pid for worker in self._workers.values())
        return (self._preexisting_children or frozenset()).union(pid for pid in pids if pid is not None)

    async def pause(self, machine_id: str) -> None:
        """Stop the worker and its descendants with SIGSTOP."""
        worker = self._workers[machine_id]
        # A stopped process does not notice our death unless setpriv has set its parent-death signal before.
        while _runs_prefix(worker.transport.pid):
            await deferLater(self._reactor, _PDEATHSIG_POLL_INTERVAL)
        pid = worker.transport.pid
        if pid is not None:
            process_tree.stop_tree(pid)

    async def resume(self, machine_id: str) -> None:
        """Continue the worker and its descendants with SIGCONT."""
        pid = self._workers[machine_id].transport.pid
        if pid is not None:
            process_tree.continue_tree(pid)

    def remove_abandoned(self) -> None:
        """Remove, in the background, the directories of killed processes of this user."""
        for state in abandoned({*candidate_directories(), *([self._parent] if self._parent else [])}):
            self._run_in_thread(state.remove)

    async def close(self) -> None:
        """Remove all directories."""
        if self._watch is not None:
            self._watch.close()
            if self._restoring is not None and self._restoring.active():
                self._restoring.cancel()
            self._watch = None
        await DeferredList(list(self._removals))
        if self._state is not None:
            self._state.remove()
            self._state = None
        if self._users is not None:
            self._users.close()

    def _run_in_thread(self, remove: Callable[..., None], *arguments: object) -> Deferred[None]:
        """
        Run a removal in a thread, because a script may have left a million files.

        Cancelling the returned Deferred ends the wait; the removal continues.
        """
        removal = deferToThreadPool(self._reactor, self._reactor.getThreadPool(), remove, *arguments)
        waiting: Deferred[None] = Deferred()

        def finish(result: None) -> None:
            self._removals.discard(removal)
            waiting.callback(result)

        self._removals.add(removal)
        removal.addErrback(lambda failure: _log.failure("while removing a directory", failure))
        removal.addBoth(finish)
        return waiting

    def _remove_home(self, home: ScriptHome) -> None:
        """Kill the processes of the script's user, remove its files, and release the user."""
        if home.user is not None and not process_tree.kill_user(home.user.uid):
            _log.error("processes of user {uid} survive SIGKILL", uid=home.user.uid)
            return  # the id stays reserved
        wipe(home.directory)
        if home.user is not None and self._users is not None:
            self._users.release(home.user)

    def _ensure_directory(self) -> Path:
        """Return the directory that contains homes; create it if it is missing. Raises `OSError`."""
        if self._state is not None and not self._state.intact:
            _log.warn("{path} was removed; creating it again", path=str(self._state.path))
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
        """Watch for the removal of a directory, or of its entries."""
        try:
            if self._watch is None:
                self._watch = RemovalWatch(self._reactor, self._schedule_restore)
            self._watch.add(directory)
        except OSError as error:  # fs.inotify.max_user_instances, max_user_watches
            _log.warn("cannot watch {path}: {error}", path=str(directory), error=error)

    def _schedule_restore(self) -> None:
        if self._restoring is None or not self._restoring.active():
            self._restoring = self._reactor.callLater(_RESTORE_DELAY, self._restore_homes)

    def _restore_homes(self) -> None:
        """Create the homes of idle workers again that a cleaner of temporary files has removed."""
        for worker in list(self._workers.values()):
            if worker.killed or worker.home.home.exists():
                continue
            if worker.transport.pid is None or process_tree.children(worker.transport.pid):
                continue  # a running script may remove its own home
            try:
                if self._ensure_directory() != worker.home.directory.parent:
                    raise FileNotFoundError("its directory is gone")
                worker.home.restore()
                self._watch_for_removal(worker.home.directory)
            except OSError as error:
                _log.warn(
                    "the home of {machine} was removed, stopping the machine: {error}",
                    machine=worker.machine_id,
                    error=error,
                )
                worker.killed = True
                worker.exited()
            else:
                _log.warn("the home of {machine} was removed; created it again", machine=worker.machine_id)


class LocalMachines(EmulatedMachines):
    """Machines of this host: the emulator's state with processes as its backend."""

    def __init__(
        self,
        reactor: Any,
        wall_clock: Callable[[], float],
        *,
        sandboxed: bool,
        directory: str | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        rate_limited: bool = False,
    ) -> None:
        self._processes = LocalProcesses(reactor, sandboxed=sandboxed, directory=directory, command=command)
        reactor.callWhenRunning(self._processes.remove_abandoned)
        super().__init__(reactor, wall_clock, self._processes, rate_limited=rate_limited)

    async def shutdown(self) -> None:
        """Kill all workers and remove all directories."""
        await super().shutdown()
        await self._processes.close()


def _worker_prefix(*, sandboxed: bool) -> list[str]:
    """
    Return the words before a worker's command. Each program replaces itself with the next.

    setsid keeps a terminal's Ctrl-C from the worker. setpriv sets the signal that the worker receives when
    this process dies. In a sandbox it is SIGKILL, because the script dies with its worker, even a stopped
    one. Elsewhere it is SIGCONT: a stopped worker continues, notices the end of its input, and kills its
    script before it exits.
    """
    signal = "KILL" if sandboxed else "CONT"
    return [find_program("setsid"), find_program("setpriv"), "--pdeathsig", signal, "--"]


def _runs_prefix(pid: int | None) -> bool:
    """Return whether a worker's process has not set its parent-death signal yet; see `_worker_prefix`."""
    if pid is None:
        return False
    try:
        return b"\0--pdeathsig\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _free_port() -> int:
    """Return a port of 127.0.0.1 that is not in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(event: Deferred[None]) -> Deferred[None]:
    """Wait for an event that several callers wait for. Cancelling the wait does not cancel the event."""
    waiting: Deferred[None] = Deferred()

    def finish(result: None) -> None:
        if not waiting.called:
            waiting.callback(None)
        return result

    event.addCallback(finish)
    return waiting
