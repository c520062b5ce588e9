"""
A crowd that only stands there: connections without a request, and clients that hardly read their answers.

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
from tests.e2e.hostile import MAX_LINES, Spent, stage
from tests.support.hostile_worker import post
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.e2e.hostile import Stage
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
    """Tell how much memory a process has now, in KiB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1])


async def serve(there: Stage, times: int) -> float:
    """Make honest requests, one after the other; how long the slowest took."""
    slowest = 0.0
    for number in range(times):
        asked = post("/run", b"honest", f"Fly-Client-IP: 10.2.0.{number}")
        heard, seconds = await there.ask(asked)
        assert parse_response(heard)[0].status == 200, heard
        slowest = max(slowest, seconds)
    return slowest


async def begin_to_read(there: Stage, number: int) -> Peer:
    """Ask for output without end, and stop reading it as soon as it comes."""
    asked = post("/run", b"endless", f"Fly-Client-IP: 10.1.{number // 250}.{number % 250}")
    peer = await there.call(asked)
    await wait_until(lambda: b"event: stdout" in peer.received or peer.end)
    peer.transport.pauseProducing()
    assert peer.end is None, bytes(peer.received)
    return peer


async def read_a_little(peers: list[Peer]) -> None:
    """Let each read one piece."""
    for peer in peers:
        peer.transport.resumeProducing()
        await deferLater(reactor, 0)
        peer.transport.pauseProducing()


@pytest_twisted.ensureDeferred
async def test_idle_and_slow_connections_do_not_delay_other_clients() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        async with stage(POOLSIZE=str(READERS + 2), MAXREQTIME="300s", MAXWAIT="60s") as there:
            await hold_a_crowd(there)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def hold_a_crowd(there: Stage) -> None:
    pid = there.coordinator.pid
    there.worker.endless.add(b"endless")
    alone = await serve(there, HONEST)
    before = resident(pid)

    spent = Spent(there.coordinator)
    began = time.monotonic()
    idle: list[Peer] = []

    async def stand_there() -> None:
        idle.append(await there.call(b""))

    for start in range(0, IDLE, 100):
        await together(stand_there() for _ in range(start, min(start + 100, IDLE)))
    assert spent.lines == 0
    among_idle = await serve(there, HONEST)
    with_idle = resident(pid)
    assert there.coordinator.descriptors() > IDLE
    held = sum(peer.end is None for peer in idle)

    readers: list[Peer] = []

    async def read_slowly(number: int) -> None:
        readers.append(await begin_to_read(there, number))

    for start in range(0, READERS, 20):
        await together(read_slowly(number) for number in range(start, min(start + 20, READERS)))
    among_all = 0.0
    for _ in range(HONEST):
        await read_a_little(readers)
        among_all = max(among_all, await serve(there, 1))
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
