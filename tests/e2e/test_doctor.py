"""Tests of `bfaas doctor`, against local machines, the emulator of Fly, and a failing one."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest_twisted
from twisted.internet.task import deferLater
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from bfaas.deadline import Deadline
from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.api import (
    CapacityError,
    MachineConfig,
    MachinesError,
    NotFoundError,
    RateLimitedError,
    State,
)
from bfaas.machines.emulator.backend import NullBackend
from bfaas.machines.emulator.fly_proxy import FlyProxy
from bfaas.machines.emulator.routes import BadRequestError, MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.tokens import genkey
from tests.e2e.coordinator import PATIENCE, reactor, start, stop, together
from tests.e2e.fly import start_fly
from tests.support.faults import Fault, FaultyMachines, LoseResponse, Refuse
from tests.support.network import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from twisted.internet.defer import Deferred

    from bfaas.machines.api import Machine

with_twisted = pytest_twisted.ensureDeferred

SETTINGS = {
    "WORKER_APP": "workers",
    "WORKER_IMAGE": "basher:1",
    "FLY_TOKEN": "secret",
    "FLY_REGION": "ams",
    "FLY_MACHINE_ID": "a",
    "MAXREQTIME": "10s",
    "PRIVATE": genkey().private,
}


DEAD = "WORKER_IMAGE: it does not start, or exits; see `fly logs` of the workers' app"


async def doctor(
    settings: Mapping[str, str], leaders: Sequence[str] = (sys.executable,)
) -> tuple[int | None, str]:
    program, _ = start(["-m", "bfaas.cli.main", "doctor"], dict(settings), leaders)
    code = await Deadline(reactor, 3 * PATIENCE).run(program.ended)
    return code, program.output.decode()


class MachineBackend(NullBackend):
    """Machines that may stop by themselves after some seconds; the test sets the URL of their workers."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.exits_after: float | None = None

    def allocate_url(self) -> str | None:
        return self.url

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        if self.exits_after is not None:
            reactor.callLater(self.exits_after, exited)


class ReportState(Fault):
    """The API reports another state of a machine."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        return replace(await call(), state=self.state)


class Hosted(FaultyMachines):
    """Machines that fail, behind the API."""

    api: EmulatedMachines

    def config_of(self, machine_id: str) -> MachineConfig:
        return self.api.config_of(machine_id)

    def set_metadata(self, machine_id: str, key: str, value: str | None) -> None:
        self.api.set_metadata(machine_id, key, value)


class FaultyFly:
    """An API and a proxy like Fly's, whose machines fail in ways that a test chooses."""

    def __init__(self) -> None:
        self.backend = MachineBackend()
        self.machines = EmulatedMachines(reactor, time.time, self.backend, Timing(boot=0.05))
        self.faulty = Hosted(self.machines)
        self._ports: list[Any] = []
        self._sites: list[BoundedSite] = []
        self.api = self.serve(MachinesServer(self.faulty, "workers", "secret").app.resource())
        self.proxy = self.serve(FlyProxy(self.machines, single_use_agent(reactor)))

    def serve(self, resource: Resource) -> str:
        site = BoundedSite(reactor, resource, 1 << 20)
        port = reactor.listenTCP(0, site, interface="127.0.0.1")
        self._ports.append(port)
        self._sites.append(site)
        return f"http://127.0.0.1:{port.getHost().port}"

    async def close(self) -> None:
        for port in self._ports:
            await port.stopListening()
        for site in self._sites:
            await site.drain(5.0)
        await self.machines.shutdown()

    @property
    def settings(self) -> dict[str, str]:
        return {"FLY_FLAPS_BASE_URL": self.api, "WORKER_URL": self.proxy}

    async def wait_for_call(self, method: str) -> None:
        while not self.faulty.count(method):
            await deferLater(reactor, 0.05)

    async def check_doctor(self, failure: str, remedy: str, **settings: str) -> None:
        """Check doctor's failure and remedy, that it created one machine, and that none is left."""
        code, output = await doctor({**SETTINGS, **self.settings, **settings})
        assert code == 1, output
        *_, found, advice = output.splitlines()
        assert found.startswith("FAIL  "), output
        assert failure in found, output
        assert remedy in advice, output
        assert output.count("FAIL") == output.count("->") == 1, output
        assert self.faulty.count("create") == 1
        assert await self.machines.list() == []


@asynccontextmanager
async def faulty_fly() -> AsyncIterator[FaultyFly]:
    fly = FaultyFly()
    try:
        yield fly
    finally:
        await fly.close()


class Impostor(Resource):
    """Respond to everything with one status, body and headers."""

    isLeaf = True

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        super().__init__()
        self._status = status
        self._body = body
        self._headers = headers

    def render(self, request: Request) -> bytes:
        request.setResponseCode(self._status)
        for name, value in self._headers.items():
            request.setHeader(name, value)
        return self._body


class Silent(Resource):
    """Never respond."""

    isLeaf = True

    def render(self, _: Request) -> int:
        return NOT_DONE_YET


@with_twisted
async def test_local_machines_are_checked() -> None:
    code, output = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10s"})
    assert code == 0, output
    assert "ok    worker: ran a script at http://127.0.0.1:" in output


@with_twisted
async def test_log_of_a_local_worker_that_does_not_start_is_printed() -> None:
    few_files = ("/bin/bash", "-c", 'ulimit -n 40; exec "$@"', "bash", sys.executable)
    code, output = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10s"}, few_files)
    *_, log, found, advice = output.splitlines()
    assert code == 1
    assert log.startswith("warn  log: the worker of "), output
    assert "40 open files (ulimit -n) are too few" in log, output
    assert found.startswith("FAIL  "), output
    assert "see the log lines above" in advice, output


