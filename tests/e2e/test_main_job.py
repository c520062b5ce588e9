"""The main function: run scripts, stream their complete output, end them in time, leave no process."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults
from twisted.internet.task import LoopingCall, deferLater

from bfaas.deadline import Deadline
from bfaas.system import process_tree
from tests.e2e.coordinator import PATIENCE, TWISTD, reactor, start, start_coordinator, stop
from tests.support.responses import Response

if TYPE_CHECKING:
    from tests.e2e.coordinator import Exchange, Running

# `make load` sets larger values.
RUNS = int(os.environ.get("BFAAS_RUNS", "40"))
MEGABYTES = int(os.environ.get("BFAAS_MEGABYTES", "60"))

MEMORY_BOUND_MB = 120

NAP = 100_000 + os.getpid()
"""Seconds that scripts sleep; unique on this host, so that `sleepers` finds their processes."""

with_twisted = pytest_twisted.ensureDeferred


@with_twisted
async def test_standard_output_and_standard_error_are_separate_events(coordinator: Running) -> None:
    response = await coordinator.run("echo out; echo err >&2; exit 3")

    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["coord"] == "mock"
    assert len(response.headers["worker"]) == 14
    assert ("stdout", "out\n") in response.events
    assert ("stderr", "err\n") in response.events
    assert response.exit["code"] == 3
    assert {"wall_ms", "cpu_ms"} <= set(response.exit)

    raw = await coordinator.run("printf 'a\\0b'; kill -9 $$", "?raw=1")
    assert raw.body == b"a\0b\nexit: 137\n"


@with_twisted
async def test_output_is_streamed_as_it_is_produced(coordinator: Running) -> None:
    first: Deferred[bytes] = Deferred()
    exchange = await coordinator.begin(
        f"echo first; sleep {NAP}", take=lambda data: None if first.called else first.callback(data)
    )

    assert b"first" in await Deadline(reactor, PATIENCE).run(first)
    exchange.leave()
    await coordinator.settle()


@with_twisted
async def test_concurrent_runs_are_complete(coordinator: Running) -> None:
    semaphore = DeferredSemaphore(8)

    def run() -> Deferred[Response]:
        return Deferred.fromCoroutine(coordinator.run("echo out; echo err >&2; exit 3"))

    responses = await gatherResults([semaphore.run(run) for _ in range(RUNS)], consumeErrors=True)

    assert len(responses) == RUNS
    for response in responses:
        assert (response.output("stdout"), response.output("stderr"), response.exit["code"]) == (
            "out\n",
            "err\n",
            3,
        )


@with_twisted
async def test_large_output_is_complete_in_constant_memory() -> None:
    coordinator = await start_coordinator(MAXREQTIME="200s", MAXOUTPUT="1GiB")
    output = f"seq 1 100000000 | head -c {MEGABYTES}M"
    script = f"{output}; echo marker | md5sum; {output} | md5sum"
    digest = hashlib.md5(usedforsecurity=False)
    total, tail, peaks = 0, b"", [0.0]

    def take(data: bytes) -> None:
        nonlocal total, tail
        joined = tail + data
        digest.update(joined[:-200])
        tail = joined[-200:]
        if (total >> 22) != ((total + len(data)) >> 22):
            peaks.extend(coordinator.memory_mb(pid) for pid in coordinator.workers())
        total += len(data)

    exchange = await coordinator.begin(script, "?raw=1", take)
    await exchange.end(4 * PATIENCE)
    marker = hashlib.md5(b"marker\n", usedforsecurity=False).hexdigest().encode()
    rest, found, after = tail.partition(marker)
    digest.update(rest)
    expected, end = after.split(b"\n")[1].split()[0].decode(), after.split(b"\n", 2)[2]

    assert found
    assert end == b"\nexit: 0\n"
    assert digest.hexdigest() == expected
    assert 0 < max(peaks) < MEMORY_BOUND_MB
    assert coordinator.memory_mb() < MEMORY_BOUND_MB
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_slow_reader_pauses_the_script_in_constant_memory() -> None:
    coordinator = await start_coordinator(MAXREQTIME="60s", MAXOUTPUT="100GiB")
    received, started = 0, reactor.seconds()
    exchange: Exchange | None = None

    def take(data: bytes) -> None:
        nonlocal received
        received += len(data)
        if exchange is not None:  # output may arrive together with the head of the response
            exchange.reader.transport.pauseProducing()

    def resume() -> None:
        # One megabyte per second.
        if exchange is not None and received < 1e6 * (reactor.seconds() - started):
            exchange.reader.transport.resumeProducing()

    exchange = await coordinator.begin("yes", "?raw=1", take)
    reading = LoopingCall(resume)
    reading.start(0.01)
    await deferLater(reactor, 4)
    peak = max(coordinator.memory_mb(pid) for pid in coordinator.workers())
    reading.stop()
    exchange.leave()
    await coordinator.settle()

    assert 0 < received < 20_000_000
    assert peak < MEMORY_BOUND_MB
    assert coordinator.memory_mb() < MEMORY_BOUND_MB
    assert await stop(coordinator) == 0


@with_twisted
async def test_the_deadline_ends_a_run_whose_client_does_not_read() -> None:
    coordinator = await start_coordinator(MAXREQTIME="1s", MAXOUTPUT="100GiB")
    exchange = await coordinator.begin("yes", "?raw=1")
    exchange.reader.transport.pauseProducing()
    while b"timeout" not in coordinator.program.output:
        await deferLater(reactor, 0.05)
    await coordinator.settle()
    exchange.leave()

    assert await stop(coordinator) == 0


ENDLESS_SCRIPTS = {
    "spin": "trap '' TERM INT HUP; while :; do :; done",
    "session": f"setsid sleep {NAP} & sleep {NAP}",
    "many processes": f"for i in $(seq 200); do sleep {NAP} & done; wait",
    "daemon": f"(setsid bash -c 'sleep {NAP} & sleep {NAP}' &) ; sleep {NAP}",
    "stopped shell": f"kill -STOP $$; sleep {NAP}",
    "pipe": f"sleep {NAP} | cat",
}

SCRIPTS_WITH_ORPHANS = {
    "background": f"sleep {NAP} & echo done",
    "session": f"setsid sleep {NAP} & echo done",
    "many processes": f"for i in $(seq 200); do sleep {NAP} & done; echo done",
    "daemon": f"(setsid bash -c 'sleep {NAP} & sleep {NAP}' &) ; echo done",
}


@pytest.mark.parametrize("sandboxed", [True, False], ids=["bwrap", "no-bwrap"])
@with_twisted
async def test_hostile_scripts_end_and_leave_no_process(sandboxed: bool, tmp_path: Path) -> None:
    coordinator = await start_coordinator(MAXREQTIME="2s", **path_setting(sandboxed, tmp_path))

    for name, script in ENDLESS_SCRIPTS.items():
        response = await coordinator.run(f"echo started; {script}")
        assert response.output("stdout") == "started\n", name
        assert (response.exit["code"], response.exit["reason"]) == (124, "timeout"), name
    for name, script in SCRIPTS_WITH_ORPHANS.items():
        response = await coordinator.run(script)
        assert (response.output("stdout"), response.exit["code"]) == ("done\n", 0), name
    await coordinator.settle()

    assert (b"NO SANDBOX" in coordinator.program.output) is not sandboxed
    assert await stop(coordinator) == 0
    assert not sleepers()


@with_twisted
async def test_clients_that_disconnect_at_any_moment_leave_nothing_behind(coordinator: Running) -> None:
    await coordinator.run("true")
    await coordinator.settle()
    before = coordinator.descriptors()
    rng = random.Random(3)

    async def disconnect() -> None:
        run = Deferred.fromCoroutine(coordinator.run(f"echo started; sleep {NAP}"))
        run.addErrback(lambda _: None)
        await deferLater(reactor, rng.uniform(0, 2))
        run.cancel()

    await gatherResults([Deferred.fromCoroutine(disconnect()) for _ in range(40)])
    await coordinator.settle()

    responses = await gatherResults([Deferred.fromCoroutine(coordinator.run("echo fine")) for _ in range(2)])
    assert [response.output("stdout") for response in responses] == ["fine\n", "fine\n"]
    await coordinator.settle()
    await deferLater(reactor, 0.3)
    assert coordinator.descriptors() <= before + 2
    assert b"Traceback" not in coordinator.program.output
    assert not sleepers()


@with_twisted
async def test_requests_without_a_script_use_no_machine(own_coordinator: Running) -> None:
    assert (await own_coordinator.get("/nothing")).status == 404
    assert (await own_coordinator.get("/run")).status == 405
    assert (await own_coordinator.get("/favicon.ico")).body == b"not found\n"
    assert (await own_coordinator.run(b"echo \0")).status == 400
    assert (await own_coordinator.run(b"#" * ((1 << 20) + 1))).status == 413

    assert own_coordinator.processes() == []
    assert b"created" not in own_coordinator.program.output


@with_twisted
async def test_queue_wait_and_queue_length_are_limited() -> None:
    coordinator = await start_coordinator(POOLSIZE="1", MAXWAIT="3s", MAXQUEUE="1")
    running = await coordinator.begin(f"echo started; sleep {NAP}")
    queued = Deferred.fromCoroutine(coordinator.run("echo late"))
    await deferLater(reactor, 0.1)
    rejected = await coordinator.run("echo rejected")
    timed_out = await queued

    assert (rejected.status, rejected.body) == (503, b"too many requests are waiting\n")
    assert (timed_out.status, timed_out.body) == (503, b"no worker available within 3 s\n")
    assert int(timed_out.headers["retry-after"]) >= 1
    running.leave()
    await coordinator.settle()
    assert await stop(coordinator) == 0


@pytest.mark.parametrize("query", ["", "?raw=1"])
@with_twisted
async def test_a_killed_worker_is_reported_as_lost(coordinator: Running, query: str) -> None:
    pieces: list[bytes] = []
    started: Deferred[None] = Deferred()

    def take(data: bytes) -> None:
        pieces.append(data)
        if not started.called:
            started.callback(None)

    exchange = await coordinator.begin(f"echo started; sleep {NAP}", query, take)
    await Deadline(reactor, PATIENCE).run(started)
    [worker] = coordinator.workers()
    os.kill(worker, signal.SIGKILL)
    await exchange.end()

    body = b"".join(pieces)
    if query:
        assert body == b"started\n\nexit: 125 worker-lost\n"
    else:
        exit_ = Response(200, {}, body).exit
        assert (exit_["code"], exit_["reason"]) == (125, "worker-lost")
    assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@with_twisted
async def test_sigterm_completes_running_requests_and_exits_with_0(number: signal.Signals) -> None:
    coordinator = await start_coordinator(POOLSIZE="1")
    started: Deferred[None] = Deferred()
    pieces: list[bytes] = []

    def take(data: bytes) -> None:
        pieces.append(data)
        if not started.called:
            started.callback(None)

    exchange = await coordinator.begin("echo started; sleep 1; echo ended", "?raw=1", take)
    await started
    queued = Deferred.fromCoroutine(coordinator.run("true"))
    await deferLater(reactor, 0.1)
    coordinator.kill(number)
    rejected = await queued
    await exchange.end()
    status = await Deadline(reactor, PATIENCE).run(coordinator.program.ended)

    assert (rejected.status, rejected.body) == (503, b"shutting down\n")
    assert b"".join(pieces) == b"started\nended\n\nexit: 0\n"
    assert status == 0


@pytest.mark.parametrize("sandboxed", [True, False], ids=["bwrap", "no-bwrap"])
@with_twisted
async def test_a_killed_coordinator_leaves_no_worker(sandboxed: bool, tmp_path: Path) -> None:
    coordinator = await start_coordinator(**path_setting(sandboxed, tmp_path))
    exchange = await coordinator.begin(f"sleep {NAP} & sleep {NAP}")
    exchange.reader.done.addErrback(lambda _: None)
    while not sleepers():
        await deferLater(reactor, 0.05)
    processes = coordinator.processes()
    coordinator.kill(signal.SIGKILL)
    await coordinator.program.ended

    for _ in range(int(PATIENCE / 0.05)):
        if not any(map(process_tree.is_running, processes)):
            break
        await deferLater(reactor, 0.05)
    assert not any(map(process_tree.is_running, processes))
    assert not sleepers()


@with_twisted
async def test_invalid_settings_are_reported_together_before_a_port_is_opened() -> None:
    program, _ = start([*TWISTD, "bfaas-coord"], {"WORKER_APP": "mock", "POOLSIZE": "no"})
    status = await Deadline(reactor, PATIENCE).run(program.ended)

    assert status == 1
    problems = sorted(line.split(":")[1].strip() for line in program.output.decode().splitlines())
    assert problems == ["MAXREQTIME", "POOLSIZE"]


@pytest.mark.parametrize("option", ["--listen", "--metrics"])
@with_twisted
async def test_a_port_in_use_is_reported_in_one_line(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = [] if option == "--listen" else ["--listen", "tcp:0:interface=127.0.0.1"]
        arguments = [*TWISTD, "bfaas-coord", *listen, option, f"tcp:{port}:interface=127.0.0.1"]
        program, _ = start(arguments, {"WORKER_APP": "mock", "MAXREQTIME": "5s"})
        status = await Deadline(reactor, PATIENCE).run(program.ended)

    assert status == 1
    assert b"Traceback" not in program.output
    assert b"bfaas-coord: Couldn't listen on 127.0.0.1:" in program.output.splitlines()[-1]


def sleepers() -> list[str]:
    """Return the /proc entries of the `sleep` processes that scripts of these tests started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"sleep\0{NAP}\0".encode()):
                found.append(str(path))
        except OSError:
            continue
    return found


def path_setting(sandboxed: bool, directory: Path) -> dict[str, str]:
    """Return the PATH setting of a coordinator that finds bubblewrap, or that finds everything else."""
    if sandboxed:
        if shutil.which("bwrap") is None:
            pytest.skip("bubblewrap is not installed")
        return {}
    for folder in os.environ["PATH"].split(":"):
        for program in Path(folder).glob("*"):
            link = directory / program.name
            if program.name != "bwrap" and not link.is_symlink():
                link.symlink_to(program)
    return {"PATH": str(directory)}
