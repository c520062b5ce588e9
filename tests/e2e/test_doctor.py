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
    return code, program.said.decode()


class MachineBackend(NullBackend):
    """Bodies that may end by themselves, after some seconds; their workers are where the test says."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.lasts: float | None = None

    def allocate_url(self) -> str | None:
        return self.url

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        if self.lasts is not None:
            reactor.callLater(self.lasts, exited)


class Tell(Fault):
    """A machine is said to be in some state."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def apply(self, call: Callable[[], Coroutine[Deferred[Any], Any, Any]]) -> Any:
        return replace(await call(), state=self.state)


class Hosted(FaultyMachines):
    """Machines that go wrong, behind the API."""

    api: EmulatedMachines

    def config_of(self, machine_id: str) -> MachineConfig:
        return self.api.config_of(machine_id)

    def set_metadata(self, machine_id: str, key: str, value: str | None) -> None:
        self.api.set_metadata(machine_id, key, value)


class IllFly:
    """Fly in the test's own hands, as an API and a proxy."""

    def __init__(self) -> None:
        self.bodies = MachineBackend()
        self.machines = EmulatedMachines(reactor, time.time, self.bodies, Timing(boot=0.05))
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

    async def until_asked(self, method: str) -> None:
        while not self.faulty.count(method):
            await deferLater(reactor, 0.05)

    async def finds(self, failure: str, remedy: str, **settings: str) -> None:
        """Have it examined: this is what is wrong, one machine at the most was made, and none is left."""
        code, said = await doctor({**SETTINGS, **self.settings, **settings})
        assert code == 1, said
        *_, found, advice = said.splitlines()
        assert found.startswith("FAIL  "), said
        assert failure in found, said
        assert remedy in advice, said
        assert said.count("FAIL") == said.count("->") == 1, said
        assert self.faulty.count("create") == 1
        assert await self.machines.list() == []


@asynccontextmanager
async def ill_fly() -> AsyncIterator[IllFly]:
    fly = IllFly()
    try:
        yield fly
    finally:
        await fly.close()


class Impostor(Resource):
    """Answers anything with a status, perhaps with the name or the time of somebody else."""

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
    """Never answers."""

    isLeaf = True

    def render(self, _: Request) -> int:
        return NOT_DONE_YET


@with_twisted
async def test_local_machines_are_tried() -> None:
    code, said = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10s"})
    assert code == 0, said
    assert "ok    worker: ran a script at http://127.0.0.1:" in said


@with_twisted
async def test_a_local_worker_that_does_not_start_says_why() -> None:
    few_files = ("/bin/bash", "-c", 'ulimit -n 40; exec "$@"', "bash", sys.executable)
    code, said = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10s"}, few_files)
    *_, log, found, advice = said.splitlines()
    assert code == 1
    assert log.startswith("warn  log: the worker of "), said
    assert "40 open files (ulimit -n) are too few" in log, said
    assert found.startswith("FAIL  "), said
    assert "see the log lines above" in advice, said


@with_twisted
async def test_settings_that_are_wrong_are_told_and_nothing_else_is_tried() -> None:
    code, said = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10"})
    assert code == 1
    assert said.splitlines()[0] == 'FAIL  settings: MAXREQTIME: "10" is not a duration such as 1m30s'
    assert "worker" not in said


@with_twisted
async def test_on_fly_all_is_tried_and_each_failure_has_a_remedy() -> None:
    fly = await start_fly()
    well = fly.settings("a", MAXREQTIME="10s")

    code, said = await doctor(well)
    assert code == 0, said
    assert [line[:4] for line in said.splitlines()] == ["ok  "] * 4
    assert await fly.api.list() == []

    for wrong, failure, remedy in [
        ({"FLY_TOKEN": "other"}, "FAIL  API, token, app: ", "-> FLY_TOKEN: "),
        ({"WORKER_APP": "nobodys"}, "FAIL  API, token, app: ", "-> WORKER_APP: "),
        (
            {"FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{free_port()}"},
            "FAIL  API, token, app: ",
            "-> FLY_FLAPS_BASE_URL: ",
        ),
    ]:
        code, said = await doctor({**well, **wrong})
        assert code == 1
        assert failure in said
        assert remedy in said, said
    assert await stop(fly.machines) == 0


