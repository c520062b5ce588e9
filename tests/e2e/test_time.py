"""
The three time limits, each with the other two disabled: coordinator, worker, lease.

The processes of a run are found by the number of seconds that they sleep, also after they were reparented.
"""

from __future__ import annotations

import random
import re
import signal
import time
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers

from bfaas.deadline import Deadline
from bfaas.http.client import BodyReceiver
from bfaas.machines.api import State
from bfaas.system import process_tree
from bfaas.tokens import Signer, genkey
from tests.e2e.coordinator import (
    PATIENCE,
    Running,
    command,
    reactor,
    start_coordinator,
    start_listening,
    start_program,
    stop,
)
from tests.e2e.fly import Fly, start_fly
from tests.support.network import free_port
from tests.support.responses import Response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

with_twisted = pytest_twisted.ensureDeferred

COORD_WITH_TIMING = ["-m", "tests.e2e.coord_with_timing"]
LIMIT = 2.0
"""`MAXREQTIME`, in seconds."""
TOLERANCE = 10.0
"""Tolerated delay on a busy machine, in seconds."""

_numbers = count(random.randrange(10_000_000, 20_000_000))


class Script:
    """A script that never ends, ignores signals, and can be found in /proc."""

    def __init__(self, setup: str = "echo started") -> None:
        sleep = f"sleep {next(_numbers)}"
        self._argv = sleep.replace(" ", "\0").encode()
        self.text = f"trap '' HUP INT TERM; {setup}; setsid {sleep} & {sleep} & while :; do {sleep}; done"

    def processes(self) -> list[int]:
        """Return the ids of its `sleep` processes, whatever their parents."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if command(pid).startswith(self._argv)]


def has_variable(pid: int, name: str) -> bool:
    """Return whether a variable is in the environment of a process."""
    return name.encode() in [entry.partition(b"=")[0] for entry in environment(pid)]


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@asynccontextmanager
async def fly_on_one_host() -> AsyncIterator[Fly]:
    """Run the emulator; check that it leaves no process."""
    fly = await start_fly()
    try:
        yield fly
    finally:
        processes = fly.emulator.processes()
        assert await stop(fly.emulator) == 0, fly.emulator.program.output.decode()
        assert not any(map(process_tree.is_running, processes))


@asynccontextmanager
async def killed_at_exit(coordinator: Running) -> AsyncIterator[Running]:
    """Kill a coordinator on exit, unless it has ended."""
    try:
        yield coordinator
    finally:
        if coordinator.program.status is None and not coordinator.program.ended.called:
            coordinator.kill(signal.SIGKILL)
        await Deadline(reactor, PATIENCE).run(coordinator.program.ended)


# The coordinator's deadline.


@with_twisted
async def test_the_deadline_of_the_coordinator_alone_ends_a_run() -> None:
    settings = {"WORKER_APP": "mock", "MAXREQTIME": f"{LIMIT}s", "UNTIMED": "1"}
    coordinator = await start_program(COORD_WITH_TIMING, free_port(), settings)
    script = Script()
    running = Deferred.fromCoroutine(coordinator.run(script.text))
    await wait_until(lambda: len(script.processes()) >= 3)
    [worker] = coordinator.workers()
    assert not has_variable(worker, "MAXREQTIME")

    response: Response = await running

    assert (response.exit["code"], response.exit["reason"]) == (124, "timeout")
    assert 1000 * LIMIT <= response.exit["wall_ms"] < 1000 * (LIMIT + TOLERANCE)
    assert response.output("stdout") == "started\n"
    await coordinator.settle()
    assert script.processes() == []
    assert await stop(coordinator) == 0


# The worker's deadline.


@with_twisted
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_the_deadline_of_the_worker_alone_ends_a_run(number: signal.Signals) -> None:
    async with fly_on_one_host() as fly:
        settings = fly.settings("p", 1, MAXREQTIME=f"{LIMIT}s")
        async with killed_at_exit(await start_coordinator(**settings)) as coordinator:
            script = Script()
            exchange = await coordinator.begin(script.text)
            started = time.monotonic()
            await wait_until(lambda: len(script.processes()) >= 3)
            coordinator.kill(number)

            if number is signal.SIGSTOP:  # its connections stay open
                while time.monotonic() < started + LIMIT - 1:
                    assert script.processes()
                    await deferLater(reactor, 0.05)
            await wait_until(
                lambda: not script.processes(), timeout=started + LIMIT + TOLERANCE - time.monotonic()
            )

            # The machine stops without an API request.
            end = time.monotonic() + LIMIT + TOLERANCE
            while list((await fly.machines_of_pool("p")).values()) != [State.STOPPED]:
                assert time.monotonic() < end
                await deferLater(reactor, 0.05)
            assert fly.emulator.processes() == []
            exchange.leave()


@with_twisted
@pytest.mark.parametrize("reads", [True, False])
async def test_the_worker_ends_in_time_whether_or_not_its_client_reads(*, reads: bool) -> None:
    keys, script = genkey(), Script("echo started" if reads else "yes & echo started")
    settings = {"PUBLIC": keys.public, "FLY_MACHINE_ID": "m", "MAXREQTIME": f"{LIMIT}s", "HOME": "/tmp"}
    worker = await start_listening("bfaas-basher", free_port(), [], settings)
    pieces: list[bytes] = []
    body = BodyReceiver(pieces.append)
    headers = Headers({"Authorization": [Signer(keys.private).sign("m", time.time())]})
    url, client = f"http://127.0.0.1:{worker.port}/run", HTTPClient(worker.agent)
    response: Any = await client.post(
        url, data=script.text.encode(), headers=headers, unbuffered=True, reactor=reactor
    )
    started = time.monotonic()
    response.deliverBody(body)
    if not reads:
        body.transport.pauseProducing()
    await wait_until(lambda: len(script.processes()) >= 3)

    await wait_until(lambda: not script.processes(), timeout=started + LIMIT + TOLERANCE - time.monotonic())

    if reads:
        await Deadline(reactor, PATIENCE).run(body.done)
        parsed = Response(response.code, {}, b"".join(pieces))
        assert (parsed.exit["code"], parsed.exit["reason"]) == (124, "timeout")
        assert parsed.output("stdout") == "started\n"
    # The worker holds unread output for at most MAXREQTIME after the deadline.
    assert await Deadline(reactor, LIMIT + TOLERANCE).run(worker.program.ended) == 0
    if not reads:
        assert len(b"".join(pieces)) < 1 << 20
        body.done.addErrback(lambda _: None)
        body.close()


# The lease.


@with_twisted
async def test_the_end_of_the_lease_alone_ends_a_machine() -> None:
    common = {"MAXREQTIME": "2s", "LEASE": "12", "RECONCILE_INTERVAL": "4"}
    async with fly_on_one_host() as fly:
        other = await start_program(COORD_WITH_TIMING, free_port(), fly.settings("q", 1, **common))
        lost = await start_program(
            COORD_WITH_TIMING, free_port(), fly.settings("p", 1, UNTIMED="1", **common)
        )
        async with killed_at_exit(lost), killed_at_exit(other):
            script = Script()
            exchange = await lost.begin(script.text)
            lost.kill(signal.SIGSTOP)  # its connections stay open, and its worker continues
            await wait_until(lambda: len(script.processes()) >= 3)
            [machine_id] = await fly.machines_of_pool("p")
            lease_end = (await fly.api.get_lease(machine_id)).expires_at

            observations = 0
            while machine_id in await fly.machines_of_pool("p"):
                assert time.time() < lease_end + TOLERANCE
                observations += time.time() < lease_end
                await deferLater(reactor, 0.1)

            assert time.time() >= lease_end
            assert observations >= 10, "too few observations before the end of the lease"
            await wait_until(lambda: not script.processes(), timeout=TOLERANCE)
            # The log line follows the API response.
            message = re.compile(rb"destroyed worker-p-\w+, whose lease had expired")
            await wait_until(lambda: message.search(other.program.output) is not None)
            exchange.leave()
            assert await stop(other) == 0
