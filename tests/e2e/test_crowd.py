"""
Many connections without a request, and many clients that hardly read their responses.

BFAAS_CONNECTIONS (500) are idle, a tenth as many read slowly.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_twisted
from twisted.internet.task import deferLater

from bfaas.http.channel import Channel
from tests.e2e.coordinator import reactor, together
from tests.e2e.hostile import MAX_LINES, Spent, start_harness
from tests.support.hostile_worker import post
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.e2e.hostile import Harness
    from tests.support.hostile_worker import Peer

IDLE = int(os.environ.get("BFAAS_CONNECTIONS", "500"))
READERS = IDLE // 10
MAX_IDLE = 24
"""KiB that an idle connection may cost."""
MAX_READER = 512
"""KiB that a client that reads slowly, its worker's connection and its machine may cost."""
HONEST = 30
PATIENCE = 10.0


def resident(pid: int) -> int:
    """Return the resident memory of a process, in KiB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1])


async def serve(harness: Harness, times: int) -> float:
    """Send requests one after the other; return the seconds that the slowest took."""
    slowest = 0.0
    for number in range(times):
        asked = post("/run", b"honest", f"Fly-Client-IP: 10.2.0.{number}")
        received, seconds = await harness.request(asked)
        assert parse_response(received)[0].status == 200, received
        slowest = max(slowest, seconds)
    return slowest


async def start_slow_reader(harness: Harness, number: int) -> Peer:
    """Request output without end, and stop reading as soon as it begins."""
    asked = post("/run", b"endless", f"Fly-Client-IP: 10.1.{number // 250}.{number % 250}")
    peer = await harness.call(asked)
    await wait_until(lambda: b"event: stdout" in peer.received or peer.end)
    peer.transport.pauseProducing()
    assert peer.end is None, bytes(peer.received)
    return peer


async def read_a_little(peers: list[Peer]) -> None:
    """Read one piece on each connection."""
    for peer in peers:
        peer.transport.resumeProducing()
        await deferLater(reactor, 0)
        peer.transport.pauseProducing()


@pytest_twisted.ensureDeferred
async def test_idle_and_slow_connections_do_not_delay_other_clients() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        async with start_harness(POOLSIZE=str(READERS + 2), MAXREQTIME="300s", MAXWAIT="60s") as harness:
            await hold_a_crowd(harness)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def hold_a_crowd(harness: Harness) -> None:
    pid = harness.coordinator.pid
    harness.worker.endless.add(b"endless")
    alone = await serve(harness, HONEST)
    before = resident(pid)

    spent = Spent(harness.coordinator)
    began = time.monotonic()
    idle: list[Peer] = []

    async def connect_idle() -> None:
        idle.append(await harness.call(b""))

    for start in range(0, IDLE, 100):
        await together(connect_idle() for _ in range(start, min(start + 100, IDLE)))
    assert spent.lines == 0
    among_idle = await serve(harness, HONEST)
    with_idle = resident(pid)
    assert harness.coordinator.descriptors() > IDLE
    held = sum(peer.end is None for peer in idle)

    readers: list[Peer] = []

    async def read_slowly(number: int) -> None:
        readers.append(await start_slow_reader(harness, number))

    for start in range(0, READERS, 20):
        await together(read_slowly(number) for number in range(start, min(start + 20, READERS)))
    among_all = 0.0
    for _ in range(HONEST):
        await read_a_little(readers)
        among_all = max(among_all, await serve(harness, 1))
    with_readers = resident(pid)
    seconds = time.monotonic() - began

    each_idle = (with_idle - before) / IDLE
    each_reader = (with_readers - with_idle) / READERS
    print(f"{IDLE} idle: {each_idle:.1f} KiB each; {READERS} slow readers: {each_reader:.1f} KiB each")
    print(f"slowest of {HONEST}: {alone:.3f} s alone, {among_idle:.3f} s, {among_all:.3f} s; {seconds:.1f} s")
    assert held == IDLE
    assert all(peer.end is None for peer in readers)
    if seconds < Channel.IDLE_TIMEOUT:
        assert all(peer.end is None for peer in idle)
    assert max(among_idle, among_all) < PATIENCE
    assert each_idle < MAX_IDLE
    assert each_reader < MAX_READER
    # A line for each machine, and one for each run that has ended.
    assert spent.lines <= READERS + 2 * HONEST + MAX_LINES
