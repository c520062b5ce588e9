"""Tests of what operators see: readiness, status, the log and the metrics."""

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

from bfaas import __version__
from tests.e2e.coordinator import Running, start_coordinator, start_listening, stop
from tests.e2e.fly import start_fly
from tests.support.network import free_port
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.support.responses import Response

with_twisted = pytest_twisted.ensureDeferred


async def status(coordinator: Running, query: str = "") -> Any:
    response = await coordinator.get(f"/status{query}")
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    return json.loads(response.body)


async def readiness(coordinator: Running, code: int) -> Response:
    """Request /readyz until its status is `code`; return the response."""

    async def request() -> Response | None:
        response = await coordinator.get("/readyz")
        return response if response.status == code else None

    response = await wait_until(request)
    assert response is not None
    return response


@with_twisted
async def test_status_has_the_pool_the_queue_and_the_latest_runs() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXREQTIME="20s", MAXQUEUE="7")
    await readiness(coordinator, 200)
    payload = await status(coordinator)
    assert payload["pool"] == {"name": "mock", "size": 1, "standby": 0, "machines": {}}
    assert (payload["queue"]["waiting"], payload["queue"]["limit"]) == (0, 7)
    assert (payload["max_req_time_ms"], payload["draining"]) == (20_000, False)
    assert payload["runs"] == {"running": 0, "recent": []}

    busy = await coordinator.begin("echo started; sleep 1000")
    waiting = Deferred.fromCoroutine(coordinator.run("exit 3", headers={"Request-Id": "mine"}))

    async def is_queued() -> bool:
        return bool((await status(coordinator, "?request=mine"))["queue"]["position"] == 1)

    await wait_until(is_queued)
    assert (await status(coordinator, "?request=other"))["queue"]["position"] is None
    payload = await status(coordinator)
    assert payload["queue"].keys() == {"waiting", "limit", "expected_wait_ms"}
    assert (payload["version"], payload["sandbox"] in ("bubblewrap", "none")) == (__version__, True)
    assert payload["pool"]["machines"] == {"running": 1}
    assert (payload["queue"]["waiting"], payload["runs"]["running"]) == (1, 1)
    busy.leave()
    await waiting

    recent = (await status(coordinator))["runs"]["recent"]
    assert [run["outcome"] for run in recent] == ["client-disconnected", "exit 3"]
    assert recent[1]["wait_ms"] > 0
    assert await stop(coordinator) == 0


@with_twisted
async def test_each_response_has_a_run_id_and_each_run_a_log_line() -> None:
    coordinator = await start_coordinator(MAXREQTIME="2s")
    responses = {
        "exit 7": await coordinator.run("exit 7"),
        "timeout": await coordinator.run("echo SECRET; sleep 1000"),
        None: await coordinator.run(b"echo \0"),
    }
    assert await stop(coordinator) == 0
    log = coordinator.program.output.decode()
    ids = {response.headers["run-id"] for response in responses.values()}
    assert len(ids) == len(responses)
    for outcome, response in responses.items():
        run_id = response.headers["run-id"]
        assert re.fullmatch("[0-9a-f]{16}", run_id)
        lines = [line for line in log.splitlines() if f"run {run_id} of 127.0.0.1 on " in line]
        assert [f": {outcome}, " in line for line in lines] == ([True] if outcome else [])
    assert "SECRET" not in log


@with_twisted
async def test_log_can_be_json_lines() -> None:
    settings = {"WORKER_APP": "mock", "MAXREQTIME": "20s"}
    coordinator = await start_listening("bfaas-coord", free_port(), ["--log-format", "json"], settings)
    response = await coordinator.run("exit 7")
    assert await stop(coordinator) == 0
    lines = [json.loads(line) for line in coordinator.program.output.splitlines()]
    [line] = [line for line in lines if line.get("run") == response.headers["run-id"]]
    assert (line["level"], line["outcome"], line["client"]) == ("info", "exit 7", "127.0.0.1")
    assert line["machine"] == response.headers["worker"]
    assert line["message"].startswith(f"run {line['run']} of 127.0.0.1 on {line['machine']}: exit 7, ")


