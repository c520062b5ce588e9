"""`bfaas run` as a program, against real coordinators."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from bfaas.deadline import Deadline, sleep
from tests.e2e.coordinator import PATIENCE, free_port, reactor, start_coordinator, stop

if TYPE_CHECKING:
    from twisted.python.failure import Failure

    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred


class Command(ProcessProtocol):
    """The command as it runs."""

    def __init__(
        self, port: int, arguments: tuple[str, ...], stdin: bytes = b"", output: str | None = None
    ) -> None:
        self.said = {1: b"", 2: b""}
        self.ended: Deferred[int] = Deferred()
        environment = {**os.environ, "BFAAS_URL": f"http://127.0.0.1:{port}"}
        words = [sys.executable, "-m", "bfaas.cli", *arguments]
        opened = None if output is None else os.open(output, os.O_WRONLY)
        files = {0: "w", 1: "r" if opened is None else opened, 2: "r"}
        process = reactor.spawnProcess(self, sys.executable, words, env=environment, childFDs=files)
        if opened is not None:
            os.close(opened)
        self.pid = process.pid
        process.write(stdin)
        process.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.said[childFD] += data

    def processEnded(self, reason: Failure) -> None:
        code = getattr(reason.value, "exitCode", None)
        self.ended.callback(-1 if code is None else code)

    async def end(self) -> tuple[int, bytes, bytes]:
        code = await Deadline(reactor, PATIENCE).run(self.ended)
        return code, self.said[1], self.said[2]

    async def until_it_says(self, what: bytes) -> None:
        for _ in range(int(PATIENCE / 0.05)):
            if what in self.said[1]:
                return
            await sleep(reactor, 0.05)
        raise AssertionError(self.said)


async def run(running: Running, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    return await Command(running.port, ("run", *arguments), stdin).end()


@with_twisted
async def test_it_writes_and_exits_as_the_script_does(coordinator: Running) -> None:
    assert await run(coordinator, "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    assert await run(coordinator, "kill -9 $$") == (137, b"", b"")
    assert await run(coordinator, "-", stdin=b"echo from stdin") == (0, b"from stdin\n", b"")
    assert await run(coordinator, "cat", "--stdin", stdin=b"input\n") == (0, b"input\n", b"")


@with_twisted
async def test_variables_reach_the_script(coordinator: Running) -> None:
    words = (
        "--env",
        "WHO=you & me=us",
        "--env",
        "EMPTY=",
        "--env",
        "WHO=ünïcode $x",
        'echo "[$WHO][$EMPTY]"',
    )
    assert await run(coordinator, *words) == (0, "[ünïcode $x][]\n".encode(), b"")
    assert await run(coordinator, "--env", "A=1", "--stdin", "cat; echo $A", stdin=b"in ") == (
        0,
        b"in 1\n",
        b"",
    )


@with_twisted
async def test_wrong_arguments_are_one_line_and_nothing_is_sent(coordinator: Running) -> None:
    for words, line in [
        (("--env", "WHO"), b"--env: 'WHO' is not NAME=VALUE"),
        (("--env", "NO-NAME=1"), b'env: "NO-NAME" is no name: letters, digits, underscores; no digit first'),
        (("--env", "1ST=1"), b'env: "1ST" is no name: letters, digits, underscores; no digit first'),
        (("--env", "=1"), b'env: "" is no name: letters, digits, underscores; no digit first'),
        (("--env", "A=\udcff"), b"with --stdin, --env or --timeout, all of it must be UTF-8"),
        (("--timeout", "5"), b'timeout: "5" is not a duration such as 2.5s'),
        (("--timeout", "0s"), b'timeout: "0s" is not above zero'),
        (("--url", "localhost:8000"), b"'localhost:8000' is not a URL such as http://127.0.0.1:8000"),
        (("--url", "http://"), b"'http://' is not a URL such as http://127.0.0.1:8000"),
    ]:
        assert await run(coordinator, *words, "echo sent") == (2, b"", line + b"\n"), words
    assert await run(coordinator, "-f", "/nowhere") == (1, b"", b"/nowhere: No such file or directory\n")


@with_twisted
async def test_output_that_cannot_be_written_is_74(coordinator: Running) -> None:
    command = Command(coordinator.port, ("run", "echo out; sleep 1000"), output="/dev/full")
    line = b"bfaas: the output cannot be written: No space left on device\n"
    assert await command.end() == (74, b"", line)
    await coordinator.settle()


@with_twisted
async def test_a_run_that_is_over_its_time_ends_with_124(coordinator: Running) -> None:
    code, output, errors = await run(coordinator, "--timeout", "1s", "echo up; sleep 1000")
    assert (code, output) == (124, b"up\n")
    assert errors == b"bfaas: ended by the coordinator: timeout\n"


@with_twisted
async def test_a_lost_worker_is_125(coordinator: Running) -> None:
    command = Command(coordinator.port, ("run", "echo up; sleep 1000"))
    await command.until_it_says(b"up")
    for pid in coordinator.workers():
        os.kill(pid, signal.SIGKILL)
    assert await command.end() == (125, b"up\n", b"bfaas: ended by the coordinator: worker-lost\n")


@with_twisted
async def test_events_are_printed_as_lines(coordinator: Running) -> None:
    code, output, errors = await run(coordinator, "--json", "echo out; exit 4")
    *lines, end = map(json.loads, output.splitlines())
    assert (code, errors, lines) == (4, b"", [{"event": "stdout", "data": "out\n"}])
    assert (end["event"], end["code"]) == ("exit", 4)


@with_twisted
async def test_an_interrupt_ends_the_script_too(coordinator: Running) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        command = Command(coordinator.port, ("run", "echo up; sleep 1000"))
        await command.until_it_says(b"up")
        os.kill(command.pid, number)
        assert await command.end() == (code, b"up\n", b"")
        await coordinator.settle()


@with_twisted
async def test_refusals_are_one_line_and_a_code_of_their_own(coordinator: Running) -> None:
    code, output, errors = await run(coordinator, "-", stdin=b"a\0b")
    assert (code, output, errors) == (69, b"", b"bfaas: 400: a script cannot contain a NUL byte\n")

    code, output, errors = await run(coordinator, "--url", f"http://127.0.0.1:{free_port()}", ":")
    assert (code, output, errors.count(b"\n")) == (69, b"", 1)
    assert b"does not answer" in errors


@with_twisted
async def test_to_be_told_to_come_back_is_75() -> None:
    busy = await start_coordinator(MAXPERCLIENT="1")
    first = Command(busy.port, ("run", "echo up; sleep 1000"))
    await first.until_it_says(b"up")
    code, output, errors = await run(busy, ":")
    assert (code, output, errors.count(b"\n")) == (75, b"", 1)
    assert errors.startswith(b"bfaas: 429: too many requests of yours are under way (try again in ")
    os.kill(first.pid, signal.SIGINT)
    assert (await first.end())[0] == 130
    assert await stop(busy) == 0
