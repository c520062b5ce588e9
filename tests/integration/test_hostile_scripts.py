"""Hostile scripts against real workers: each has its one ending, and the worker ends in order."""

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
from bfaas.machines.local.host import WORKER_COMMAND, can_sandbox
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
    Hostile,
)
from tests.support.network import free_port
from tests.support.waiting import wait_until
from tests.support.workers import KEYS, LIMIT, Worker, auth_token, reactor, watch_for_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.machines.api import Machine
    from tests.support.responses import Response

_UID = 1_947_000
"""The first of many numbers that no user has: scripts are each somebody else, and counted alone."""

# Small ones, so that a script that takes all it may takes little.
LIMITS = ("prlimit", "--nproc=64:64", f"--fsize={4 << 20}:{4 << 20}", "--")
MEMORY_KB = 8 << 10
LINES = 10

needs_root = skipUnless(os.geteuid() == 0, "only root can run scripts as another user")


def leaders_for_all(uid: int) -> tuple[str, ...]:
    """Make the words that start even the worker as another user; skip the test where that cannot be."""
    leaders = (*LIMITS, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--")
    tried = subprocess.run([*leaders, sys.executable, "-c", "import bfaas.basher"], check=False)
    if tried.returncode != 0:
        raise SkipTest("another user cannot run this Python")
    return leaders


def make_home(test: TestCase, uid: int) -> Path:
    """Make a home, with what is root's alone and a setuid program in it."""
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


def time_of(case: Hostile) -> str:
    """Say how long a run may take: one that ends by itself has time to do so on a busy machine."""
    return "2s" if case.endless else "60s"


def check(test: TestCase, case: Hostile, answer: Response, uid: int) -> None:
    """Compare an answer with what a case expects."""
    test.assertEqual(200, answer.status, answer.body)
    exit_ = answer.exit
    said = (answer.output("stdout")[:500], answer.output("stderr")[:500])
    expected = (124, None, "timeout") if case.endless else (case.code, case.signal, None)
    test.assertEqual(expected, (exit_["code"], exit_.get("signal"), exit_.get("reason")), said)
    if case.out is not None:
        test.assertEqual(case.out.replace("UID", str(uid)), answer.output("stdout"), said)
    test.assertEqual(case.truncated, exit_.get("truncated", False))
    test.assertEqual(case.truncated, exit_.get("dropped_bytes", 0) > 0)
    test.assertNotIn(SECRET.encode(), answer.body)


class HostileTestCase(TestCase):
    timeout = 2 * LIMIT

    async def face(self, case: Hostile, worker: Worker, uid: int) -> None:
        """Have a worker run a hostile script, and end."""
        await worker.fetch("GET", "/healthz")
        peaks = [worker.peak_kb]
        watching = LoopingCall(lambda: peaks.append(worker.peak_kb))
        watching.start(0.02)
        try:
            answer = await worker.run(case.script.replace("PORT", str(worker.port)))
            self.assertEqual(0, await worker.ended(), worker.errors)
        finally:
            watching.stop()
        check(self, case, answer, uid)
        self.assertLess(max(peaks) - peaks[0], MEMORY_KB)
        log = (worker.output + worker.errors).decode().splitlines()
        self.assertLessEqual(len(log), LINES, log)
        self.assertNotIn("Traceback", "\n".join(log))


@needs_root
class AsAnotherUserTests(HostileTestCase):
    """A worker that is root, as in the image, and scripts that are not."""

    async def run_case(self, case: Hostile, number: int) -> None:
        if shutil.which(case.needs) is None:
            self.skipTest(f"{case.needs} is not installed")
        uid = _UID + number
        worker = await Worker.start(
            self,
            leaders=(*LIMITS, "setpriv", "--groups=0,4", "--"),
            RUN_AS=str(uid),
            HOME=str(make_home(self, uid)),
            MAXREQTIME=time_of(case),
            MAXOUTPUT=case.max_output,
            SECRET=SECRET,
        )
        await self.face(case, worker, uid)


@needs_root
class WantTests(HostileTestCase):
    """A worker whose machine has too little of something."""

    async def start(self, home: Path) -> Worker:
        return await Worker.start(self, RUN_AS=str(_UID), HOME=str(home), MAXREQTIME="60s")

    async def test_a_script_that_fills_the_disk_does_not_harm_its_worker(self) -> None:
        home = make_home(self, _UID)
        mount_small(self, home, _UID)
        script = "for i in {1..200}; do echo >f$i || break; done; head -c 8M /dev/zero >>f1; echo $?"
        await self.face(Hostile("fills_the_disk", script, out="1\n"), await self.start(home), _UID)

    async def test_out_of_memory_the_script_dies_and_not_its_worker(self) -> None:
        group = make_memory_group(self, 200 << 20)
        # The first has the most memory; of the second's processes each has far less than the worker.
        many = "(x=$(head -c 12000000 /dev/zero | tr '\\0' x); sleep 1000) &"
        for case in (
            Hostile("takes_all_memory", "hog=$(tr '\\0' x </dev/zero); exit 0", code=137, signal="SIGKILL"),
            Hostile(
                "takes_all_memory_in_bits",
                f"for i in {{1..30}}; do {many} done; wait -n; echo $?",
                out="137\n",
            ),
        ):
            worker = await self.start(make_home(self, _UID))
            (group / "cgroup.procs").write_text(str(worker.pid))
            await self.face(case, worker, _UID)


def mount_small(test: TestCase, place: Path, uid: int) -> None:
    """Mount a file system of 2 MB and 100 files; skip the test where that cannot be done."""
    options = f"size=2m,nr_inodes=100,uid={uid},mode=700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False).returncode != 0:
        raise SkipTest("nothing may be mounted here")
    test.addCleanup(lambda: subprocess.run(["umount", "-l", place], check=True))


def make_memory_group(test: TestCase, limit: int) -> Path:
    """Make a control group with little memory; skip the test where that cannot be done."""
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
    raise SkipTest("no control group for memory can be made here")


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

    async def test_snooping_tells_nothing(self) -> None:
        for case in SNOOPING:
            await self.face(case, await self.start(), _UID)

    async def test_a_script_that_kills_its_worker_breaks_the_answer_off(self) -> None:
        known = frozenset(process_tree.children(os.getpid()))
        for script in ("kill -9 -1", "kill -9 $PPID"):
            worker = await self.start()
            reader = await worker.stream(f"echo up; sleep 0.3; {script}; sleep 1000")
            await reader.finished
            self.assertEqual(-9, await worker.ended())
            self.assertIn(b"up", reader.data)
            self.assertNotIn(b"exit", reader.data)
            # A machine would stop with its worker. Here, what it leaves falls to us.
            self.assertEqual(0, await process_tree.kill_descendants(reactor, lambda: known, LIMIT))

    async def test_another_user_is_refused_at_the_start(self) -> None:
        worker = await self.start(run_as="nobody")
        self.assertEqual(1, await worker.ended())
        self.assertEqual(b"bfaas-basher: RUN_AS: only root can run scripts as another user\n", worker.errors)


class MachineTestCase(HostileTestCase):
    """Machines of this host, with their workers."""

    honest = "ls -A; touch x && echo fine"

    def machines(
        self, *, sandboxed: bool, command: tuple[str, ...] = (*LIMITS, *WORKER_COMMAND)
    ) -> LocalMachines:
        self.left = watch_for_leftovers(self)
        machines = LocalMachines(reactor, lambda: 0.0, sandboxed=sandboxed, command=command)
        self.addCleanup(lambda: Deferred.fromCoroutine(machines.shutdown()))
        return machines

    async def ask(self, machine: Machine, script: str) -> Response:
        worker = Worker(urlsplit(machine.url or "").port or 0)
        await wait_until(lambda: worker.listens, "a worker listens")
        script = script.replace("PORT", str(worker.port))
        return await worker.fetch("POST", "/run", script.encode(), auth_token(machine.id))

    async def serve_again(self, machines: LocalMachines, machine: Machine, nonce: str) -> None:
        """Wait until the machine stops by itself; then nothing is left, and it serves the next."""
        await machines.wait(machine, State.STOPPED, LIMIT)
        self.assertEqual([], self.left())
        await machines.start(machine.id, nonce)
        await machines.wait(machine, State.STARTED, LIMIT)
        answer = await self.ask(machine, self.honest)
        self.assertEqual(("fine\n", 0), (answer.output("stdout"), answer.exit["code"]))
        await machines.wait(machine, State.STOPPED, LIMIT)
        self.assertEqual([], self.left())

    async def face_on(self, machines: LocalMachines, case: Hostile, **env: str) -> None:
        """Have a machine run a hostile script, and then an honest one."""
        common = {"PUBLIC": KEYS.public, "MAXREQTIME": time_of(case), "SECRET": SECRET}
        machine, lease = await machines.create(case.name, "ams", MachineConfig("i", common | env), 600)
        check(self, case, await self.ask(machine, case.script), os.geteuid())
        await self.serve_again(machines, machine, lease.nonce)


class SandboxTests(MachineTestCase):
    def setUp(self) -> None:
        if not can_sandbox():
            self.skipTest("bubblewrap does not work here")

    async def run_case(self, case: Hostile, _: int) -> None:
        await self.face_on(self.machines(sandboxed=True), case)


@needs_root
class HostTests(MachineTestCase):
    """Without a sandbox, and not as nobody, who may have processes of its own here."""

    honest = "echo fine"

    async def run_case(self, case: Hostile, number: int) -> None:
        uid = _UID + number
        home = str(make_home(self, uid))
        await self.face_on(self.machines(sandboxed=False), case, RUN_AS=str(uid), HOME=home)

    async def test_a_script_that_kills_its_worker_is_killed_itself(self) -> None:
        machines = self.machines(sandboxed=False, command=(*leaders_for_all(_UID), *WORKER_COMMAND))
        env = {"PUBLIC": KEYS.public, "RUN_AS": "", "HOME": str(make_home(self, _UID))}
        machine, _ = await machines.create("m", "ams", MachineConfig("i", env), 600)
        with self.assertRaises(ResponseFailed):
            await self.ask(machine, "setsid sleep 1000 & sleep 0.3; kill -9 $PPID; sleep 1000")
        await machines.wait(machine, State.STOPPED, LIMIT)
        self.assertEqual([], self.left())


@needs_root
class CoordinatorTests(HostileTestCase):
    async def test_the_client_of_a_script_that_kills_its_worker_is_told_and_the_next_is_served(self) -> None:
        leaders = leaders_for_all(_UID)
        left = watch_for_leftovers(self)
        machines = LocalMachines(reactor, time.time, sandboxed=False, command=(*leaders, *WORKER_COMMAND))
        coordinator = Worker(free_port())
        service = compose(machines, coordinator.port, {"RUN_AS": "", "HOME": str(make_home(self, _UID))})
        service.startService()
        try:
            for kill in ("kill -9 -1", "kill -9 $PPID"):
                script = f"echo up; sleep 0.3; {kill}; sleep 1000"
                lost = await coordinator.fetch("POST", "/run", script.encode())
                self.assertEqual("up\n", lost.output("stdout"))
                self.assertEqual((125, "worker-lost"), (lost.exit["code"], lost.exit["reason"]))
                answer = await coordinator.fetch("POST", "/run", b"echo fine")
                self.assertEqual("fine\n", answer.output("stdout"))
        finally:
            await service.stopService()
        self.assertEqual([], left())

    async def test_the_client_of_a_script_that_cannot_be_started_gets_an_error(self) -> None:
        machines = LocalMachines(reactor, time.time, sandboxed=False)
        coordinator = Worker(free_port())
        env = {"RUN_AS": "", "HOME": str(make_home(self, 0)), "SANDBOX": "sh -c 'exit 127' sh"}
        service = compose(machines, coordinator.port, env)
        service.startService()
        try:
            for query in ("", "?raw=1"):
                answer = await coordinator.fetch("POST", "/run" + query, b"echo never")
                self.assertEqual(
                    (502, b"the worker could not start the script\n"), (answer.status, answer.body)
                )
            status = await coordinator.fetch("GET", "/status")
            self.assertEqual(2, status.body.count(b'"outcome": "not-started"'), status.body)
        finally:
            await service.stopService()


def compose(machines: LocalMachines, port: int, env: dict[str, str]) -> CoordService:
    """Make a coordinator as its own composition does, but with more in its workers' environment."""
    settings = CoordSettings.from_environment({"WORKER_APP": "mock", "MAXREQTIME": "20s", "POOLSIZE": "1"})
    proxy = WorkerClient(reactor, None, settings.max_output)
    usual = pool_config(settings)
    wanted = replace(usual, template=replace(usual.template, env={**usual.template.env, **env}))
    pool = Pool(machines, proxy, reactor, SystemRandom(), wanted)
    coordinator = Coordinator(
        reactor, settings, pool, proxy, time.time, RunTracker(reactor, time.time, SystemRandom())
    )
    site = BoundedSite(reactor, coordinator.app.resource(), settings.max_body)
    listener = listening(f"tcp:{port}:interface=127.0.0.1", site, reactor)
    return CoordService(coordinator, site, listener, pool, machines.shutdown)


def _add_tests(tests: type[TestCase], cases: tuple[Hostile, ...]) -> None:
    def make(case: Hostile, number: int) -> Callable[[Any], Any]:
        async def test(self: Any) -> None:
            await self.run_case(case, number)

        return test

    for number, case in enumerate(cases):
        setattr(tests, f"test_a_script_that_{case.name}", make(case, number))


_add_tests(AsAnotherUserTests, AS_ANOTHER_USER)
_add_tests(SandboxTests, IN_A_SANDBOX)
_add_tests(HostTests, ON_THE_HOST)
