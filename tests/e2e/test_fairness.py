"""Round-robin service of clients, and the quota of each client."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.task import deferLater
from twisted.web.client import Agent, HTTPConnectionPool

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, reactor, start_coordinator, stop
from tests.e2e.hostile import EXIT, HEAD, start_harness
from tests.e2e.test_main_job import path_setting
from tests.support.hostile_worker import LAST_CHUNK, End, Peer, chunk, post
from tests.support.responses import parse_response

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.coordinator import Running
    from tests.e2e.hostile import Harness, Script
    from tests.support.responses import Response

FLOOD = 24
"""Concurrent senders at one address. Each sends one request after another."""

QUOTA = 8

with_twisted = pytest_twisted.ensureDeferred


def client_at(address: str, coordinator: Running) -> Running:
    """Return a client of the coordinator that connects from another address of this host."""
    pool = HTTPConnectionPool(reactor, persistent=False)
    return replace(coordinator, agent=Agent(reactor, pool=pool, bindAddress=(address, 0)))


def assert_over_quota(response: Response) -> None:
    assert response.status == 429, response
    assert response.body == b"too many concurrent requests from this client\n"
    assert 1 <= int(response.headers["retry-after"]) <= 30


@with_twisted
async def test_a_request_is_served_during_a_flood_from_another_address() -> None:
    coordinator = await start_coordinator(
        POOLSIZE="1", MAXPERCLIENT=str(QUOTA), MAXREQTIME="10s", MAXWAIT="20s"
    )
    flooding, single = client_at("127.0.0.2", coordinator), client_at("127.0.0.3", coordinator)
    statuses: Counter[int] = Counter()
    finished_first: list[int] = []
    stopped: Deferred[None] = Deferred()

    async def flood() -> None:
        while not stopped.called:
            response = await flooding.run("sleep 0.1")
            statuses[response.status] += 1
            if response.status != 200:
                assert_over_quota(response)
                await deferLater(reactor, 0.3)

    floods = gatherResults([Deferred.fromCoroutine(flood()) for _ in range(FLOOD)], consumeErrors=True)
    try:
        while statuses[200] < 2 or not statuses[429]:
            await deferLater(reactor, 0.05)
        for _ in range(3):
            before = statuses[200]
            response = await single.run("echo single")
            finished_first.append(statuses[200] - before)
            assert response.status == 200, response
            assert response.output("stdout") == "single\n"
    finally:
        stopped.callback(None)
        await Deadline(reactor, PATIENCE).run(floods)

    # At most these requests of the flood finish first: the running one, the next one in the queue, and those
    # between the count and the enqueue. In order of arrival it would be all others of its quota.
    assert max(finished_first) <= 4 < QUOTA - 2, finished_first
    assert set(statuses) == {200, 429}
    assert statuses[429] >= FLOOD - QUOTA, statuses
    assert await stop(coordinator) == 0


@with_twisted
async def test_scripts_that_call_their_own_coordinator_share_one_quota(tmp_path: Path) -> None:
    without_bubblewrap = path_setting(False, tmp_path)
    coordinator = await start_coordinator(**without_bubblewrap, POOLSIZE="2", MAXPERCLIENT="2")
    url = f"http://127.0.0.1:{coordinator.port}/run?raw=1"

    def curl_run(script: str) -> str:
        return f"curl -s --max-time 30 -w '%{{http_code}}.' {url} --data-binary @- <<'END'\n{script}\nEND\n"

    # The outer run, the run that it requests, and the request of that run, which exceeds the quota.
    inner = f"curl -s -o /dev/null -w '%{{http_code}}' --max-time 30 {url} -d true"
    response = await coordinator.run(curl_run(inner), "?raw=1")
    assert response.body == b"429\nexit: 0\n200.\nexit: 0\n"

    # Other clients are served while one script requests many runs at once.
    many = (
        f"for i in $(seq 20); do curl -s -o /dev/null -w '%{{http_code}} ' {url} -d 'sleep 0.5' & done; wait"
    )
    running = Deferred.fromCoroutine(coordinator.run(many, "?raw=1"))
    await deferLater(reactor, 0.5)
    other = await client_at("127.0.0.2", coordinator).run("echo fine")
    assert other.output("stdout") == "fine\n"
    codes = Counter(re.findall(rb"(\d+) ", (await running).body))
    assert set(codes) == {b"200", b"429"}, codes
    assert codes[b"429"] >= 10, codes
    assert await stop(coordinator) == 0


async def rejection(harness: Harness, *headers: str) -> tuple[int, str]:
    """Send a request that must be rejected; return the status and the message."""
    received, _ = await harness.request(post("/run", b"another", *headers))
    response, message = parse_response(received)
    assert 1 <= int(response.getheader("retry-after") or 0) <= 30
    return response.status, message.decode().strip()


async def start_run(harness: Harness, finish: Deferred[None], *headers: str) -> Peer:
    """Start a run that ends when `finish` is called back."""
    output = b'event: stdout\ndata: "started"\n\n'
    script: Script = (HEAD + chunk(output), finish, chunk(EXIT) + LAST_CHUNK, End.CLOSE)
    harness.worker.responses[b"first"] = lambda: script
    running = await harness.call(post("/run", b"first", *headers))
    await running.receive_until(b"started")
    return running


@with_twisted
async def test_on_fly_clients_are_distinguished_by_the_proxys_header() -> None:
    over_quota = (429, "too many concurrent requests from this client")
    queue_timeout = (503, "no worker available within 2 s")
    finish: Deferred[None] = Deferred()
    async with start_harness(POOLSIZE="1", MAXPERCLIENT="1", MAXWAIT="2s", MAXREQTIME="20s") as harness:
        running = await start_run(harness, finish, "Fly-Client-IP: 2001:db8::1")

        assert await rejection(harness, "Fly-Client-IP: 2001:db8::1") == over_quota
        assert await rejection(harness, "Fly-Client-IP: 2001:db8::2") == over_quota
        requests = [
            rejection(harness, "Fly-Client-IP: 2001:db8:0:1::1"),
            rejection(harness, "Fly-Client-IP: invalid"),
            rejection(harness),
        ]
        rejections = await gatherResults([Deferred.fromCoroutine(request) for request in requests])
        assert rejections[0] == queue_timeout
        assert sorted(rejections[1:]) == [over_quota, queue_timeout]  # one quota: the proxy's
        finish.callback(None)
        assert b"exit" in await running.receive_all()


@with_twisted
async def test_outside_fly_the_header_is_ignored() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXPERCLIENT="1")
    running = await coordinator.begin("echo started; sleep 600")
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", coordinator.port)
    peer: Peer = await connectProtocol(endpoint, Peer())
    await peer.send(post("/run", b"true", "Fly-Client-IP: 203.0.113.7"))
    spoofed, _ = parse_response(await peer.receive_all())

    assert spoofed.status == 429
    assert_over_quota(await coordinator.run("true"))
    running.leave()
    await coordinator.settle()
    assert (await coordinator.run("true")).status == 200
    assert await stop(coordinator) == 0