@with_twisted
async def test_invalid_settings_are_reported_and_nothing_else_is_checked() -> None:
    code, output = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10"})
    assert code == 1
    assert output.splitlines()[0] == 'FAIL  settings: MAXREQTIME: "10" is not a duration such as 1m30s'
    assert "worker" not in output


@with_twisted
async def test_each_failure_on_fly_has_a_remedy() -> None:
    fly = await start_fly()
    correct = fly.settings("a", MAXREQTIME="10s")

    code, output = await doctor(correct)
    assert code == 0, output
    assert [line[:4] for line in output.splitlines()] == ["ok  "] * 4
    assert await fly.api.list() == []

    for wrong, failure, remedy in [
        ({"FLY_TOKEN": "other"}, "FAIL  API, token, app: ", "-> FLY_TOKEN: "),
        ({"WORKER_APP": "unknown"}, "FAIL  API, token, app: ", "-> WORKER_APP: "),
        (
            {"FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{free_port()}"},
            "FAIL  API, token, app: ",
            "-> FLY_FLAPS_BASE_URL: ",
        ),
    ]:
        code, output = await doctor({**correct, **wrong})
        assert code == 1
        assert failure in output
        assert remedy in output, output
    assert await stop(fly.emulator) == 0


@with_twisted
async def test_machine_that_cannot_be_created() -> None:
    async def rejected(fault: Fault, failure: str, remedy: str) -> None:
        async with faulty_fly() as fly:
            fly.faulty.next("create", fault)
            await fly.check_doctor(f"image, region: POST /v1/apps/workers/machines: {failure}", remedy)

    image = "WORKER_IMAGE: does basher:1 exist? FLY_REGION: does ams exist?"
    await together(
        [
            rejected(Refuse(BadRequestError("manifest unknown")), "400 invalid_argument: manifest", image),
            rejected(Refuse(NotFoundError("region not found")), "404 region not found", image),
            rejected(
                Refuse(CapacityError("insufficient memory")), "409 aborted: could not", "no capacity in ams"
            ),
            rejected(Refuse(RateLimitedError("")), "429 rate limit exceeded", "try again in a minute"),
            rejected(
                Refuse(PermissionError()), "401 Authenticate", "it may list machines, but not create them"
            ),
            rejected(Refuse(MachinesError("down")), "503 down", "the API does not respond"),
        ]
    )


@with_twisted
async def test_machine_with_a_lost_response_is_found_and_destroyed() -> None:
    async with faulty_fly() as fly:
        fly.faulty.next("create", LoseResponse())
        await fly.check_doctor("image, region: ", "the API does not respond: try again")
        assert fly.faulty.count("destroy") == 1


@with_twisted
async def test_machine_that_does_not_run() -> None:
    async with faulty_fly() as fly:
        fly.faulty.always["get"] = ReportState(State.FAILED)
        await fly.check_doctor("start: machine ", DEAD)
        assert fly.faulty.count("destroy") == 1

    async with faulty_fly() as fly:
        fly.backend.exits_after = 0.0
        await fly.check_doctor("is stopped", DEAD)
        assert fly.faulty.count("destroy") == 1


@with_twisted
async def test_interrupted_doctor_leaves_no_machine() -> None:
    async with faulty_fly() as fly:
        fly.faulty.always["get"] = ReportState(State.STARTING)
        program, pid = start(["-m", "bfaas.cli.main", "doctor"], {**SETTINGS, **fly.settings})
        await Deadline(reactor, PATIENCE).run(fly.wait_for_call("get"))
        os.kill(pid, signal.SIGINT)
        await Deadline(reactor, PATIENCE).run(program.ended)
        assert program.signal == signal.SIGINT, program.output
        assert b"FAIL" not in program.output
        assert await fly.machines.list() == []


@with_twisted
async def test_worker_that_cannot_be_reached() -> None:
    async def unavailable(where: Callable[[FaultyFly], str], failure: str, remedy: str) -> None:
        async with faulty_fly() as fly:
            await fly.check_doctor(failure, remedy, WORKER_URL=where(fly))
            assert fly.faulty.count("destroy") == 1

    def unreachable(fly: FaultyFly) -> str:
        fly.backend.url = closed
        return fly.proxy

    def short_lived(fly: FaultyFly) -> str:
        fly.backend.exits_after = 3.0
        return fly.proxy

    closed = f"http://127.0.0.1:{free_port()}"
    await together(
        [
            unavailable(
                lambda _: closed, "worker: Connection was refused", f"WORKER_URL: {closed} cannot be reached"
            ),
            unavailable(unreachable, "worker: status 502 after 15 s", "does it listen on port 8001?"),
            unavailable(short_lived, "is stopped", DEAD),
            unavailable(lambda fly: fly.serve(Silent()), "worker: ", "cannot be reached"),
            unavailable(
                lambda fly: fly.serve(Impostor(200, Date="Wed, 25 Nov 2020 09:00:00 GMT")),
                "with another time: its Date is Wed, 25 Nov 2020",
                "clock",
            ),
        ]
    )


@with_twisted
async def test_response_of_another_worker() -> None:
    async def impostor(resource: Resource, failure: str) -> None:
        async with faulty_fly() as fly:
            url = fly.serve(resource)
            await fly.check_doctor(
                f"script: {failure}", f"WORKER_URL: is {url} the workers' app?", WORKER_URL=url
            )
            assert fly.faulty.count("destroy") == 1

    success = b"well\n\nexit: 0\n"
    await together(
        [
            impostor(Impostor(404, b"no such page"), "404 b'no such page'"),
            impostor(
                Impostor(200, success, Worker="other"),
                "the script ran on another machine than the one that was created",
            ),
        ]
    )
