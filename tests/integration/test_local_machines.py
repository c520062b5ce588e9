"""Tests of local machines, with real workers or with programs that inspect their environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.task import deferLater

from bfaas.machines.api import MachineConfig, State
from bfaas.machines.local.host import examine_host
from bfaas.machines.local.processes import LocalMachines, LocalProcesses
from bfaas.machines.local.script_users import UID_RANGES
from bfaas.machines.local.state_directory import wipe
from bfaas.system import process_tree
from tests.support import machines_contract
from tests.support.hostile_worker import LoopbackTestCase, reactor
from tests.support.machines_contract import CONFIG, TTL
from tests.support.waiting import wait_until
from tests.support.workers import fork_server_for, watch_for_leftovers

if TYPE_CHECKING:
    from bfaas.machines.api import Machine

# A worker that leaves files that are hard to remove, writes its environment, and runs until it is killed.
MESSY_WORKER = """
import json, os, time
home = os.environ["HOME"]
os.chdir(home)
os.symlink({outside!r}, "link")
os.makedirs("a/b/c")
open("a/b/c/file", "w").close()
os.symlink({outside!r}, "a/b/link")
for path in ("a/b/c", "a/b", "a"):
    os.chmod(path, 0)
os.chmod(home, 0o500)
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
with open({report!r} + ".new", "w") as report:
    json.dump(dict(os.environ), report)
