"""A coordinator whose machines are containers of the engine in DOCKER_HOST: see `make engines-test`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from base64 import b64decode
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults
from twisted.internet.task import deferLater

from bfaas.pooling.lifecycle import API_SETTLE_TIME
from tests.e2e.coordinator import reactor, start_coordinator, start_program, stop, together
from tests.e2e.load import WORK, Outcome, run_script
from tests.support.network import free_port
from tests.support.paths import ROOT
from tests.support.responses import Response
from tests.support.waiting import block_until, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.e2e.coordinator import Running

pytestmark = pytest.mark.skipif("DOCKER_HOST" not in os.environ, reason="DOCKER_HOST is not set")

RUNS = int(os.environ.get("BFAAS_RUNS", "40"))

ROUNDS = int(os.environ.get("BFAAS_ROUNDS", "3"))

TIME = 6.0
"""MAXREQTIME in seconds."""

LIMIT = TIME + 20.0
"""Seconds until a hostile script's response is complete, on a busy host."""

RECOVERY = API_SETTLE_TIME + 45.0
"""Seconds for the recovery after a crash: see `tests.e2e.chaos`."""

POOL = f"engine-test-{os.getpid()}"

HOSTILE = {
    "fork bomb": (":(){ :|:& };:; wait; sleep 60", None),
    "kill of everything": ("kill -9 -1; sleep 60", None),
    "memory": ("head -c 1G /dev/zero | tail >/dev/null; echo ${PIPESTATUS[1]}", "137\n"),
    "a full disk": ("head -c 2G /dev/zero >/tmp/x 2>/dev/null; echo $?", "1\n"),
    "the network": ("curl -sm 2 http://192.0.2.1; ls /sys/class/net", "lo\n"),
    "root's files": (
        "for d in / /etc /usr /run/bfaas; do touch $d/x 2>/dev/null && echo $d; done; echo none",
        "none\n",
    ),
}
"""Scripts, and their standard output, or None where they are killed."""

with_twisted = pytest_twisted.ensureDeferred


def engine_socket() -> str:
    return os.environ["DOCKER_HOST"].removeprefix("unix://")


def curl(*arguments: str, check: bool = False) -> bytes:
    """Return the body of a response; nothing if there is none, or if its status is an error."""
    return subprocess.run(["curl", "-sf", *arguments], check=check, stdout=subprocess.PIPE).stdout


def call(*arguments: str) -> bytes:
    """Call the engine with curl. The last argument is the path."""
    *options, path = arguments
    return curl("--unix-socket", engine_socket(), *options, f"http://engine/v1.41{path}", check=True)


def containers() -> set[str]:
    """Return the names of this test's containers."""
    filters = json.dumps({"label": [f"bfaas.pool={POOL}"]})
    listed = call("-G", "-d", "all=1", "--data-urlencode", f"filters={filters}", "/containers/json")
    return {name for container in json.loads(listed) for name in container["Names"]}


