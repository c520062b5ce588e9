"""A coordinator whose machines are containers of the engine in DOCKER_HOST: see `make engines-test`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from base64 import b64decode
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults
from twisted.internet.task import deferLater

from tests.e2e.coordinator import reactor, start_coordinator, start_program, stop
from tests.support.network import free_port
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.e2e.coordinator import Running
    from tests.support.responses import Response

pytestmark = pytest.mark.skipif("DOCKER_HOST" not in os.environ, reason="DOCKER_HOST is not set")

RUNS = int(os.environ.get("BFAAS_RUNS", "40"))

TIME = 6.0
"""MAXREQTIME in seconds."""

LIMIT = TIME + 20.0
"""Seconds until a hostile script's response is complete, on a busy host."""

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


def call(*arguments: str) -> bytes:
    """Call the engine with curl. The last argument is the path."""
    socket = os.environ["DOCKER_HOST"].removeprefix("unix://")
    *options, path = arguments
    command = ["curl", "-sf", "--unix-socket", socket, *options, f"http://engine/v1.41{path}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def containers() -> set[str]:
    """Return the names of this test's containers."""
    filters = json.dumps({"label": [f"bfaas.pool={POOL}"]})
    listed = call("-G", "-d", "all=1", "--data-urlencode", f"filters={filters}", "/containers/json")
    return {name for container in json.loads(listed) for name in container["Names"]}


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


@with_twisted
async def test_idle_containers_live_as_long_as_their_coordinator() -> None:
    lease = 12.0
    with tempfile.TemporaryDirectory(prefix="bfaas-sockets-") as directory:
        timing = {"LEASE": f"{lease:g}", "MAXREQTIME": "2s", "POOL_STANDBY": "2", "POOLSIZE": "2"}
        coordinator = await start_program(
            ["-m", "tests.e2e.coord_with_timing"], free_port(), {**settings(directory), **timing}
        )
        await wait_until(lambda: len(containers()) == 2, "two machines in standby")
        idle = containers()
        await deferLater(reactor, 1.5 * lease)  # more than a silence may last
        assert containers() == idle, coordinator.program.output.decode()
        coordinator.kill(signal.SIGKILL)
        await coordinator.program.ended
        await wait_until(lambda: not containers(), "the end of the workers")
