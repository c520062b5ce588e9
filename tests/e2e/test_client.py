"""Run `bfaas run` as a program, against real coordinators."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.utils import getProcessOutputAndValue

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, reactor, start_coordinator, stop
from tests.support.network import free_port
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from twisted.python.failure import Failure

    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred


class Command(ProcessProtocol):
    """A `bfaas` process, and its output so far."""

    def __init__(
        self, port: int, arguments: tuple[str, ...], stdin: bytes = b"", output: str | None = None
    ) -> None:
        self.output = {1: b"", 2: b""}
        self.ended: Deferred[int] = Deferred()
        environment = {**os.environ, "BFAAS_URL": f"http://127.0.0.1:{port}"}
        words = [sys.executable, "-m", "bfaas.cli.main", *arguments]
        opened = None if output is None else os.open(output, os.O_WRONLY)
        files = {0: "w", 1: "r" if opened is None else opened, 2: "r"}
        process = reactor.spawnProcess(self, sys.executable, words, env=environment, childFDs=files)
        if opened is not None:
            os.close(opened)
        self.pid = process.pid
        process.write(stdin)
        process.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output[childFD] += data

    def processEnded(self, reason: Failure) -> None:
        value: Any = reason.value
        self.ended.callback(value.exitCode if value.signal is None else -value.signal)

    async def end(self) -> tuple[int, bytes, bytes]:
        code = await Deadline(reactor, PATIENCE).run(self.ended)
        return code, self.output[1], self.output[2]

    async def wait_for_output(self, text: bytes) -> None:
        await wait_until(lambda: text in self.output[1], repr(text))


class Terminal(ProcessProtocol):
    """A shell at a terminal."""

    def __init__(self, port: int) -> None:
        self.screen = b""
        self.ended: Deferred[None] = Deferred()
        env = {
            **os.environ,
            "BFAAS": f"{sys.executable} -m bfaas.cli.main",
            "BFAAS_URL": f"http://127.0.0.1:{port}",
            "TERM": "dumb",
        }
        self._process = reactor.spawnProcess(self, "/bin/bash", ["bash", "--norc"], env=env, usePTY=True)

    def type(self, keys: bytes) -> None:
        self._process.write(keys)

    def outReceived(self, data: bytes) -> None:
        self.screen += data

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)

    async def wait_for_text(self, text: bytes) -> None:
        await wait_until(lambda: text in self.screen, repr(text))


async def shell(running: Running, script: str, *words: str, **environ: str) -> tuple[int, bytes, bytes]:
    """Run a shell script in which $BFAAS is the command, with `words` as its arguments."""
    env = {
        **os.environ,
        "BFAAS": f"{sys.executable} -m bfaas.cli.main",
        "BFAAS_URL": f"http://127.0.0.1:{running.port}",
        **environ,
    }
    words = ("-c", script, "bash", *words)
    ended = getProcessOutputAndValue("/bin/bash", words, env, reactor=reactor)
    output, errors, code = await Deadline(reactor, PATIENCE).run(ended)
    return code, output, errors


async def run(running: Running, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    return await Command(running.port, ("run", *arguments), stdin).end()


@with_twisted
async def test_output_and_exit_code_are_those_of_the_script(coordinator: Running) -> None:
    assert await run(coordinator, "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    assert await run(coordinator, "kill -9 $$") == (137, b"", b"")
    assert await run(coordinator, "-", stdin=b"echo from stdin") == (0, b"from stdin\n", b"")
    assert await run(coordinator, "cat", "--stdin", stdin=b"input\n") == (0, b"input\n", b"")


@with_twisted
async def test_variables_are_passed_to_the_script(coordinator: Running) -> None:
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
async def test_invalid_arguments_are_one_line_and_nothing_is_sent(coordinator: Running) -> None:
    for words, line in [
        (("--env", "WHO"), b"--env: 'WHO' is not NAME=VALUE"),
        (("--env", "NO-N=1"), b'env: "NO-N" is not a name: letters, digits, underscores; no digit first'),
        (("--env", "1ST=1"), b'env: "1ST" is not a name: letters, digits, underscores; no digit first'),
        (("--env", "=1"), b'env: "" is not a name: letters, digits, underscores; no digit first'),
        (
            ("--env", "A=\udcff"),
            b"in a request with options, script, variables and names must be UTF-8",
        ),
        (("--timeout", "5"), b'timeout: "5" is not a duration such as 2.5s'),
        (("--timeout", "0s"), b'timeout: "0s" is not above zero'),
        (("--url", "localhost:8000"), b"'localhost:8000' is not a URL such as http://127.0.0.1:8000"),
        (("--url", "http://"), b"'http://' is not a URL such as http://127.0.0.1:8000"),
    ]:
        assert await run(coordinator, *words, "echo sent") == (2, b"", line + b"\n"), words
    assert await run(coordinator, "-f", "/nowhere") == (1, b"", b"/nowhere: No such file or directory\n")


@with_twisted
async def test_unwritable_output_exits_with_74(coordinator: Running) -> None:
    command = Command(coordinator.port, ("run", "echo out; sleep 1000"), output="/dev/full")
    line = b"bfaas: the output cannot be written: No space left on device\n"
    assert await command.end() == (74, b"", line)
    await coordinator.settle()


# Writes 12 MB of random text, and their digest to standard error.
LARGE = "head -c 9000000 /dev/urandom | base64 -w0 > x; cat x; md5sum < x >&2"

# Runs a command with a non-blocking pipe or socket as its standard output, and reads it late.
NONBLOCKING = """
import os, socket, subprocess, sys, time
reader, writer = os.pipe() if sys.argv[1] == "pipe" else [end.detach() for end in socket.socketpair()]
os.set_blocking(writer, False)
process = subprocess.Popen(sys.argv[2:], stdout=writer)
os.close(writer)
time.sleep(2)
while piece := os.read(reader, 65536):
    sys.stdout.buffer.write(piece)
