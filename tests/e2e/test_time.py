"""
Three layers of time, each with the other two out of the way: coordinator, worker, lease.

What a run leaves is looked for by a number that its processes sleep for, whose children they have become.
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
CLOCK_SKEW = 10.0
"""Seconds by which something may be late on a machine that has other things to do."""

_numbers = count(random.randrange(10_000_000, 20_000_000))


class Script:
    """A script that outlives any deadline, does not listen to signals, and can be found in /proc."""

    def __init__(self, begin: str = "echo begun") -> None:
        nap = f"sleep {next(_numbers)}"
        self._nap = nap.replace(" ", "\0").encode()
        self.text = f"trap '' HUP INT TERM; {begin}; setsid {nap} & {nap} & while :; do {nap}; done"

    def left(self) -> list[int]:
        """Find its processes, whatever has become of their parents."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if command(pid).startswith(self._nap)]


def has_variable(pid: int, name: str) -> bool:
    """Return whether a variable is in the environment of a process."""
    return name.encode() in [entry.partition(b"=")[0] for entry in environment(pid)]


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@asynccontextmanager
async def fly_on_one_host() -> AsyncIterator[Fly]:
    """Run the emulator, which leaves no process when it ends."""
    fly = await start_fly()
    try:
        yield fly
    finally:
        processes = fly.machines.processes()
        assert await stop(fly.machines) == 0, fly.machines.program.output.decode()
        assert not any(map(process_tree.is_running, processes))


@asynccontextmanager
async def abandoned(coordinator: Running) -> AsyncIterator[Running]:
    """Kill a coordinator at the end, unless it has ended."""
    try:
        yield coordinator
    finally:
        if coordinator.program.status is None and not coordinator.program.ended.called:
            coordinator.kill(signal.SIGKILL)
        await Deadline(reactor, PATIENCE).run(coordinator.program.ended)


# The coordinator's deadline.


@with_twisted
async def test_the_coordinators_deadline_alone_ends_a_run() -> None:
    settings = {"WORKER_APP": "mock", "MAXREQTIME": f"{LIMIT}s", "UNTIMED": "1"}
    coordinator = await start_program(COORD_WITH_TIMING, free_port(), settings)
    script = Script()
    running = Deferred.fromCoroutine(coordinator.run(script.text))
    await wait_until(lambda: len(script.left()) >= 3)
    [worker] = coordinator.workers()
    assert not has_variable(worker, "MAXREQTIME")

    response: Response = await running

    assert (response.exit["code"], response.exit["reason"]) == (124, "timeout")
    assert 1000 * LIMIT <= response.exit["wall_ms"] < 1000 * (LIMIT + CLOCK_SKEW)
    assert response.output("stdout") == "begun\n"
    await coordinator.settle()
    assert script.left() == []
    assert await stop(coordinator) == 0


# The worker's deadline.


@with_twisted
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_the_workers_deadline_alone_ends_a_run(number: signal.Signals) -> None:
    async with fly_on_one_host() as fly:
        settings = fly.settings("p", 1, MAXREQTIME=f"{LIMIT}s")
        async with abandoned(await start_coordinator(**settings)) as coordinator:
            script = Script()
            exchange = await coordinator.begin(script.text)
            started = time.monotonic()
            await wait_until(lambda: len(script.left()) >= 3)
            coordinator.kill(number)

            if number is signal.SIGSTOP:  # the connections stay open: nothing informs the worker
                while time.monotonic() < started + LIMIT - 1:
                    assert script.left()
                    await deferLater(reactor, 0.05)
            await wait_until(
                lambda: not script.left(), timeout=started + LIMIT + CLOCK_SKEW - time.monotonic()
            )

            # The machine stops without a call to the API.
            end = time.monotonic() + LIMIT + CLOCK_SKEW
            while list((await fly.of_pool("p")).values()) != [State.STOPPED]:
                assert time.monotonic() < end
                await deferLater(reactor, 0.05)
            assert fly.machines.processes() == []
            exchange.leave()


@with_twisted
@pytest.mark.parametrize("reads", [True, False])
async def test_the_worker_ends_in_time_even_if_its_client_does_not_read(*, reads: bool) -> None:
    keys, script = genkey(), Script("echo begun" if reads else "yes & echo begun")
    settings = {"PUBLIC": keys.public, "FLY_MACHINE_ID": "m", "MAXREQTIME": f"{LIMIT}s", "HOME": "/tmp"}
    worker = await start_listening("bfaas-basher", free_port(), [], settings)
    pieces: list[bytes] = []
    body = BodyReceiver(pieces.append)
    headers = Headers({"Authorization": [Signer(keys.private).sign("m", time.time())]})
    url, client = f"http://127.0.0.1:{worker.port}/run", HTTPClient(worker.agent)
    posted: Any = await client.post(
        url, data=script.text.encode(), headers=headers, unbuffered=True, reactor=reactor
    )
    started = time.monotonic()
    posted.deliverBody(body)
    if not reads:
        body.transport.pauseProducing()
    await wait_until(lambda: len(script.left()) >= 3)

    await wait_until(lambda: not script.left(), timeout=started + LIMIT + CLOCK_SKEW - time.monotonic())

    if reads:
        await Deadline(reactor, PATIENCE).run(body.done)
        response = Response(posted.code, {}, b"".join(pieces))
        assert (response.exit["code"], response.exit["reason"]) == (124, "timeout")
        assert response.output("stdout") == "begun\n"
    # Output that is not read is held for as long again, not longer.
    assert await Deadline(reactor, LIMIT + CLOCK_SKEW).run(worker.program.ended) == 0
    if not reads:
        assert len(b"".join(pieces)) < 1 << 20
        body.done.addErrback(lambda _: None)
        body.close()


# The lease.


@with_twisted
async def test_the_end_of_the_lease_alone_ends_a_machine() -> None:
    more = {"MAXREQTIME": "2s", "LEASE": "12", "RECONCILE_INTERVAL": "4"}
    async with fly_on_one_host() as fly:
        other = await start_program(COORD_WITH_TIMING, free_port(), fly.settings("q", 1, **more))
        lost = await start_program(COORD_WITH_TIMING, free_port(), fly.settings("p", 1, UNTIMED="1", **more))
        async with abandoned(lost), abandoned(other):
            script = Script()
            exchange = await lost.begin(script.text)
            lost.kill(signal.SIGSTOP)  # its connections stay open, and its worker waits
            await wait_until(lambda: len(script.left()) >= 3)
            [machine_id] = await fly.of_pool("p")
            lease_end = (await fly.api.get_lease(machine_id)).expires_at

            seen = 0
            while machine_id in await fly.of_pool("p"):
                assert time.time() < lease_end + CLOCK_SKEW
                seen += time.time() < lease_end
                await deferLater(reactor, 0.1)

            assert time.time() >= lease_end
            assert seen >= 10, "too few observations before the end of the lease"
            await wait_until(lambda: not script.left(), timeout=CLOCK_SKEW)
            message = re.compile(rb"destroyed worker-p-\w+, whose lease had expired")
            await wait_until(lambda: message.search(other.program.output) is not None)  # after its response
            exchange.leave()
            assert await stop(other) == 0
