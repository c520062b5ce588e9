"""Hostile scripts against real workers: each has its only possible outcome, and the worker exits normally."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any
from unittest import SkipTest, skipUnless
from urllib.parse import urlsplit

from twisted.application.strports import service as listening
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.trial.unittest import TestCase
from twisted.web.client import ResponseFailed

from bfaas.coord import CoordService
from bfaas.coordinator.app import Coordinator
from bfaas.coordinator.run_tracker import RunTracker
from bfaas.coordinator.worker_client import WorkerClient
from bfaas.http.server import BoundedSite
from bfaas.machines.api import MachineConfig, State
from bfaas.machines.local.host import FORK_SERVER, examine_host
from bfaas.machines.local.processes import LocalMachines
from bfaas.pool import Pool
from bfaas.pooling.config import pool_config
from bfaas.settings import CoordSettings
from bfaas.system import process_tree
from tests.support.hostile_scripts import (
    AS_ANOTHER_USER,
    IN_A_SANDBOX,
    ON_THE_HOST,
    SECRET,
    SNOOPING,
    HostileScript,
)
from tests.support.network import free_port
from tests.support.waiting import wait_until
from tests.support.workers import KEYS, LIMIT, Worker, auth_token, reactor, watch_for_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.machines.api import Machine
    from tests.support.responses import Response

_UID = 1_947_000
"""The first of many ids without a user: each script has its own, so that its processes are counted alone."""

# Small, so that scripts that use all they can use little.
LIMITS = ("prlimit", "--nproc=64:64", f"--fsize={4 << 20}:{4 << 20}", "--")
MEMORY_KB = 8 << 10
LINES = 10

needs_root = skipUnless(os.geteuid() == 0, "only root can run scripts as another user")


def leaders_for_all(uid: int) -> tuple[str, ...]:
    """Return the prefix that starts even the worker as another user, or skip the test."""
    leaders = (*LIMITS, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--")
    completed = subprocess.run([*leaders, sys.executable, "-c", "import bfaas.basher"], check=False)
    if completed.returncode != 0:
        raise SkipTest("another user cannot run this Python")
    return leaders


def make_home(test: TestCase, uid: int) -> Path:
    """Create a home with a secret file, a socket and a setuid program of root."""
    home = Path(tempfile.mkdtemp())
    test.addCleanup(shutil.rmtree, home, ignore_errors=True)
    (home / "secret").write_text(SECRET)
    (home / "secret").chmod(0o600)
    with socket.socket(socket.AF_UNIX) as api:
        api.bind(str(home / "api"))
        api.listen()
        test.addCleanup(api.detach)
    (home / "api").chmod(0o600)
    shutil.copy("/usr/bin/id", home / "setuid")
    (home / "setuid").chmod(0o4755)
    os.chown(home, uid, uid)
    return home


def time_limit(case: HostileScript) -> str:
    """Return the time limit of a run: scripts that exit by themselves have time for it on a busy machine."""
    return "2s" if case.endless else "60s"


def check(test: TestCase, case: HostileScript, response: Response, uid: int) -> None:
    """Compare a response with the expected outcome."""
    test.assertEqual(200, response.status, response.body)
    exit_ = response.exit
    outputs = (response.output("stdout")[:500], response.output("stderr")[:500])
    expected = (124, None, "timeout") if case.endless else (case.code, case.signal, None)
    test.assertEqual(expected, (exit_["code"], exit_.get("signal"), exit_.get("reason")), outputs)
    if case.out is not None:
        test.assertEqual(case.out.replace("UID", str(uid)), response.output("stdout"), outputs)
    test.assertEqual(case.oom, exit_.get("oom", False))
    test.assertEqual(case.truncated, exit_.get("truncated", False))
    test.assertEqual(case.truncated, exit_.get("dropped_bytes", 0) > 0)
    test.assertNotIn(SECRET.encode(), response.body)


class HostileTestCase(TestCase):
    timeout = 2 * LIMIT

    async def run_on(self, case: HostileScript, worker: Worker, uid: int) -> None:
        """Run a hostile script on a worker, which then exits."""
        await worker.fetch("GET", "/healthz")
        peaks = [worker.peak_kb]
        watching = LoopingCall(lambda: peaks.append(worker.peak_kb))
        watching.start(0.02)
        try:
            response = await worker.run(case.script.replace("PORT", str(worker.port)))
            self.assertEqual(0, await worker.ended(), worker.errors)
        finally:
            watching.stop()
        check(self, case, response, uid)
        self.assertLess(max(peaks) - peaks[0], MEMORY_KB)
        log = (worker.output + worker.errors).decode().splitlines()
        self.assertLessEqual(len(log), LINES, log)
        self.assertNotIn("Traceback", "\n".join(log))


@needs_root
class AsAnotherUserTests(HostileTestCase):
    """A worker that is root, as in the image, and scripts of another user."""

    async def run_case(self, case: HostileScript, number: int) -> None:
        if shutil.which(case.needs) is None:
            self.skipTest(f"{case.needs} is not installed")
        uid = _UID + number
        worker = await Worker.start(
            self,
            leaders=(*LIMITS, "setpriv", "--groups=0,4", "--"),
            RUN_AS=str(uid),
            HOME=str(make_home(self, uid)),
            MAXREQTIME=time_limit(case),
            MAXOUTPUT=case.max_output,
            SECRET=SECRET,
        )
        await self.run_on(case, worker, uid)


@needs_root
class ShortageTests(HostileTestCase):
    """A worker on a machine without enough disk or memory."""

    async def start(self, home: Path) -> Worker:
        return await Worker.start(self, RUN_AS=str(_UID), HOME=str(home), MAXREQTIME="60s")

    async def test_a_script_that_fills_the_disk_does_not_affect_its_worker(self) -> None:
        home = make_home(self, _UID)
        mount_small(self, home, _UID)
        script = "for i in {1..200}; do echo >f$i || break; done; head -c 8M /dev/zero >>f1; echo $?"
        await self.run_on(HostileScript("fills_the_disk", script, out="1\n"), await self.start(home), _UID)

    async def test_linux_kills_the_script_and_not_its_worker_when_memory_runs_out(self) -> None:
        group = make_memory_group(self, 200 << 20)
        # The first is the largest process; each process of the second is much smaller than the worker.
        many = "(x=$(head -c 12000000 /dev/zero | tr '\\0' x); sleep 1000) &"
        for case in (
            HostileScript(
                "takes_all_memory",
                "hog=$(tr '\\0' x </dev/zero); exit 0",
                code=137,
                signal="SIGKILL",
                oom=True,
            ),
            HostileScript("takes_all_memory_in_a_child", "tail /dev/zero; exit $?", code=137, oom=True),
            HostileScript(
                "takes_all_memory_in_bits",
                f"for i in {{1..30}}; do {many} done; wait -n; echo $?",
                out="137\n",
            ),
        ):
            worker = await self.start(make_home(self, _UID))
            (group / "cgroup.procs").write_text(str(worker.pid))
            await self.run_on(case, worker, _UID)


def mount_small(test: TestCase, directory: Path, uid: int) -> None:
    """Mount a file system for 2 MB and 100 files, or skip the test."""
    options = f"size=2m,nr_inodes=100,uid={uid},mode=700"
    command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
    if subprocess.run(command, check=False).returncode != 0:
        raise SkipTest("mounting is not permitted")
    test.addCleanup(lambda: subprocess.run(["umount", "-l", directory], check=True))


def make_memory_group(test: TestCase, limit: int) -> Path:
    """Create a control group with a memory limit, or skip the test."""
    roots = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
    for root, name in roots.items():
        group = root / f"bfaas-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        test.addCleanup(group.rmdir)
        if (group / name).exists():
            (group / name).write_text(str(limit))
            return group
    raise SkipTest("no control group for memory can be created")


@needs_root
class AsTheSameUserTests(HostileTestCase):
    """A worker without RUN_AS that is not root."""

    def setUp(self) -> None:
        self.leaders = leaders_for_all(_UID)

    async def start(self, run_as: str = "") -> Worker:
        home = str(make_home(self, _UID))
        return await Worker.start(
            self, leaders=self.leaders, up=not run_as, HOME=home, SECRET=SECRET, RUN_AS=run_as
        )

    async def test_snooping_reveals_nothing(self) -> None:
        for case in SNOOPING:
            await self.run_on(case, await self.start(), _UID)

    async def test_a_script_that_kills_its_worker_breaks_the_response_off(self) -> None:
        known = frozenset(process_tree.children(os.getpid()))
        for script in ("kill -9 -1", "kill -9 $PPID"):
            worker = await self.start()
            reader = await worker.stream(f"echo up; sleep 0.3; {script}; sleep 1000")
            await reader.finished
            self.assertEqual(-9, await worker.ended())
            self.assertIn(b"up", reader.data)
            self.assertNotIn(b"exit", reader.data)
            # A machine would stop with its worker. Here, remaining processes become children of this one.
            self.assertEqual(0, await process_tree.kill_descendants(reactor, lambda: known, LIMIT))

    async def test_another_user_is_a_start_error(self) -> None:
        worker = await self.start(run_as="nobody")
        self.assertEqual(1, await worker.ended())
        self.assertEqual(b"bfaas-basher: RUN_AS: only root can run scripts as another user\n", worker.errors)


class MachineTestCase(HostileTestCase):
    """Machines of this host, with their workers."""

    honest_script = "ls -A; touch x && echo fine"

    def machines(
        self, *, sandboxed: bool, command: tuple[str, ...] = (*LIMITS, *FORK_SERVER)
    ) -> LocalMachines:
        self.leftovers = watch_for_leftovers(self)
        machines = LocalMachines(reactor, lambda: 0.0, sandboxed=sandboxed, command=command)
        self.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
        return machines

    async def run_script(self, machine: Machine, script: str) -> Response:
        worker = Worker(urlsplit(machine.url or "").port or 0)
        await wait_until(lambda: worker.listens, "a worker listens")
        script = script.replace("PORT", str(worker.port))
        return await worker.fetch("POST", "/run", script.encode(), auth_token(machine.id))

    async def assert_serves_again(self, machines: LocalMachines, machine: Machine, nonce: str) -> None:
        """Wait until the machine stops by itself, without leftovers, and starts and serves again."""
        await machines.wait(machine, State.STOPPED, LIMIT)
        self.assertEqual([], self.leftovers())
        await machines.start(machine.id, nonce)
        await machines.wait(machine, State.STARTED, LIMIT)
        response = await self.run_script(machine, self.honest_script)
        self.assertEqual(("fine\n", 0), (response.output("stdout"), response.exit["code"]))
        await machines.wait(machine, State.STOPPED, LIMIT)
        self.assertEqual([], self.leftovers())

    async def run_on_machine(self, machines: LocalMachines, case: HostileScript, **env: str) -> None:
        """Run a hostile script on a machine, and then an honest one."""
        common = {"PUBLIC": KEYS.public, "MAXREQTIME": time_limit(case), "SECRET": SECRET}
        machine, lease = await machines.create(case.name, "ams", MachineConfig("i", common | env), 600)
        check(self, case, await self.run_script(machine, case.script), os.geteuid())
        await self.assert_serves_again(machines, machine, lease.nonce)


class SandboxTests(MachineTestCase):
    def setUp(self) -> None:
        if not examine_host().sandboxed:
            self.skipTest("bubblewrap does not work here")

    async def run_case(self, case: HostileScript, _: int) -> None:
        await self.run_on_machine(self.machines(sandboxed=True), case)


@needs_root
class HostTests(MachineTestCase):
    """
    Machines without a sandbox.

    Scripts do not run as the user `nobody`, which may have other processes on this host.
    """

    honest_script = "echo fine"

    async def run_case(self, case: HostileScript, number: int) -> None:
        uid = _UID + number
        home = str(make_home(self, uid))
        await self.run_on_machine(self.machines(sandboxed=False), case, RUN_AS=str(uid), HOME=home)

    async def test_a_script_that_kills_its_worker_is_killed_itself(self) -> None:
        machines = self.machines(sandboxed=False, command=(*leaders_for_all(_UID), *FORK_SERVER))
        env = {"PUBLIC": KEYS.public, "RUN_AS": "", "HOME": str(make_home(self, _UID))}
        machine, _ = await machines.create("m", "ams", MachineConfig("i", env), 600)
        with self.assertRaises(ResponseFailed):
            await self.run_script(machine, "setsid sleep 1000 & sleep 0.3; kill -9 $PPID; sleep 1000")
        await machines.wait(machine, State.STOPPED, LIMIT)
        self.assertEqual([], self.leftovers())


@needs_root
class CoordinatorTests(HostileTestCase):
    async def test_a_script_that_kills_its_worker_is_a_lost_worker_and_the_next_run_succeeds(self) -> None:
        leaders = leaders_for_all(_UID)
        leftovers = watch_for_leftovers(self)
        machines = LocalMachines(reactor, time.time, sandboxed=False, command=(*leaders, *FORK_SERVER))
        coordinator = Worker(free_port())
        service = compose(machines, coordinator.port, {"RUN_AS": "", "HOME": str(make_home(self, _UID))})
        service.startService()
        try:
            for kill in ("kill -9 -1", "kill -9 $PPID"):
                script = f"echo up; sleep 0.3; {kill}; sleep 1000"
                lost = await coordinator.fetch("POST", "/run", script.encode())
                self.assertEqual("up\n", lost.output("stdout"))
                self.assertEqual((125, "worker-lost"), (lost.exit["code"], lost.exit["reason"]))
                response = await coordinator.fetch("POST", "/run", b"echo fine")
                self.assertEqual("fine\n", response.output("stdout"))
        finally:
            await service.stopService()
        self.assertEqual([], leftovers())

    async def test_a_script_that_cannot_be_started_is_an_error(self) -> None:
        machines = LocalMachines(reactor, time.time, sandboxed=False)
        coordinator = Worker(free_port())
        env = {"RUN_AS": "", "HOME": str(make_home(self, 0)), "SANDBOX": "sh -c 'exit 127' sh"}
        service = compose(machines, coordinator.port, env)
        service.startService()
        try:
            for query in ("", "?raw=1"):
                response = await coordinator.fetch("POST", "/run" + query, b"echo never")
                self.assertEqual(
                    (502, b"the worker could not start the script\n"), (response.status, response.body)
                )
            status = await coordinator.fetch("GET", "/status")
            self.assertEqual(2, status.body.count(b'"outcome": "not-started"'), status.body)
        finally:
            await service.stopService()


def compose(machines: LocalMachines, port: int, env: dict[str, str]) -> CoordService:
    """Build a coordinator as `bfaas.coord` does, with more variables in the environment of its workers."""
    settings = CoordSettings.from_environment({"WORKER_APP": "mock", "MAXREQTIME": "20s", "POOLSIZE": "1"})
    proxy = WorkerClient(reactor, None, settings.max_output)
    config = pool_config(settings)
    template = replace(config.template, env={**config.template.env, **env})
    pool = Pool(machines, proxy, reactor, SystemRandom(), replace(config, template=template))
    coordinator = Coordinator(
        reactor,
        settings,
        pool,
        proxy,
        time.time,
        RunTracker(reactor, time.time, SystemRandom()),
        sandbox="none",
    )
    site = BoundedSite(reactor, coordinator.app.resource(), settings.max_body)
    listener = listening(f"tcp:{port}:interface=127.0.0.1", site, reactor)
    return CoordService(coordinator, site, listener, pool, machines.shutdown)


def _add_tests(tests: type[TestCase], cases: tuple[HostileScript, ...]) -> None:
    def make(case: HostileScript, number: int) -> Callable[[Any], Any]:
        async def test(self: Any) -> None:
            await self.run_case(case, number)

        return test

    for number, case in enumerate(cases):
        setattr(tests, f"test_a_script_that_{case.name}", make(case, number))


_add_tests(AsAnotherUserTests, AS_ANOTHER_USER)
_add_tests(SandboxTests, IN_A_SANDBOX)
_add_tests(HostTests, ON_THE_HOST)