@with_twisted
async def test_a_machine_that_is_not_made() -> None:
    async def refused(fault: Fault, failure: str, remedy: str) -> None:
        async with ill_fly() as fly:
            fly.faulty.next("create", fault)
            await fly.finds(f"image, region: POST /v1/apps/workers/machines: {failure}", remedy)

    image = "WORKER_IMAGE: does basher:1 exist? FLY_REGION: does ams exist?"
    await together([
        refused(Refuse(BadRequestError("manifest unknown")), "400 invalid_argument: manifest", image),
        refused(Refuse(NotFoundError("region not found")), "404 region not found", image),
        refused(Refuse(CapacityError("insufficient memory")), "409 aborted: could not", "no capacity in ams"),
        refused(Refuse(RateLimitedError("")), "429 rate limit exceeded", "try again in a minute"),
        refused(Refuse(PermissionError()), "401 Authenticate", "it may list machines, but not create them"),
        refused(Refuse(MachinesError("down")), "503 down", "the API does not respond"),
    ])  # fmt: skip


@with_twisted
async def test_a_machine_whose_making_is_not_answered_is_found_and_destroyed() -> None:
    async with ill_fly() as fly:
        fly.faulty.next("create", LoseResponse())
        await fly.finds("image, region: ", "the API does not respond: try again")
        assert fly.faulty.count("destroy") == 1


@with_twisted
async def test_a_machine_that_does_not_run() -> None:
    async with ill_fly() as fly:
        fly.faulty.always["get"] = Tell(State.FAILED)
        await fly.finds("start: machine ", DEAD)
        assert fly.faulty.count("destroy") == 1

    async with ill_fly() as fly:
        fly.bodies.lasts = 0.0
        await fly.finds("is stopped", DEAD)
        assert fly.faulty.count("destroy") == 1


@with_twisted
async def test_a_doctor_that_is_told_to_end_leaves_no_machine() -> None:
    async with ill_fly() as fly:
        fly.faulty.always["get"] = Tell(State.STARTING)
        program, pid = start(["-m", "bfaas.cli.main", "doctor"], {**SETTINGS, **fly.settings})
        await Deadline(reactor, PATIENCE).run(fly.until_asked("get"))
        os.kill(pid, signal.SIGINT)
        await Deadline(reactor, PATIENCE).run(program.ended)
        assert program.signal == signal.SIGINT, program.said
        assert b"FAIL" not in program.said
        assert await fly.machines.list() == []


@with_twisted
async def test_a_worker_that_cannot_be_reached() -> None:
    async def lost(where: Callable[[IllFly], str], failure: str, remedy: str) -> None:
        async with ill_fly() as fly:
            await fly.finds(failure, remedy, WORKER_URL=where(fly))
            assert fly.faulty.count("destroy") == 1

    def deaf(fly: IllFly) -> str:
        fly.bodies.url = nowhere
        return fly.proxy

    def short_lived(fly: IllFly) -> str:
        fly.bodies.lasts = 3.0
        return fly.proxy

    nowhere = f"http://127.0.0.1:{free_port()}"
    await together([
        lost(lambda _: nowhere, "worker: Connection was refused", f"WORKER_URL: {nowhere} cannot be reached"),
        lost(deaf, "worker: status 502 after 15 s", "does it listen on port 8001?"),
        lost(short_lived, "is stopped", DEAD),
        lost(lambda fly: fly.serve(Silent()), "worker: ", "cannot be reached"),
        lost(
            lambda fly: fly.serve(Impostor(200, Date="Wed, 25 Nov 2020 09:00:00 GMT")),
            "worker: it responds, but as another machine or with another time: its Date is Wed, 25 Nov 2020",
            "clock",
        ),
    ])  # fmt: skip


@with_twisted
async def test_a_worker_that_is_another() -> None:
    async def impostor(resource: Resource, failure: str) -> None:
        async with ill_fly() as fly:
            url = fly.serve(resource)
            await fly.finds(f"script: {failure}", f"WORKER_URL: is {url} the workers' app?", WORKER_URL=url)
            assert fly.faulty.count("destroy") == 1

    well = b"well\n\nexit: 0\n"
    await together([
        impostor(Impostor(404, b"no such page"), "404 b'no such page'"),
        impostor(Impostor(200, well, Worker="other"), "a machine other than the one that was created"),
    ])  # fmt: skip
