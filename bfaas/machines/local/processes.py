"""
Machines as processes of this host: each started machine is a `basher` on its own port, with its own home.

The workers are forked by a process that has imported all that they need.

The home is wiped at every stop, as the root file system of a Fly Machine is. Where this process is root,
each start of a machine reserves a user for its script. Where bubblewrap works, it confines scripts; elsewhere
they have all rights of their user.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from bfaas.machines.emulator.backend import MachineBackend
from bfaas.machines.emulator.state import EmulatedMachines
from bfaas.machines.local.fork_client import ForkServer
from bfaas.machines.local.host import (
    FORK_SERVER,
    available_script_users,
    candidate_directories,
    worker_environment,
)
from bfaas.machines.local.removal_watch import RemovalWatch
from bfaas.machines.local.script_home import ScriptHome
from bfaas.machines.local.state_directory import StateDirectory, abandoned, wipe
from bfaas.system import process_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

    from bfaas.machines.api import Machine, MachineConfig

_log = Logger()

_RESTORE_DELAY = 0.01  # seconds, so that a cleaner that removes a directory entry by entry can finish


class _Worker(Protocol):
    """
    A worker process: the connection to its standard streams. Its last lines are logged if it fails.

    `forked` fires when it has been forked or cannot be; `pid` is None before that, and after its end. `ended`
    fires when it has ended and its outputs are closed.
    """

    def __init__(self, machine_id: str, home: ScriptHome, exited: Callable[[], None]) -> None:
        self.machine_id = machine_id
        self.home = home
        self.exited = exited
        self.killed = False
        self.pid: int | None = None
        self.forked: Deferred[None] = Deferred()
        self.ended: Deferred[None] = Deferred()
        self._status: list[int | None] = []
        self._disconnected = False
        self._last_lines: deque[str] = deque(maxlen=20)

    def dataReceived(self, data: bytes) -> None:
        """Keep the last lines."""
        self._last_lines.extend(data.decode("utf-8", "replace").splitlines())

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: ARG002 - the interface's
        """Report the end of the process if it is known: the outputs are closed."""
        self._disconnected = True
        self._report_end()

    def disconnect(self) -> None:
        """End the worker's standard input: it kills its script, and exits."""
        if self.transport is not None:
            self.transport.loseConnection()

    def process_ended(self, status: int | None) -> None:
        """Record the end of the process. None as the status means that the fork server has ended."""
        self._status.append(status)
        self._report_end()

    def _report_end(self) -> None:
        if not (self._disconnected and self._status):
            return
        if self._status[0] != 0 and not self.killed:
            _log.warn(
                "the worker of {machine} ended with {status}: {lines}",
                machine=self.machine_id,
                status=self._status[0],
                lines="\n".join(self._last_lines),
            )
        self.ended.callback(None)
        self.exited()