sys.stdout.flush()
sys.exit(process.wait())
"""


@with_twisted
async def test_large_output_is_written_completely_to_slow_readers(coordinator: Running) -> None:
    script = 'set -o pipefail; $BFAAS run "$1" | (sleep 2; md5sum)'
    nonblocking = f'set -o pipefail; {sys.executable} -c "$2" $3 $BFAAS run "$1" | md5sum'
    for unbuffered in ("", "1"):
        for words in (
            (script, LARGE),
            *((nonblocking, LARGE, NONBLOCKING, kind) for kind in ("pipe", "socket")),
        ):
            code, output, errors = await shell(coordinator, *words, PYTHONUNBUFFERED=unbuffered)
            assert (code, output) == (0, errors), (unbuffered, words)
            assert len(output) == 36


@with_twisted
async def test_both_outputs_and_events_are_complete_in_one_pipe(coordinator: Running) -> None:
    lines = "for i in $(seq 20000); do echo out $i; echo err $i >&2; done"
    command = f'{sys.executable} -c "$2" pipe bash -c \'exec $BFAAS run {{}} "$1" 2>&1\' bash "$1"'
    code, output, errors = await shell(coordinator, command.format(""), lines, NONBLOCKING)
    assert (code, errors) == (0, b"")
    for word in (b"out", b"err"):
        numbers = re.findall(rb"^%b (\d+)$" % word, output, re.MULTILINE)
        assert numbers == [b"%d" % number for number in range(1, 20001)]

    code, output, errors = await shell(coordinator, command.format("--json"), lines, NONBLOCKING)
    events = [json.loads(line) for line in output.splitlines()]
    assert (code, errors, events[-1]["code"]) == (0, b"", 0)
    text = "".join(event["data"] for event in events if event["event"] == "stdout")
    assert text == "".join(f"out {number}\n" for number in range(1, 20001))


@with_twisted
async def test_full_disk_exits_with_74_and_keeps_written_data(coordinator: Running, tmp_path: Path) -> None:
    limited = f'cd {tmp_path}; ulimit -f 3000; $BFAAS run "$1" > out; code=$?; wc -c < out; exit $code'
    mounted = f"mount -t tmpfs -o size=3000k none {tmp_path}; {limited.replace('3000;', '30000;')}"
    isolated = 'exec unshare --mount bash -c "$2" bash "$1"'
    cases: list[tuple[tuple[str, ...], bytes]] = [((limited, LARGE), b"File too large")]
    if os.getuid() == 0:
        cases.append(((isolated, LARGE, mounted), b"No space left on device"))
    for words, reason in cases:
        code, output, errors = await shell(coordinator, *words)
        assert (code, output) == (os.EX_IOERR, b"3072000\n")
        assert errors == b"bfaas: the output cannot be written: %b\n" % reason
    await coordinator.settle()


@with_twisted
async def test_closed_streams_are_errors_if_they_are_used(coordinator: Running) -> None:
    fault = b"bfaas: the output cannot be written: Bad file descriptor\n"
    for script, expected in {
        "$BFAAS run 'echo out; exit 3' 2>&-": (3, b"out\n", b""),
        "$BFAAS run 'echo err >&2; exit 3' 2>&-": (3, b"", b""),
        "$BFAAS run 'exit 3' >&-": (3, b"", b""),
        "$BFAAS run 'echo out; sleep 1000' >&-": (74, b"", fault),
        "$BFAAS run --json true >&-": (74, b"", fault),
        "$BFAAS run 'echo err >&2; sleep 1000' 2>/dev/full": (74, b"", b""),
        "$BFAAS run 'echo out; exit 3' <&-": (3, b"out\n", b""),
    }.items():
        assert await shell(coordinator, script) == expected, script
    await coordinator.settle()


@with_twisted
async def test_the_command_ends_by_sigpipe_when_its_reader_exits(coordinator: Running) -> None:
    for options in ("", "--json"):
        script = f"$BFAAS run {options} 'yes' | head -c 3 | wc -c; echo ${{PIPESTATUS[0]}}"
        assert await shell(coordinator, script) == (0, b"3\n141\n", b"")
    await coordinator.settle()


@with_twisted
async def test_signals_are_handled_while_the_reader_does_not_read(coordinator: Running) -> None:
    reader, writer = os.pipe()
    for number in (signal.SIGINT, signal.SIGTERM):
        command = Command(coordinator.port, ("run", "yes"), output=f"/proc/self/fd/{writer}")
        await until_full(writer)
        os.kill(command.pid, number)
        assert await command.end() == (-number, b"", b"")
        await coordinator.settle()
        assert os.read(reader, 65536)
    os.close(reader)
    os.close(writer)


async def until_full(writer: int) -> None:
    """Wait until a pipe is full."""

    await wait_until(lambda: not select.select([], [writer], [], 0)[1], "a full pipe")


@with_twisted
async def test_ctrl_c_at_a_terminal_ends_the_loop_of_a_shell(coordinator: Running) -> None:
    terminal = Terminal(coordinator.port)
    terminal.type(b"for i in 1 2 3; do $BFAAS run 'echo beg''an; sleep 1000'; done; echo again\n")
    await terminal.wait_for_text(b"began")
    terminal.type(b"\x03")
    terminal.type(b"echo co''de $?; exit\n")
    await terminal.wait_for_text(b"code 130")
    await Deadline(reactor, PATIENCE).run(terminal.ended)
    assert terminal.screen.count(b"began") == 1
    await coordinator.settle()


@with_twisted
async def test_timeout_exits_with_124(coordinator: Running) -> None:
    code, output, errors = await run(coordinator, "--timeout", "1s", "echo up; sleep 1000")
    assert (code, output) == (124, b"up\n")
    assert errors == b"bfaas: ended by the coordinator: timeout\n"


@with_twisted
async def test_lost_worker_exits_with_125(coordinator: Running) -> None:
    command = Command(coordinator.port, ("run", "echo up; sleep 1000"))
    await command.wait_for_output(b"up")
    for pid in coordinator.workers():
        os.kill(pid, signal.SIGKILL)
    assert await command.end() == (125, b"up\n", b"bfaas: ended by the coordinator: worker-lost\n")


@with_twisted
async def test_json_prints_one_event_per_line(coordinator: Running) -> None:
    code, output, errors = await run(coordinator, "--json", "echo out; exit 4")
    *lines, end = map(json.loads, output.splitlines())
    assert (code, errors, lines) == (4, b"", [{"event": "stdout", "data": "out\n"}])
    assert (end["event"], end["code"]) == ("exit", 4)


@with_twisted
async def test_a_signal_ends_the_script_and_then_the_command(coordinator: Running) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        command = Command(coordinator.port, ("run", "echo up; sleep 1000"))
        await command.wait_for_output(b"up")
        os.kill(command.pid, number)
        assert await command.end() == (-number, b"up\n", b"")
        await coordinator.settle()


@with_twisted
async def test_rejected_requests_are_one_line_and_exit_with_69(coordinator: Running) -> None:
    code, output, errors = await run(coordinator, "-", stdin=b"a\0b")
    assert (code, output, errors) == (69, b"", b"bfaas: 400: a script cannot contain a NUL byte\n")

    code, output, errors = await run(coordinator, "--url", f"http://127.0.0.1:{free_port()}", ":")
    assert (code, output, errors.count(b"\n")) == (69, b"", 1)
    assert b"does not respond" in errors


@with_twisted
async def test_too_many_requests_exit_with_75() -> None:
    busy = await start_coordinator(MAXPERCLIENT="1")
    first = Command(busy.port, ("run", "echo up; sleep 1000"))
    await first.wait_for_output(b"up")
    code, output, errors = await run(busy, ":")
    assert (code, output, errors.count(b"\n")) == (75, b"", 1)
    assert errors.startswith(b"bfaas: 429: too many concurrent requests from this client (try again in ")
    os.kill(first.pid, signal.SIGINT)
    assert (await first.end())[0] == -signal.SIGINT
    assert await stop(busy) == 0