def kill_engine() -> None:
    """Kill the engine, which is started again: see `tests.support.engines`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(engine_socket())
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    os.kill(pid, signal.SIGKILL)


def engine_works() -> bool:
    return curl("--unix-socket", engine_socket(), "http://engine/_ping") == b"OK"


def is_podman() -> bool:
    return b"Podman" in call("/version")


def processes_in_containers(directory: str) -> set[int]:
    """
    Return the processes that have a worker's socket in this directory, whatever the engine knows.

    An engine that is killed between a container's creation and its start leaves `runc init`, which waits.
    """
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            mounts, command = (entry / "mountinfo").read_text(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{directory}/" in mounts and not command.endswith(b"runc\0init\0"):
            found.add(int(entry.name))
    return found


@pytest_twisted.async_yield_fixture
async def coordinator() -> AsyncIterator[Running]:
    """Run a coordinator with containers, and check that it leaves none."""
    with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
        running = await start(directory)
        yield running
        assert await stop(running) == 0, running.program.output.decode()
        assert containers() == set()


def settings(directory: str) -> dict[str, str]:
    return {
        "WORKER_APP": "docker",
        "DOCKER_HOST": os.environ["DOCKER_HOST"],
        "WORKER_SOCKETS": directory,
        "FLY_MACHINE_ID": POOL,
        "MAXREQTIME": f"{TIME:g}s",
        "MAXPERCLIENT": "1000",
        "POOLSIZE": "4",
    }


async def start(directory: str, **more: str) -> Running:
    return await start_coordinator(**settings(directory), **more)


async def start_with_lease(directory: str, lease: int, **more: str) -> Running:
    """Start a coordinator with leases of so many seconds. Its workers exit after as long a silence."""
    timing = {"LEASE": str(lease), "MAXREQTIME": "2s"}
    return await start_program(
        ["-m", "tests.e2e.coord_with_timing"], free_port(), {**settings(directory), **timing, **more}
    )


@with_twisted
async def test_mixed_runs_are_complete(coordinator: Running) -> None:
    semaphore = DeferredSemaphore(6)

    async def run(number: int) -> None:
        if number % 4 == 3:
            exchange = await coordinator.begin("echo begun; sleep 60", "?raw=1")
            exchange.leave()
            return
        response = await coordinator.run(f"echo {number}; echo err >&2; exit {number % 7}")
        assert response.output("stdout") == f"{number}\n"
        assert response.output("stderr") == "err\n"
        assert response.exit["code"] == number % 7

    runs = [semaphore.run(run, number) for number in range(RUNS)]
    await gatherResults(runs, consumeErrors=True)


@with_twisted
async def test_files_are_sent_and_returned(coordinator: Running) -> None:
    request = {
        "script": "cat <a/b.txt; id -un >out.txt; ls -l",
        "files": {"a/b.txt": "of the client\n"},
        "outputs": ["*.txt"],
    }
    response = await coordinator.run(json.dumps(request), headers={"Content-Type": "application/json"})
    assert response.output("stdout").startswith("of the client\n"), response.body
    [file] = [data for name, data in response.events if name == "file"]
    assert (file["name"], b64decode(file["base64"])) == ("out.txt", b"worker\n")
    assert response.exit["code"] == 0


@pytest.mark.parametrize("name", HOSTILE)
@with_twisted
async def test_hostile_scripts_end_and_disturb_no_other_run(coordinator: Running, name: str) -> None:
    script, output = HOSTILE[name]

    began = reactor.seconds()
    hostile = Deferred.fromCoroutine(coordinator.run(script))
    other: Response = await coordinator.run("sleep 1; echo other")
    response: Response = await hostile

    assert reactor.seconds() - began < LIMIT
    assert (other.output("stdout"), other.exit["code"]) == ("other\n", 0)
    assert response.exit["code"] in ((124, 137) if output is None else (0,)), response.body
    if output is not None:
        assert response.output("stdout") == output, response.body


@with_twisted
async def test_a_script_that_runs_out_of_memory_is_reported_as_such(coordinator: Running) -> None:
    for script, oom in (("tail /dev/zero", True), ("kill -9 $$", None), ("tail /dev/zero; exit 3", None)):
        exit_ = (await coordinator.run(script)).exit
        assert (exit_["code"], exit_.get("oom")) == (3 if "3" in script else 137, oom)


@with_twisted
async def test_scripts_have_the_network_of_the_setting() -> None:
    body = json.dumps({"Name": POOL, "Driver": "bridge"})
    call("-H", "Content-Type: application/json", "-d", body, "/networks/create")
    try:
        with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
            coordinator = await start(directory, WORKER_NETWORK=POOL)
            response = await coordinator.run("ls /sys/class/net")
            assert response.output("stdout") == "eth0\nlo\n", response.body
            assert await stop(coordinator) == 0
    finally:
        call("-X", "DELETE", f"/networks/{POOL}")


@with_twisted
async def test_the_next_coordinator_removes_what_a_killed_one_left() -> None:
    with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
        first = await start(directory)
        exchange = await first.begin("echo begun; sleep 60", "?raw=1")
        left = containers()
        assert left
        first.kill(signal.SIGKILL)
        await first.program.ended
        exchange.leave()

        second = await start(directory)
        await wait_until(lambda: not left & containers(), "the removal of the first one's containers")
        response = await second.run("echo works")
        assert response.output("stdout") == "works\n"
        assert await stop(second) == 0
        assert containers() == set()


@contextmanager
def container_that_cannot_be_removed() -> Iterator[None]:
    """Create a container of this test's pool, whose directory cannot be removed before the end."""
    labels = {"bfaas.pool": POOL, "bfaas.machine": "left"}
    body = json.dumps({"Image": "bfaas-basher", "Cmd": ["true"], "Labels": labels})
    create = ("-H", "Content-Type: application/json", "-d", body)
    container = json.loads(call(*create, f"/containers/create?name={POOL}-left"))["Id"]
    root = json.loads(call("/info"))["DockerRootDir"]
    [directory] = Path(root).glob(
        f"*containers/{container}"
    )  # Podman has the storage driver's name before it
    file = directory / "immutable"
    file.touch()
    try:
        if subprocess.run(["chattr", "+i", file], check=False).returncode:
            pytest.skip("the file system has no immutable files")
        yield
    finally:
        subprocess.run(["chattr", "-i", file], check=False)
        # Podman has forgotten it at the first attempt, but not removed its directory.
        curl(
            "--unix-socket", engine_socket(), "-X", "DELETE", f"http://engine/containers/{container}?force=1"
        )
        shutil.rmtree(directory, ignore_errors=True)


@with_twisted
async def test_a_container_that_the_engine_cannot_remove_prevents_nothing() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory,
        container_that_cannot_be_removed(),
    ):
        coordinator = await start(directory)
        response = await coordinator.run("echo works")
        assert response.output("stdout") == "works\n"
        assert await stop(coordinator) == 0
        assert b"-left is left for now" in coordinator.program.output
    assert containers() == set()


