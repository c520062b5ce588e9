"""What those who run a coordinator see of it: whether it is well, what it does, what became of a run."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

from tests.e2e.coordinator import Running, reactor, start_coordinator, start_listening, stop
from tests.e2e.fly import start_fly
from tests.support.network import free_port
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.support.responses import Response

with_twisted = pytest_twisted.ensureDeferred


async def status(coordinator: Running) -> Any:
    answer = await coordinator.get("/status")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.body)


async def readiness(coordinator: Running, code: int) -> Response:
    """Ask whether it is ready until it says so, or that it is not."""

    async def ask() -> Response | None:
        answer = await coordinator.get("/readyz")
        return answer if answer.status == code else None

    seen = await wait_until(ask)
    assert seen is not None
    return seen


@with_twisted
async def test_the_status_tells_of_the_pool_the_line_and_the_latest_runs() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXREQTIME="20s", MAXQUEUE="7")
    await readiness(coordinator, 200)
    told = await status(coordinator)
    assert told["pool"] == {"name": "mock", "size": 1, "standby": 0, "machines": {}}
    assert (told["queue"]["waiting"], told["queue"]["limit"]) == (0, 7)
    assert (told["max_req_time_ms"], told["draining"]) == (20_000, False)
    assert told["runs"] == {"running": 0, "recent": []}

    busy = await coordinator.begin("echo begun; sleep 1000")
    waiting = Deferred.fromCoroutine(coordinator.run("exit 3"))
    await deferLater(reactor, 0.3)
    told = await status(coordinator)
    assert told["pool"]["machines"] == {"running": 1}
    assert (told["queue"]["waiting"], told["runs"]["running"]) == (1, 1)
    busy.leave()
    await waiting

    recent = (await status(coordinator))["runs"]["recent"]
    assert [run["outcome"] for run in recent] == ["client-disconnected", "exit 3"]
    assert recent[1]["wait_ms"] > 0
    assert await stop(coordinator) == 0


@with_twisted
async def test_each_answer_names_its_run_and_the_log_has_a_line_for_it() -> None:
    coordinator = await start_coordinator(MAXREQTIME="2s")
    answers = {
        "exit 7": await coordinator.run("exit 7"),
        "timeout": await coordinator.run("echo SECRET; sleep 1000"),
        None: await coordinator.run(b"echo \0"),
    }
    assert await stop(coordinator) == 0
    said = coordinator.program.said.decode()
    ids = {answer.headers["run-id"] for answer in answers.values()}
    assert len(ids) == len(answers)
    for ending, answer in answers.items():
        run_id = answer.headers["run-id"]
        assert re.fullmatch("[0-9a-f]{16}", run_id)
        lines = [line for line in said.splitlines() if f"run {run_id} of 127.0.0.1 on " in line]
        assert [f": {ending}, " in line for line in lines] == ([True] if ending else [])
    assert "SECRET" not in said


@with_twisted
async def test_the_log_can_be_an_object_a_line() -> None:
    settings = {"WORKER_APP": "mock", "MAXREQTIME": "20s"}
    coordinator = await start_listening("bfaas-coord", free_port(), ["--log-format", "json"], settings)
    answer = await coordinator.run("exit 7")
    assert await stop(coordinator) == 0
    lines = [json.loads(line) for line in coordinator.program.said.splitlines()]
    [line] = [line for line in lines if line.get("run") == answer.headers["run-id"]]
    assert (line["level"], line["outcome"], line["client"]) == ("info", "exit 7", "127.0.0.1")
    assert line["machine"] == answer.headers["worker"]
    assert line["message"].startswith(f"run {line['run']} of 127.0.0.1 on {line['machine']}: exit 7, ")


@pytest.mark.parametrize("used", [False, True], ids=["without-machines", "with-an-idle-one"])
@with_twisted
async def test_it_is_alive_but_not_ready_while_the_api_is_down(used: bool) -> None:
    fly = await start_fly()
    coordinator = await start_coordinator(**fly.settings("p", 1, MAXWAIT="5s"))
    assert (await readiness(coordinator, 200)).body == b"ready\n"
    if used:
        assert (await coordinator.run("echo fine")).status == 200

        async def idle() -> bool:
            return bool((await status(coordinator))["pool"]["machines"] == {"stopped": 1})

        await wait_until(idle)
    os.kill(fly.machines.pid, signal.SIGKILL)
    for _ in range(2):
        assert (await coordinator.run("echo fine")).status == 503
        told = await coordinator.get("/readyz")
        assert told.status == 503
        assert told.body == (
            b"recent requests timed out in the queue\n" if used else b"machines cannot be started\n"
        )

    assert (await coordinator.get("/healthz")).body == b"ok\n"
    coordinator.kill(signal.SIGKILL)
    await coordinator.program.ended


@with_twisted
async def test_it_is_not_ready_while_the_line_is_full() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXQUEUE="1", MAXREQTIME="30s")
    busy = await coordinator.begin("sleep 1000")
    assert (await coordinator.get("/readyz")).body == b"ready\n"
    waiting = Deferred.fromCoroutine(coordinator.run("true"))

    async def full() -> bool:
        return bool((await status(coordinator))["queue"]["waiting"])

    await wait_until(full)
    refused = await coordinator.get("/readyz")
    assert (refused.status, refused.body) == (503, b"too many requests are waiting\n")
    assert int(refused.headers["retry-after"]) >= 1
    busy.leave()
    assert (await waiting).status == 200
    await readiness(coordinator, 200)
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_fresh_coordinator_with_short_scripts_is_ready_and_does_not_guess() -> None:
    coordinator = await start_coordinator(MAXWAIT="30s", MAXREQTIME="10s", MAXPERCLIENT="8")
    running = [Deferred.fromCoroutine(coordinator.run("sleep 1")) for _ in range(8)]

    async def all_there() -> bool:
        told = await status(coordinator)
        return bool(told["queue"]["waiting"] + told["runs"]["running"] == 8)

    await wait_until(all_there)
    assert (await coordinator.get("/readyz")).body == b"ready\n"
    refused = await coordinator.run("true")
    assert refused.status == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert {answer.status for answer in await gatherResults(running)} == {200}
    assert await stop(coordinator) == 0


@with_twisted
async def test_prometheus_is_told_of_runs_machines_and_refusals() -> None:
    port, settings = (
        free_port(),
        {"WORKER_APP": "mock", "MAXREQTIME": "30s", "POOLSIZE": "1", "MAXWAIT": "5s"},
    )
    options = ["--metrics", f"tcp:{port}:interface=127.0.0.1"]
    coordinator = await start_listening("bfaas-coord", free_port(), options, settings)
    for script in ("echo fine", "exit 3", b"\0"):
        await coordinator.run(script)
    asked = json.dumps({"script": "sleep 1000", "timeout": "2s"})
    await coordinator.run(asked, headers={"Content-Type": "application/json"})
    busy = await coordinator.begin("echo begun; sleep 1000")
    assert (await coordinator.run("echo in vain")).status == 503
    page = Running(coordinator.program, port, coordinator.pid)

    answer = await page.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=")
    told = {
        ",".join(
            [sample.name, *(value for _, value in sorted(sample.labels.items(), reverse=True))]
        ): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    assert told["bfaas_run_duration_seconds_count,exit"] == 2
    assert told["bfaas_run_duration_seconds_count,timeout"] == 1
    assert 2 <= told["bfaas_run_duration_seconds_sum,timeout"] < 30
    assert (
        told["bfaas_requests_rejected_total,invalid-request"]
        == told["bfaas_requests_rejected_total,queue-timeout"]
        == 1
    )
    assert told["bfaas_requests_rejected_total,queue-full"] == 0
    assert told["bfaas_queue_wait_seconds_count"] == 4
    assert told["bfaas_time_to_first_byte_seconds_count"] == 3
    assert told["bfaas_machine_phase_seconds_count,creating,ready"] == 1
    assert told["bfaas_machine_phase_seconds_count,starting,ready"] == 3
    assert told["bfaas_machine_phase_seconds_count,stopping,stopped"] == 3
    assert (told["bfaas_machines,running"], told["bfaas_machines,stopped"]) == (1, 0)
    assert told["bfaas_response_bytes_total"] > 100
    assert told["bfaas_ready"] == 0
    assert told["process_resident_memory_bytes"] > 1 << 20
    assert (await page.get("/")).body == b"not found\n"
    assert (await coordinator.get("/metrics")).status == 404
    busy.leave()
    assert await stop(coordinator) == 0