@pytest.mark.parametrize("used", [False, True], ids=["without-machines", "with-a-stopped-machine"])
@with_twisted
async def test_coordinator_is_healthy_but_not_ready_while_the_api_is_down(used: bool) -> None:
    fly = await start_fly()
    coordinator = await start_coordinator(**fly.settings("p", 1, MAXWAIT="5s"))
    assert (await readiness(coordinator, 200)).body == b"ready\n"
    if used:
        assert (await coordinator.run("echo fine")).status == 200

        async def is_stopped() -> bool:
            return bool((await status(coordinator))["pool"]["machines"] == {"stopped": 1})

        await wait_until(is_stopped)
    os.kill(fly.emulator.pid, signal.SIGKILL)
    for _ in range(2):
        assert (await coordinator.run("echo fine")).status == 503
        response = await coordinator.get("/readyz")
        assert response.status == 503
        assert response.body == (
            b"recent requests timed out in the queue\n" if used else b"machines cannot be started\n"
        )

    assert (await coordinator.get("/healthz")).body == b"ok\n"
    coordinator.kill(signal.SIGKILL)
    await coordinator.program.ended


@with_twisted
async def test_coordinator_is_not_ready_while_the_queue_is_full() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXQUEUE="1", MAXREQTIME="30s")
    busy = await coordinator.begin("sleep 1000")
    assert (await coordinator.get("/readyz")).body == b"ready\n"
    waiting = Deferred.fromCoroutine(coordinator.run("true"))

    async def is_full() -> bool:
        return bool((await status(coordinator))["queue"]["waiting"])

    await wait_until(is_full)
    refused = await coordinator.get("/readyz")
    assert (refused.status, refused.body) == (503, b"too many requests are waiting\n")
    assert int(refused.headers["retry-after"]) >= 1
    busy.leave()
    assert (await waiting).status == 200
    await readiness(coordinator, 200)
    assert await stop(coordinator) == 0


@with_twisted
async def test_new_coordinator_is_ready_and_its_retry_after_is_bounded() -> None:
    coordinator = await start_coordinator(MAXWAIT="30s", MAXREQTIME="10s", MAXPERCLIENT="8")
    running = [Deferred.fromCoroutine(coordinator.run("sleep 1")) for _ in range(8)]

    async def all_active() -> bool:
        payload = await status(coordinator)
        return bool(payload["queue"]["waiting"] + payload["runs"]["running"] == 8)

    await wait_until(all_active)
    assert (await coordinator.get("/readyz")).body == b"ready\n"
    refused = await coordinator.run("true")
    assert refused.status == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert {response.status for response in await gatherResults(running)} == {200}
    assert await stop(coordinator) == 0


@with_twisted
async def test_metrics_count_runs_machines_and_rejections() -> None:
    port, settings = (
        free_port(),
        {"WORKER_APP": "mock", "MAXREQTIME": "30s", "POOLSIZE": "1", "MAXWAIT": "5s"},
    )
    options = ["--metrics", f"tcp:{port}:interface=127.0.0.1"]
    coordinator = await start_listening("bfaas-coord", free_port(), options, settings)
    for script in ("echo fine", "exit 3", b"\0"):
        await coordinator.run(script)
    body = json.dumps({"script": "sleep 1000", "timeout": "2s"})
    await coordinator.run(body, headers={"Content-Type": "application/json"})
    busy = await coordinator.begin("echo started; sleep 1000")
    assert (await coordinator.run("echo never run")).status == 503
    metrics = Running(coordinator.program, port, coordinator.pid)

    response = await metrics.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {
        ",".join(
            [sample.name, *(value for _, value in sorted(sample.labels.items(), reverse=True))]
        ): sample.value
        for family in text_string_to_metric_families(response.body.decode())
        for sample in family.samples
    }
    assert samples["bfaas_run_duration_seconds_count,exit"] == 2
    assert samples["bfaas_run_duration_seconds_count,timeout"] == 1
    assert 2 <= samples["bfaas_run_duration_seconds_sum,timeout"] < 30
    assert (
        samples["bfaas_requests_rejected_total,invalid-request"]
        == samples["bfaas_requests_rejected_total,queue-timeout"]
        == 1
    )
    assert samples["bfaas_requests_rejected_total,queue-full"] == 0
    assert samples["bfaas_queue_wait_seconds_count"] == 4
    assert samples["bfaas_time_to_first_byte_seconds_count"] == 3
    assert samples["bfaas_machine_phase_seconds_count,creating,ready"] == 1
    assert samples["bfaas_machine_phase_seconds_count,starting,ready"] == 3
    assert samples["bfaas_machine_phase_seconds_count,stopping,stopped"] == 3
    assert (samples["bfaas_machines,running"], samples["bfaas_machines,stopped"]) == (1, 0)
    assert samples["bfaas_response_bytes_total"] > 100
    assert samples["bfaas_ready"] == 0
    assert samples["process_resident_memory_bytes"] > 1 << 20
    assert (await metrics.get("/")).body == b"not found\n"
    assert (await coordinator.get("/metrics")).status == 404
    busy.leave()
    assert await stop(coordinator) == 0
