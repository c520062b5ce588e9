"""The configuration of Fly on one host: emulated Machines API and proxy, and coordinators, as programs."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from treq.client import HTTPClient
from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults
from twisted.internet.task import LoopingCall, deferLater
from twisted.web.http_headers import Headers

from bfaas.deadline import Deadline
from bfaas.machines.api import State
from bfaas.system import process_tree
from tests.e2e.coordinator import PATIENCE, Program, reactor, start, start_coordinator, stop
from tests.e2e.fly import Fly, start_fly
from tests.support.responses import Response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RUNS = int(os.environ.get("BFAAS_RUNS", "40"))

with_twisted = pytest_twisted.ensureDeferred

# Prints DIRTY unless it is the first script on its machine since the machine was wiped.
SCRIPT = "test -e used && echo DIRTY; touch used; {work}; echo done; exit {code}"
WORK = ("true", "sleep 0.3", "seq 1 20000", "sleep 0.1 & true", "echo err >&2")


@pytest_twisted.async_yield_fixture
async def fly() -> AsyncIterator[Fly]:
    """Run the emulator; check that it leaves no process."""
    fly = await start_fly()
    yield fly
    processes = fly.emulator.processes()
    assert await stop(fly.emulator) == 0, fly.emulator.program.output.decode()
    assert b"Traceback" not in fly.emulator.program.output
    assert not any(map(process_tree.is_running, processes))


@with_twisted
async def test_two_pools_share_an_app_and_use_only_their_own_machines(fly: Fly) -> None:
    coordinators = {
        pool: await start_coordinator(**fly.settings(pool, size)) for pool, size in (("a-1", 3), ("a", 2))
    }
    rng = random.Random(5)
    max_machines: dict[str, int] = {"a-1": 0, "a": 0}
    seen: dict[str, set[str]] = {"a-1": set(), "a": set()}

    async def observe() -> None:
        for pool in seen:
            machines = await fly.machines_of_pool(pool)
            max_machines[pool] = max(max_machines[pool], len(machines))
            seen[pool] |= set(machines)

    async def run(pool: str) -> None:
        code = rng.randrange(5)
        response = await coordinators[pool].run(SCRIPT.format(work=rng.choice(WORK), code=code))
        assert response.exit["code"] == code
        assert "DIRTY" not in response.output("stdout")
        assert response.output("stdout").endswith("done\n")
        used[pool].add(response.headers["worker"])

    used: dict[str, set[str]] = {"a-1": set(), "a": set()}
    observing = LoopingCall(lambda: Deferred.fromCoroutine(observe()))
    stopped = observing.start(0.3)
    semaphore = DeferredSemaphore(8)
    runs = [semaphore.run(run, pool) for pool in rng.choices(["a-1", "a"], k=RUNS)]
    await gatherResults(runs, consumeErrors=True)
    observing.stop()
    await stopped
    await observe()

    assert max_machines["a-1"] <= 3
    assert max_machines["a"] <= 2
    for pool, coordinator in coordinators.items():
        assert used[pool] <= seen[pool]
        assert await stop(coordinator) == 0
        assert set((await fly.machines_of_pool(pool)).values()) == {State.STOPPED}


@with_twisted
@pytest.mark.parametrize("state", [State.STARTED, State.SUSPENDED])
async def test_a_warm_standby_serves_once_and_is_wiped_before_it_serves_again(fly: Fly, state: State) -> None:
    coordinator = await start_coordinator(
        **fly.settings("s", POOL_STANDBY="1", POOL_STANDBY_STATE=state.value)
    )

    async def standbys() -> list[str]:
        return [machine for machine, current in (await fly.machines_of_pool("s")).items() if current is state]

    for code in (3, 4, 5):
        machine = (await wait_until(standbys))[0]
        response = await coordinator.run(SCRIPT.format(work="true", code=code))
        assert response.exit["code"] == code
        assert "DIRTY" not in response.output("stdout")
        assert response.headers["worker"] == machine or state is State.STARTED

    processes = coordinator.processes()
    assert await stop(coordinator) == 0
    assert not any(map(process_tree.is_running, processes))
    assert set((await fly.machines_of_pool("s")).values()) == {State.STOPPED}


@with_twisted
async def test_a_restarted_coordinator_adopts_its_machines(fly: Fly) -> None:
    settings = fly.settings("p", 2)
    first = await start_coordinator(**settings)
    interrupted = [Deferred.fromCoroutine(first.run("sleep 1000")) for _ in range(2)]
    while list((await fly.machines_of_pool("p")).values()) != [State.STARTED, State.STARTED]:
        await deferLater(reactor, 0.05)
    left = await fly.machines_of_pool("p")
    first.kill(signal.SIGKILL)
    await first.program.ended
    for run in interrupted:
        run.addErrback(lambda _: None)
        await run

    second = await start_coordinator(**settings)
    responses: list[Response] = await gatherResults(
        [Deferred.fromCoroutine(second.run(SCRIPT.format(work="true", code=0))) for _ in range(6)]
    )

    assert all(response.output("stdout") == "done\n" for response in responses)
    assert {response.headers["worker"] for response in responses} <= set(left)
    assert set(await fly.machines_of_pool("p")) == set(left)
    assert await stop(second) == 0


async def wait_for_output(program: Program, text: bytes) -> None:
    await wait_until(lambda: text in program.output)


@with_twisted
async def test_pool_on_exit_destroy_destroys_the_machines(fly: Fly) -> None:
    other = await start_coordinator(**fly.settings("q", 1))
    assert (await other.run("true")).exit["code"] == 0
    coordinator = await start_coordinator(**fly.settings("p", 3, POOL_STANDBY="1", POOL_ON_EXIT="destroy"))
    assert (await coordinator.run("true")).exit["code"] == 0
    output: list[bytes] = []
    busy = await coordinator.begin("echo started; sleep 1; echo done", take=output.append)

    assert await stop(coordinator) == 0

    await busy.end()
    assert b"done" in b"".join(output)
    assert await fly.machines_of_pool("p") == {}
    assert len(await fly.machines_of_pool("q")) == 1
    assert await stop(other) == 0
    assert set((await fly.machines_of_pool("q")).values()) == {State.STOPPED}


@with_twisted
async def test_machines_are_listed_and_destroyed_from_the_command_line(fly: Fly) -> None:
    settings = fly.settings("p", 1)
    for pool in ("p", "q"):
        coordinator = await start_coordinator(**{**settings, "FLY_MACHINE_ID": pool})
        assert (await coordinator.run("true")).exit["code"] == 0
        assert await stop(coordinator) == 0

    async def bfaas(*arguments: str) -> tuple[int | None, str]:
        program, _ = start(["-m", "bfaas.cli.main", *arguments], settings)
        status = await Deadline(reactor, PATIENCE).run(program.ended)
        return status, program.output.decode()

    [listed] = await fly.machines_of_pool("p")
    status, table = await bfaas("machines")
    assert status == 0
    assert re.search(rf"^{listed} +p +stopped +\d+s +\d+m\d+s +worker-p-[0-9a-f]+$", table, re.MULTILINE)

    status, output = await bfaas("destroy", "--yes")
    assert (status, output.splitlines()[-1]) == (0, "destroyed 1 machine of p")
    assert await fly.machines_of_pool("p") == {}
    assert len(await fly.machines_of_pool("q")) == 1

    settings["FLY_MACHINE_ID"] = "q"
    closed = ["-c", "import os; os.close(0); from bfaas.cli.main import program; program()", "destroy"]
    program, _ = start(closed, settings)
    assert await Deadline(reactor, PATIENCE).run(program.ended) == 1
    assert program.output.endswith(b"[y/N] nothing was destroyed\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        program, pid = start(["-m", "bfaas.cli.main", "destroy"], settings)
        await wait_for_output(program, b"[y/N] ")
        os.kill(pid, number)
        await Deadline(reactor, PATIENCE).run(program.ended)
        assert program.signal == number
        assert b"Traceback" not in program.output
    assert len(await fly.machines_of_pool("q")) == 1

    settings["FLY_TOKEN"] = "another"
    status, output = await bfaas("machines")
    assert status == 1
    assert "401" in output
    assert len(output.splitlines()) == 1


@with_twisted
async def test_a_request_without_a_machine_is_replayed_elsewhere_once(fly: Fly) -> None:
    coordinator = await start_coordinator(**fly.settings("p", 1, FLY_REPLAY="1", MAXWAIT="5s"))
    busy = await coordinator.begin("echo started; sleep 1000")

    async def post(script: bytes, **added: str) -> Any:
        headers = Headers({name.replace("_", "-"): [value] for name, value in added.items()})
        url = f"http://127.0.0.1:{coordinator.port}/run"
        response = await HTTPClient(coordinator.agent).post(url, data=script, headers=headers)
        await response.content()
        return response

    replayed = await post(b"true")
    assert replayed.code == 503
    assert replayed.headers.hasHeader("retry-after")
    [response] = replayed.headers.getRawHeaders("fly-replay")
    # https://fly.io/docs/networking/dynamic-request-routing/; a state may contain anything, so it is last.
    fields = dict(field.split("=", 1) for field in response.split(";"))
    assert list(fields) == ["elsewhere", "timeout", "fallback", "state"]
    assert (fields["elsewhere"], fields["fallback"]) == ("true", "force_self")
    assert re.fullmatch("[0-9]+(ms|s)", fields["timeout"])

    status = json.loads((await coordinator.get("/status")).body)
    assert [run["outcome"] for run in status["runs"]["recent"]] == ["replayed"]

    source = f"instance=x;region=ams;t=1;state={fields['state']}"
    queued = await post(b"true", fly_replay_src=source)
    assert (queued.code, queued.headers.hasHeader("fly-replay")) == (503, False)
    queued = await post(b"#" * 1_000_001)
    assert (queued.code, queued.headers.hasHeader("fly-replay")) == (503, False)

    # The proxy found no other machine: it sends the request back, which is then queued.
    failed = "instance=;app=coords;region=ams;replay_source=x;reason=no_candidate;elapsed_ms=2003"
    waiting = Deferred.fromCoroutine(post(b"true", fly_replay_failed=failed))

    async def is_queued() -> bool:
        return bool(json.loads((await coordinator.get("/status")).body)["queue"]["waiting"])

    await wait_until(is_queued)
    busy.leave()
    served = await waiting
    assert served.code == 200
    assert await stop(coordinator) == 0


@pytest.mark.parametrize("query", ["", "?raw=1"])
@with_twisted
async def test_a_run_whose_machine_is_stopped_from_outside_is_reported_as_lost(fly: Fly, query: str) -> None:
    coordinator = await start_coordinator(**fly.settings("p", 1))
    pieces: list[bytes] = []
    started: Deferred[None] = Deferred()

    def take(data: bytes) -> None:
        pieces.append(data)
        if not started.called:
            started.callback(None)

    running = await coordinator.begin("echo started; sleep 1000", query, take)
    await Deadline(reactor, PATIENCE).run(started)
    machine_id = running.headers["worker"]
    lease = await fly.api.get_lease(machine_id)
    await fly.api.stop(machine_id, lease.nonce)
    await running.end()

    body = b"".join(pieces)
    if query:
        assert body == b"started\n\nexit: 125 worker-lost\n"
    else:
        exit_ = Response(200, {}, body).exit
        assert (exit_["code"], exit_["reason"], exit_.get("signal")) == (125, "worker-lost", None)
    assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"
    assert await stop(coordinator) == 0


@with_twisted
async def test_very_short_timeouts_are_reported_as_timeouts_behind_the_proxy(fly: Fly) -> None:
    coordinator = await start_coordinator(**fly.settings("p", 1))
    for timeout in ("1ms", "10ms", "50ms"):
        body = json.dumps({"script": "sleep 1000", "timeout": timeout}).encode()
        response = await coordinator.run(body, headers={"Content-Type": "application/json"})
        assert response.status == 200, response.body
        assert (response.exit["code"], response.exit["reason"]) == (124, "timeout")
    assert await stop(coordinator) == 0


@with_twisted
async def test_an_unresponsive_api_is_reported_in_time_and_used_again_once_it_responds(fly: Fly) -> None:
    coordinator = await start_coordinator(**fly.settings("p", 1, MAXWAIT="5s"))
    assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"
    os.kill(fly.emulator.pid, signal.SIGSTOP)
    try:
        refused = await coordinator.run("echo fine")
    finally:
        os.kill(fly.emulator.pid, signal.SIGCONT)

    assert (refused.status, refused.body) == (503, b"no worker available within 5 s\n")
    for _ in range(int(PATIENCE)):
        response = await coordinator.run("echo fine")
        if response.status == 200:
            break
    assert response.output("stdout") == "fine\n"
    assert await stop(coordinator) == 0
