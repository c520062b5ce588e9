"""
Many idle connections and many slow readers.

BFAAS_CONNECTIONS (default 500) connections are idle; a tenth of that number read their responses slowly.
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
MAX_IDLE_KIB = 24
"""Limit of the coordinator's memory for an idle connection, in KiB."""
MAX_READER_KIB = 512
"""Limit of the coordinator's memory for a slow reader, its worker's connection and its machine, in KiB."""
REQUESTS = 30
"""Requests of other clients, in each phase of the test."""
MAX_LATENCY = 10.0
"""Limit of the time that another client's request takes, in seconds."""


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process, in KiB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1])


async def max_latency(harness: Harness, times: int) -> float:
    """Send requests one after the other; return the duration of the slowest in seconds."""
    slowest = 0.0
    for number in range(times):
        request = post("/run", b"honest", f"Fly-Client-IP: 10.2.0.{number}")
        received, seconds = await harness.request(request)
        assert parse_response(received)[0].status == 200, received
        slowest = max(slowest, seconds)
    return slowest


async def start_slow_reader(harness: Harness, number: int) -> Peer:
    """Request endless output, and stop reading when it begins."""
    request = post("/run", b"endless", f"Fly-Client-IP: 10.1.{number // 250}.{number % 250}")
    peer = await harness.call(request)
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
            await measure_latency_and_memory(harness)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def measure_latency_and_memory(harness: Harness) -> None:
    pid = harness.coordinator.pid
    harness.worker.endless.add(b"endless")
    without_load = await max_latency(harness, REQUESTS)
    before = resident_kib(pid)

    spent = Spent(harness.coordinator)
    started = time.monotonic()
    idle: list[Peer] = []

    async def connect_idle() -> None:
        idle.append(await harness.call(b""))

    for start in range(0, IDLE, 100):
        await together(connect_idle() for _ in range(start, min(start + 100, IDLE)))
    assert spent.lines == 0
    among_idle = await max_latency(harness, REQUESTS)
    with_idle = resident_kib(pid)
    assert harness.coordinator.descriptors() > IDLE
    open_connections = sum(peer.end is None for peer in idle)

    readers: list[Peer] = []

    async def read_slowly(number: int) -> None:
        readers.append(await start_slow_reader(harness, number))

    for start in range(0, READERS, 20):
        await together(read_slowly(number) for number in range(start, min(start + 20, READERS)))
    among_all = 0.0
    for _ in range(REQUESTS):
        await read_a_little(readers)
        among_all = max(among_all, await max_latency(harness, 1))
    with_readers = resident_kib(pid)
    seconds = time.monotonic() - started

    idle_kib = (with_idle - before) / IDLE
    reader_kib = (with_readers - with_idle) / READERS
    print(f"{IDLE} idle: {idle_kib:.1f} KiB each; {READERS} slow readers: {reader_kib:.1f} KiB each")
    latencies = ", ".join(f"{latency:.3f} s" for latency in (without_load, among_idle, among_all))
    print(f"slowest of {REQUESTS} requests without load, with idle connections, with all: {latencies}")
    print(f"duration: {seconds:.1f} s")
    assert open_connections == IDLE
    assert all(peer.end is None for peer in readers)
    if seconds < Channel.IDLE_TIMEOUT:
        assert all(peer.end is None for peer in idle)
    assert max(among_idle, among_all) < MAX_LATENCY
    assert idle_kib < MAX_IDLE_KIB
    assert reader_kib < MAX_READER_KIB
    # The log has one line for each machine and one for each completed run.
    assert spent.lines <= READERS + 2 * REQUESTS + MAX_LINES