os.rename({report!r} + ".new", {report!r})
time.sleep(1000)
"""


def names(directory: Path | str) -> list[str] | None:
    """Return the names in a directory; None if it does not exist."""
    return [path.name for path in Path(directory).iterdir()] if Path(directory).exists() else None


class LocalMachinesContract(machines_contract.MachinesContract):
    def setUp(self) -> None:
        leftovers = watch_for_leftovers(self)
        machines = self.api = LocalMachines(reactor, self.wall, sandboxed=False)

        async def shut_down() -> None:
            await machines.shutdown()
            self.assertEqual([], leftovers())
            self.assertIs(None, machines._processes._state)

        self.addCleanup(lambda: Deferred.fromCoroutine(shut_down()))


class WorkerTests(LoopbackTestCase):
    """Real workers, in a sandbox and without."""

    async def _run_lifecycle(self, *, sandboxed: bool) -> None:
        leftovers = watch_for_leftovers(self)
        machines = LocalMachines(reactor, lambda: 0.0, sandboxed=sandboxed)
        self.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
        machine, lease = await machines.create("m", "ams", CONFIG, TTL)
        for _ in range(2):
            await machines.wait(machine, State.STARTED, 20)
            self.assertIn(b"200 OK", await self._get_health(machine))
            await machines.stop(machine.id, lease.nonce)
            await machines.wait(machine, State.STOPPED, 20)
            self.assertEqual([], leftovers())
            await machines.start(machine.id, lease.nonce)

    async def _get_health(self, machine: Machine) -> bytes:
        """Return the response to `/healthz`, as soon as the worker listens."""
        port = urlsplit(machine.url or "").port
        assert port is not None
        while True:
            try:
                peer = await self.call(
                    port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
            except ConnectError:
                await deferLater(reactor, 0.02)
                continue
            return await peer.receive_all()

    async def test_worker_serves_again_after_each_stop(self) -> None:
        await self._run_lifecycle(sandboxed=False)

    async def test_worker_serves_in_a_sandbox(self) -> None:
        if not examine_host().sandboxed:
            self.skipTest("bubblewrap does not work here")
        await self._run_lifecycle(sandboxed=True)


def with_command(test: LoopbackTestCase, *command: str) -> LocalMachines:
    """Return machines with this fork server. A process has no others, whose children they would kill."""
    machines = LocalMachines(reactor, lambda: 0.0, sandboxed=False, command=command)
    test.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
    return machines


class MissingProgramTests(LoopbackTestCase):
    async def test_machine_fails_if_its_program_does_not_exist(self) -> None:
        machines = with_command(self, "/no/such/program")
        machine, _ = await machines.create("m", "ams", MachineConfig("i"), TTL)

        await machines.wait(machine, State.FAILED, 20)


class ProcessTests(LoopbackTestCase):
    def setUp(self) -> None:
        self.leftovers = watch_for_leftovers(self)
        directory = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, directory)
        self.report = directory / "report"
        self.outside = directory / "outside"
        self.outside.mkdir(mode=0o750)
        (self.outside / "file").touch()
        program = MESSY_WORKER.format(outside=str(self.outside), report=str(self.report))
        self.machines = with_command(self, *fork_server_for(program))

    async def start_messy_worker(self) -> tuple[Machine, str, dict[str, str]]:
        """Create a machine, and wait until it has started. Return it, its nonce and its environment."""
        config = MachineConfig("i", {"PUBLIC": "key", "LANG": "C"})
        machine, lease = await self.machines.create("m", "ams", config, TTL)
        await wait_until(self.report.exists)
        await self.machines.wait(machine, State.STARTED, 20)
        return machine, lease.nonce, json.loads(self.report.read_text())

    async def test_environment_of_a_worker_has_its_home_and_config_only(self) -> None:
        os.environ["SECRET"] = "of the coordinator"
        self.addCleanup(os.environ.pop, "SECRET")

        machine, _, environment = await self.start_messy_worker()

        home = environment.pop("HOME")
        run_as = environment.pop("RUN_AS")
        self.assertEqual(os.geteuid() == 0, run_as.isdecimal() and int(run_as) in UID_RANGES[0])
        for name in ("PYTHONPATH", "PYTHONUSERBASE", "LC_CTYPE"):
            environment.pop(name, None)
        self.assertEqual(
            {
                "PATH": os.environ["PATH"],
                "LANG": "C",
                "FLY_MACHINE_ID": machine.id,
                "FLY_REGION": "ams",
                "SANDBOX": "",
                "PUBLIC": "key",
            },
            environment,
        )
        self.assertEqual({"link", "a"}, set(names(home) or ()))

    async def test_stop_wipes_the_home_and_nothing_outside(self) -> None:
        machine, nonce, environment = await self.start_messy_worker()
        for _ in range(2):
            self.report.unlink()
            await self.machines.stop(machine.id, nonce)
            await self.machines.wait(machine, State.STOPPED, 20)

            self.assertIs(None, names(environment["HOME"]))
            self.assertEqual(["file"], names(self.outside))
            self.assertEqual(0o750, self.outside.stat().st_mode & 0o777)
            self.assertEqual([], self.leftovers())
            # The worker fails unless its home is empty.
            await self.machines.start(machine.id, nonce)
            await wait_until(self.report.exists)

    def test_directories_without_permissions_are_wiped(self) -> None:
        home = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, home)
        innermost = home / "a" / "b" / "c"
        innermost.mkdir(parents=True)
        (innermost / "file").touch()
        is_root = os.geteuid() == 0
        for directory in (innermost, *innermost.parents[:3]):
            if is_root:
                os.chown(directory, 65534, 65534)
            if directory != home:
                directory.chmod(0)
        if is_root:  # which needs no permissions
            os.seteuid(65534)
        try:
            wipe(home / "a")
        finally:
            if is_root:
                os.seteuid(0)

        self.assertEqual([], names(home))

    async def test_processes_of_a_suspended_machine_are_stopped(self) -> None:
        machine, nonce, _ = await self.start_messy_worker()
        processes = self.leftovers()
        self.assertEqual(2, len(processes))

        await self.machines.suspend(machine.id, nonce)
        await self.machines.wait(machine, State.SUSPENDED, 20)
        await wait_until(lambda: all(process.state == "T" for process in self.leftovers()))
        await self.machines.start(machine.id, nonce)
        await self.machines.wait(machine, State.STARTED, 20)
        await wait_until(lambda: not any(process.state == "T" for process in self.leftovers()))

        self.assertTrue(any(map(process_tree.is_running, processes)))

    async def test_machine_stops_when_its_worker_ends(self) -> None:
        machine, nonce, environment = await self.start_messy_worker()
        for suspended in (False, True):
            if suspended:
                await self.machines.start(machine.id, nonce)
                await wait_until(self.report.exists)
                await self.machines.wait(machine, State.STARTED, 20)
                await self.machines.suspend(machine.id, nonce)
            self.report.unlink()
            for process in self.leftovers():
                os.kill(process.pid, signal.SIGKILL)

            await self.machines.wait(machine, State.STOPPED, 20)
            self.assertIs(None, names(environment["HOME"]))

    async def test_shutdown_waits_for_a_stop_in_progress(self) -> None:
        machine, nonce, environment = await self.start_messy_worker()
        pid = self.machines._processes._workers[machine.id].pid
        await self.machines.stop(machine.id, nonce)
        self.assertIs(State.STOPPING, (await self.machines.get(machine.id)).state)

        await self.machines.shutdown()

        self.assertEqual([], self.leftovers())
        self.assertIs(None, names(f"/proc/{pid}"))
        self.assertIs(None, names(Path(environment["HOME"]).parent.parent))

    async def test_failed_start_leaves_nothing_that_prevents_the_next(self) -> None:
        class ReactorWithoutProcesses:
            def spawnProcess(self, *_: object, **__: object) -> None:
                raise BlockingIOError("no more processes")

            def __getattr__(self, name: str) -> Any:
                return getattr(reactor, name)

        processes = LocalProcesses(ReactorWithoutProcesses(), sandboxed=False)
        self.addCleanup(processes.close)
        machine, _ = await self.machines.create("m", "ams", MachineConfig("i"), TTL)
        for _ in range(2):
            with self.assertRaises(BlockingIOError):
                await processes.start(machine, MachineConfig("i"), lambda: None)
