"""Machines that are processes of this host, with real workers or with programs that look around."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.task import deferLater

from bfaas.machines.api import MachineConfig, State
from bfaas.machines.local.host import can_sandbox
from bfaas.machines.local.processes import LocalMachines, LocalProcesses
from bfaas.machines.local.script_users import RANGES
from bfaas.machines.local.state_directory import wipe
from bfaas.system import process_tree
from tests.support import machines_contract
from tests.support.hostile_worker import LoopbackTestCase, reactor
from tests.support.machines_contract import CONFIG, TTL
from tests.support.waiting import wait_until
from tests.support.workers import watch_for_leftovers

if TYPE_CHECKING:
    from bfaas.machines.api import Machine

# Leaves everything that is hard to remove, tells its environment, stays until it is killed.
MESSY = """
import json, os, time
home = os.environ["HOME"]
os.chdir(home)
os.symlink({outside!r}, "link")
os.makedirs("a/b/c")
open("a/b/c/file", "w").close()
os.symlink({outside!r}, "a/b/link")
for place in ("a/b/c", "a/b", "a"):
    os.chmod(place, 0)
os.chmod(home, 0o500)
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
with open({told!r} + ".new", "w") as told:
    json.dump(dict(os.environ), told)
os.rename({told!r} + ".new", {told!r})
time.sleep(1000)
"""


def names(place: Path | str) -> list[str] | None:
    """What is in a directory; None where there is no such."""
    return [below.name for below in Path(place).iterdir()] if Path(place).exists() else None


class LocalMachinesContract(machines_contract.MachinesContract):
    def setUp(self) -> None:
        left = watch_for_leftovers(self)
        machines = self.api = LocalMachines(reactor, self.wall, sandboxed=False)

        async def shut_down() -> None:
            await machines.shutdown()
            self.assertEqual([], left())
            self.assertIs(None, machines._processes._state)

        self.addCleanup(lambda: Deferred.fromCoroutine(shut_down()))


class WorkerTests(LoopbackTestCase):
    """What real workers do, in a sandbox and without."""

    async def _run_lifecycle(self, *, sandboxed: bool) -> None:
        left = watch_for_leftovers(self)
        machines = LocalMachines(reactor, lambda: 0.0, sandboxed=sandboxed)
        self.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
        machine, lease = await machines.create("m", "ams", CONFIG, TTL)
        for _ in range(2):
            await machines.wait(machine, State.STARTED, 20)
            self.assertIn(b"200 OK", await self._ask(machine))
            await machines.stop(machine.id, lease.nonce)
            await machines.wait(machine, State.STOPPED, 20)
            self.assertEqual([], left())
            await machines.start(machine.id, lease.nonce)

    async def _ask(self, machine: Machine) -> bytes:
        """Ask a worker how it is, as soon as it listens."""
        port = urlsplit(machine.url or "").port
        assert port is not None
        while True:
            try:
                peer = await self.call(
                    port, b"GET /healthz HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n"
                )
            except ConnectError:
                await deferLater(reactor, 0.02)
                continue
            return await peer.hear_out()

    async def test_a_worker_serves_again_after_each_stop(self) -> None:
        await self._run_lifecycle(sandboxed=False)

    async def test_a_worker_serves_in_a_sandbox(self) -> None:
        if not can_sandbox():
            self.skipTest("bubblewrap does not work here")
        await self._run_lifecycle(sandboxed=True)


class BodyTests(LoopbackTestCase):
    def setUp(self) -> None:
        self.left = watch_for_leftovers(self)
        place = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, place)
        self.told = place / "told"
        self.outside = place / "outside"
        self.outside.mkdir(mode=0o750)
        (self.outside / "precious").touch()
        program = MESSY.format(outside=str(self.outside), told=str(self.told))
        self.machines = self.with_command(sys.executable, "-c", program)

    def with_command(self, *command: str) -> LocalMachines:
        machines = LocalMachines(reactor, lambda: 0.0, sandboxed=False, command=command)
        self.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
        return machines

    async def messed(self) -> tuple[Machine, str, dict[str, str]]:
        """Make a machine, and wait until it has made its mess; tell its environment too."""
        config = MachineConfig("i", {"PUBLIC": "key", "LANG": "C"})
        machine, lease = await self.machines.create("m", "ams", config, TTL)
        await wait_until(self.told.exists)
        return machine, lease.nonce, json.loads(self.told.read_text())

    async def test_a_worker_has_a_home_and_its_config_and_nothing_else_in_its_environment(self) -> None:
        os.environ["SECRET"] = "of the coordinator"
        self.addCleanup(os.environ.pop, "SECRET")

        machine, _, environment = await self.messed()

        home = environment.pop("HOME")
        run_as = environment.pop("RUN_AS")
        self.assertEqual(os.geteuid() == 0, run_as.isdecimal() and int(run_as) in RANGES[0])
        for dull in ("PYTHONPATH", "PYTHONUSERBASE", "LC_CTYPE"):
            environment.pop(dull, None)
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

    async def test_a_stop_wipes_the_home_and_nothing_beyond_it(self) -> None:
        machine, nonce, environment = await self.messed()
        for _ in range(2):
            self.told.unlink()
            await self.machines.stop(machine.id, nonce)
            await self.machines.wait(machine, State.STOPPED, 20)

            self.assertIs(None, names(environment["HOME"]))
            self.assertEqual(["precious"], names(self.outside))
            self.assertEqual(0o750, self.outside.stat().st_mode & 0o777)
            self.assertEqual([], self.left())
            # It finds an empty home, or it would fail.
            await self.machines.start(machine.id, nonce)
            await wait_until(self.told.exists)

    def test_what_a_script_closed_to_itself_is_wiped(self) -> None:
        home = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, home)
        inmost = home / "a" / "b" / "c"
        inmost.mkdir(parents=True)
        (inmost / "file").touch()
        root = os.geteuid() == 0
        for place in (inmost, *inmost.parents[:3]):
            if root:
                os.chown(place, 65534, 65534)
            if place != home:
                place.chmod(0)
        if root:  # who may do everything
            os.seteuid(65534)
        try:
            wipe(home / "a")
        finally:
            if root:
                os.seteuid(0)

        self.assertEqual([], names(home))

    async def test_a_suspended_machine_stands_still(self) -> None:
        machine, nonce, _ = await self.messed()
        processes = self.left()
        self.assertEqual(2, len(processes))

        await self.machines.suspend(machine.id, nonce)
        await self.machines.wait(machine, State.SUSPENDED, 20)
        await wait_until(lambda: all(process.state == "T" for process in self.left()))
        await self.machines.start(machine.id, nonce)
        await self.machines.wait(machine, State.STARTED, 20)
        await wait_until(lambda: not any(process.state == "T" for process in self.left()))

        self.assertTrue(any(map(process_tree.is_running, processes)))

    async def test_a_machine_stops_when_its_worker_ends(self) -> None:
        machine, nonce, environment = await self.messed()
        for suspended in (False, True):
            if suspended:
                await self.machines.start(machine.id, nonce)
                await wait_until(self.told.exists)
                await self.machines.suspend(machine.id, nonce)
            self.told.unlink()
            for process in self.left():
                os.kill(process.pid, signal.SIGKILL)

            await self.machines.wait(machine, State.STOPPED, 20)
            self.assertIs(None, names(environment["HOME"]))

    async def test_a_program_that_is_not_there_ends_at_once(self) -> None:
        machines = self.with_command("/there/is/no/such/program")
        machine, _ = await machines.create("m", "ams", MachineConfig("i"), TTL)

        await machines.wait(machine, State.STOPPED, 20)

    async def test_shutdown_waits_for_a_stop_that_is_under_way(self) -> None:
        machine, nonce, environment = await self.messed()
        pid = self.machines._processes._workers[machine.id].transport.pid
        await self.machines.stop(machine.id, nonce)
        self.assertIs(State.STOPPING, (await self.machines.get(machine.id)).state)

        await self.machines.shutdown()

        self.assertEqual([], self.left())
        self.assertIs(None, names(f"/proc/{pid}"))
        self.assertIs(None, names(Path(environment["HOME"]).parent.parent))

    async def test_a_worker_that_cannot_be_started_can_be_later(self) -> None:
        class Exhausted:
            def spawnProcess(self, *_: object, **__: object) -> None:
                raise BlockingIOError("no more processes")

            def __getattr__(self, name: str) -> Any:
                return getattr(reactor, name)

        bodies = LocalProcesses(Exhausted(), sandboxed=False)
        self.addCleanup(bodies.close)
        machine, _ = await self.machines.create("m", "ams", MachineConfig("i"), TTL)
        for _ in range(2):
            with self.assertRaises(BlockingIOError):
                await bodies.start(machine, MachineConfig("i"), lambda: None)