@with_twisted
async def test_idle_containers_live_as_long_as_their_coordinator() -> None:
    lease = 12
    with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
        coordinator = await start_with_lease(directory, lease, POOL_STANDBY="2", POOLSIZE="2")
        await wait_until(lambda: len(containers()) == 2, "two machines in standby")
        idle = containers()
        await deferLater(reactor, 1.5 * lease)  # more than a silence may last
        assert containers() == idle, coordinator.program.output.decode()
        coordinator.kill(signal.SIGKILL)
        await coordinator.program.ended
        await wait_until(lambda: not containers(), "the end of the workers")


@pytest.mark.skipif(
    shutil.which("docker-compose") is None and "CI" not in os.environ,
    reason="docker-compose is not installed",
)
def test_compose_file_runs_a_coordinator_in_a_container(tmp_path: Path) -> None:
    if is_podman():
        pytest.skip("it is for Docker")
    port, file = free_port(), tmp_path / "compose.yaml"
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
        text = (ROOT / "deploy" / "compose.yaml").read_text()
        for of_the_host, here in (
            ("/var/run/docker.sock:", f"{engine_socket()}:"),
            ("/run/bfaas:/run/bfaas", f"{directory}:{directory}"),
            ("WORKER_SOCKETS: /run/bfaas", f"WORKER_SOCKETS: {directory}"),
            ("127.0.0.1:8000:", f"127.0.0.1:{port}:"),
        ):
            assert of_the_host in text
            text = text.replace(of_the_host, here)
        file.write_text(text)
        compose = ["docker-compose", "--file", str(file)]
        subprocess.run([*compose, "up", "--detach"], check=True)
        try:
            block_until(lambda: curl(f"{url}/readyz") == b"ready\n", "the coordinator's first machine")
            response = Response(200, {}, curl("-d", "echo hello; ls /sys/class/net", f"{url}/run"))
            assert response.output("stdout") == "hello\nlo\n"
            subprocess.run([*compose, "stop"], check=True)
            assert list(Path(directory).iterdir()) == []
        finally:
            subprocess.run([*compose, "down"], check=True)
        assert json.loads(call("/containers/json?all=1")) == []


class Load:
    """Clients that send scripts to a coordinator, which may be killed, and the outcomes of their requests."""

    def __init__(self, directory: str) -> None:
        self.coordinator: Running
        self.outcomes: Counter[Outcome] = Counter()
        self.slowest = 0.0
        self._directory = directory
        self._killed: list[Running] = []
        self._rng = random.Random(1)
        self._loaded = False

    async def start(self) -> None:
        self.coordinator = await start_with_lease(self._directory, 30, MAXWAIT="20s")

    async def run(self, work: str, code: int) -> Outcome:
        """Send a script; return the outcome, which must be an allowed one."""
        outcome = await run_script(self.coordinator, 0, work, code, self._killed)
        self.outcomes[outcome] += 1
        return outcome

    async def round(self, *, engine: bool, coordinator: bool) -> None:
        """Kill the engine, the coordinator, or both under load. Then scripts must run again soon."""
        self._loaded = True
        load = Deferred.fromCoroutine(together(self._send_scripts() for _ in range(6)))
        await deferLater(reactor, self._rng.uniform(0.5, 3.0))
        if engine:
            kill_engine()
        if coordinator:
            self._killed.append(self.coordinator)
            self.coordinator.kill(signal.SIGKILL)
            await self.coordinator.program.ended
        await wait_until(engine_works, "the start of the engine")
        if coordinator:
            await self.start()
        self._loaded = False
        await load
        began = reactor.seconds()
        while (outcome := await self.run("true", 0)) is not Outcome.COMPLETE:
            assert reactor.seconds() - began < RECOVERY, f"no recovery: {outcome.value}"
            await deferLater(reactor, 0.1)
        self.slowest = max(self.slowest, reactor.seconds() - began)

    async def _send_scripts(self) -> None:
        while self._loaded:
            outcome = await self.run(self._rng.choice(WORK), self._rng.randrange(5))
            if outcome in (Outcome.CUT, Outcome.REJECTED):
                await deferLater(reactor, 0.2)


@with_twisted
async def test_runs_end_clearly_when_engine_and_coordinator_are_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
        load = Load(directory)
        await load.start()
        try:
            for number in range(ROUNDS):
                await load.round(engine=number % 3 != 1, coordinator=number % 3 != 0)
                await wait_until(lambda: len(containers()) <= 4, "the removal of unknown containers")
        except AssertionError as error:
            error.add_note(load.coordinator.program.output.decode())
            await stop(load.coordinator)
            raise
        print(f"\n{ROUNDS} rounds, recovered within {load.slowest:.1f} s: {load.outcomes}")

        assert load.outcomes[Outcome.COMPLETE] > ROUNDS
        assert await stop(load.coordinator) == 0, load.coordinator.program.output.decode()
        assert containers() == set()
        # An engine that is killed forgets a container that it has just started. The worker exits by itself.
        await wait_until(lambda: not processes_in_containers(directory), "the end of all workers")