class LocalProcesses(MachineBackend):
    """
    Backend that runs machines as processes. A fork server, whose command is `command`, starts them.

    This process becomes the subreaper of processes that outlive their worker. Every child that appears after
    the first start, and is not a worker, is treated as such an orphan and killed.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        sandboxed: bool,
        directory: str | None = None,
        command: Sequence[str] = FORK_SERVER,
    ) -> None:
        self._reactor = reactor
        self._sandboxed = sandboxed
        self._parent = directory
        self._command = command
        self._users = available_script_users()
        self._server: ForkServer | None = None
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

    def prepare(self) -> None:
        """Start the fork server, and remove directories of killed processes, in the background."""
        try:
            self._ensure_server()
        except OSError as error:
            _log.warn("cannot start the fork server: {error}", error=error)
        for state in abandoned({*candidate_directories(), *([self._parent] if self._parent else [])}):
            self._run_in_thread(state.remove)

    def _ensure_server(self) -> ForkServer:
        """
        Return the fork server; start it if none is running. Raises `OSError`.

        This process becomes the parent of processes that outlive their worker, to be killed. Not earlier,
        because a daemon forks after it is composed.
        """
        if self._preexisting_children is None:
            process_tree.become_subreaper()
            self._preexisting_children = frozenset(process_tree.children(os.getpid()))
        if self._server is None or not self._server.alive:
            self._server = ForkServer(self._reactor, self._command, self._on_ended)
        return self._server

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start a worker. It may not listen yet when this returns. Raises `OSError`."""
        server = self._ensure_server()
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
        worker = self._workers[machine.id] = _Worker(machine.id, home, exited)
        try:
            await self._fork(server, worker, ["--exit-on-stdin-eof", "--listen", endpoint], environment)
        except BaseException:
            del self._workers[machine.id]
            self._remove_home(home)
            raise
        finally:
            worker.forked.callback(None)
        self._watch_for_removal(home.directory)

    async def _fork(
        self, server: ForkServer, worker: _Worker, arguments: list[str], environment: Mapping[str, str]
    ) -> None:
        """Fork a process for a worker. It ends soon if this fails or is cancelled. Raises `OSError`."""
        local, remote = socket.socketpair()
        with local, remote:
            local.setblocking(False)
            factory = Factory.forProtocol(lambda: worker)
            self._reactor.adoptStreamConnection(local.fileno(), socket.AF_UNIX, factory)
            try:
                worker.pid = await server.fork(arguments, environment, self._death_signal, remote)
            except BaseException:
                worker.disconnect()
                raise

    @property
    def _death_signal(self) -> int:
        """
        The signal that a worker receives when the fork server dies, as it does when this process dies.

        In a sandbox it is SIGKILL, because the script dies with its worker, even a stopped one. Elsewhere it
        is SIGCONT: a stopped worker continues, notices the end of its input, and kills its script before it
        exits.
        """
        return signal.SIGKILL if self._sandboxed else signal.SIGCONT

    def _on_ended(self, pid: int, status: int | None) -> None:
        worker = next((worker for worker in self._workers.values() if worker.pid == pid), None)
        if worker is not None:  # else its start was cancelled
            if status is None:  # it may still run
                worker.disconnect()
            else:
                worker.pid = None
            worker.process_ended(status)
        if self._server is not None:
            self._server.reap(pid)

    async def kill(self, machine_id: str) -> None:
        """Kill the worker with all its descendants, and wipe its home. Do nothing if none runs."""
        worker = self._workers.get(machine_id)
        if worker is None:
            return
        worker.killed = True
        await _wait_for(worker.forked)
        if self._workers.get(machine_id) is not worker:
            return
        async with self._kill_lock:
            # Reading /proc takes time. Pending output, such as the end of the run, is written first, and
            # workers that end at the same time are killed one by one.
            await deferLater(self._reactor, 0)
            if worker.pid is not None:
                process_tree.kill_tree(worker.pid)
        await _wait_for(worker.ended)
        survivors = await process_tree.kill_descendants(self._reactor, self._not_orphans)
        if survivors:
            _log.error("{count} processes of {machine} survive SIGKILL", count=survivors, machine=machine_id)
        if self._workers.get(machine_id) is worker:  # False where a concurrent kill was first
            del self._workers[machine_id]
            await self._run_in_thread(self._remove_home, worker.home)

    def _not_orphans(self) -> frozenset[int]:
        pids = [worker.pid for worker in self._workers.values()]
        pids.append(self._server.pid if self._server is not None else None)
        return (self._preexisting_children or frozenset()).union(pid for pid in pids if pid is not None)

    async def pause(self, machine_id: str) -> None:
        """Stop the worker and its descendants with SIGSTOP."""
        pid = self._workers[machine_id].pid
        if pid is not None:
            process_tree.stop_tree(pid)

    async def resume(self, machine_id: str) -> None:
        """Continue the worker and its descendants with SIGCONT."""
        pid = self._workers[machine_id].pid
        if pid is not None:
            process_tree.continue_tree(pid)

    async def close(self) -> None:
        """End the fork server, and remove all directories."""
        if self._server is not None:
            await self._server.stop()
            # It may just have forked a worker whose start was cancelled.
            await process_tree.kill_descendants(self._reactor, self._not_orphans)
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
            if worker.pid is None or process_tree.children(worker.pid):
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
        command: Sequence[str] = FORK_SERVER,
        rate_limited: bool = False,
    ) -> None:
        self._processes = LocalProcesses(reactor, sandboxed=sandboxed, directory=directory, command=command)
        reactor.callWhenRunning(self._processes.prepare)
        super().__init__(reactor, wall_clock, self._processes, rate_limited=rate_limited)

    async def shutdown(self) -> None:
        """Kill all workers and remove all directories."""
        await super().shutdown()
        await self._processes.close()


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
