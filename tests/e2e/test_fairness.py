"""Clients are served in turn, and no client exceeds its quota."""

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
"""Clients at one address, each of which sends one script after another."""

QUOTA = 8

with_twisted = pytest_twisted.ensureDeferred


def at(address: str, coordinator: Running) -> Running:
    """Return a client of a coordinator at another address of this host."""
    pool = HTTPConnectionPool(reactor, persistent=False)
    return replace(coordinator, agent=Agent(reactor, pool=pool, bindAddress=(address, 0)))


def assert_over_quota(answer: Response) -> None:
    assert answer.status == 429, answer
    assert answer.body == b"too many concurrent requests from this client\n"
    assert 1 <= int(answer.headers["retry-after"]) <= 30


@with_twisted
async def test_a_request_is_served_during_a_flood_from_another_address() -> None:
    coordinator = await start_coordinator(
        POOLSIZE="1", MAXPERCLIENT=str(QUOTA), MAXREQTIME="10s", MAXWAIT="20s"
    )
    crowd, single = at("127.0.0.2", coordinator), at("127.0.0.3", coordinator)
    answers: Counter[int] = Counter()
    overtaken: list[int] = []
    over: Deferred[None] = Deferred()

    async def flood() -> None:
        while not over.called:
            answer = await crowd.run("sleep 0.1")
            answers[answer.status] += 1
            if answer.status != 200:
                assert_over_quota(answer)
                await deferLater(reactor, 0.3)

    floods = gatherResults([Deferred.fromCoroutine(flood()) for _ in range(FLOOD)], consumeErrors=True)
    try:
        while answers[200] < 2 or not answers[429]:
            await deferLater(reactor, 0.05)
        for _ in range(3):
            before = answers[200]
            answer = await single.run("echo through")
            overtaken.append(answers[200] - before)
            assert answer.status == 200, answer
            assert answer.output("stdout") == "through\n"
    finally:
        over.callback(None)
        await Deadline(reactor, PATIENCE).run(floods)

    # One that ran, one whose turn was before; and what came between counting and joining the line. First
    # come, first served would be all the others of the flood's share.
    assert max(overtaken) <= 4 < QUOTA - 2, overtaken
    assert set(answers) == {200, 429}
    assert answers[429] >= FLOOD - QUOTA, answers
    assert await stop(coordinator) == 0


@with_twisted
async def test_scripts_that_call_their_own_coordinator_share_one_quota(tmp_path: Path) -> None:
    bare = path_setting(False, tmp_path)
    coordinator = await start_coordinator(**bare, POOLSIZE="2", MAXPERCLIENT="2")
    url = f"http://127.0.0.1:{coordinator.port}/run?raw=1"

    def curl_run(script: str) -> str:
        return f"curl -s --max-time 30 -w '%{{http_code}}.' {url} --data-binary @- <<'END'\n{script}\nEND\n"

    # The outer run, the run that it requests, and the request of that run, which exceeds the quota.
    inner = f"curl -s -o /dev/null -w '%{{http_code}}' --max-time 30 {url} -d true"
    answer = await coordinator.run(curl_run(inner), "?raw=1")
    assert answer.body == b"429\nexit: 0\n200.\nexit: 0\n"

    # However many runs a script requests at once, other clients are served.
    many = (
        f"for i in $(seq 20); do curl -s -o /dev/null -w '%{{http_code}} ' {url} -d 'sleep 0.5' & done; wait"
    )
    asked = Deferred.fromCoroutine(coordinator.run(many, "?raw=1"))
    await deferLater(reactor, 0.5)
    other = await at("127.0.0.2", coordinator).run("echo fine")
    assert other.output("stdout") == "fine\n"
    codes = Counter(re.findall(rb"(\d+) ", (await asked).body))
    assert set(codes) == {b"200", b"429"}, codes
    assert codes[b"429"] >= 10, codes
    assert await stop(coordinator) == 0


async def refusal(harness: Harness, *headers: str) -> tuple[int, str]:
    """Send a request that must be rejected; return the status and the line."""
    received, _ = await harness.request(post("/run", b"another", *headers))
    answer, line = parse_response(received)
    assert 1 <= int(answer.getheader("retry-after") or 0) <= 30
    return answer.status, line.decode().strip()


async def hold(harness: Harness, over: Deferred[None], *headers: str) -> Peer:
    """Begin a run that lasts until it is over."""
    output = b'event: stdout\ndata: "held"\n\n'
    held: Script = (HEAD + chunk(output), over, chunk(EXIT) + LAST_CHUNK, End.CLOSE)
    harness.worker.responses[b"hold"] = lambda: held
    holding = await harness.call(post("/run", b"hold", *headers))
    await holding.receive_until(b"held")
    return holding


@with_twisted
async def test_on_fly_clients_are_distinguished_by_the_proxys_header() -> None:
    no_more = (429, "too many concurrent requests from this client")
    no_worker = (503, "no worker available within 2 s")
    over: Deferred[None] = Deferred()
    async with start_harness(POOLSIZE="1", MAXPERCLIENT="1", MAXWAIT="2s", MAXREQTIME="20s") as harness:
        holding = await hold(harness, over, "Fly-Client-IP: 2001:db8::1")

        assert await refusal(harness, "Fly-Client-IP: 2001:db8::1") == no_more
        assert await refusal(harness, "Fly-Client-IP: 2001:db8::2") == no_more
        others = [
            refusal(harness, "Fly-Client-IP: 2001:db8:0:1::1"),
            refusal(harness, "Fly-Client-IP: nobody"),
            refusal(harness),
        ]
        told = await gatherResults([Deferred.fromCoroutine(other) for other in others])
        assert told[0] == no_worker
        assert sorted(told[1:]) == [no_more, no_worker]  # both count as the proxy's
        over.callback(None)
        assert b"exit" in await holding.receive_all()


@with_twisted
async def test_elsewhere_the_header_is_ignored() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXPERCLIENT="1")
    holding = await coordinator.begin("echo begun; sleep 600")
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", coordinator.port)
    peer: Peer = await connectProtocol(endpoint, Peer())
    await peer.send(post("/run", b"true", "Fly-Client-IP: 203.0.113.7"))
    spoofed, _ = parse_response(await peer.receive_all())

    assert spoofed.status == 429
    assert_over_quota(await coordinator.run("true"))
    holding.leave()
    await coordinator.settle()
    assert (await coordinator.run("true")).status == 200
    assert await stop(coordinator) == 0
