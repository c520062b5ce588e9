"""Run the commands in the documents as a shell runs them, and compare their output with the documents."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.utils import getProcessOutputAndValue

from bfaas.deadline import Deadline
from bfaas.machines.api import State
from tests.e2e.coordinator import PATIENCE, reactor, start_coordinator, start_program, stop
from tests.e2e.fly import start_fly
from tests.support.network import free_port
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from twisted.python.failure import Failure

    from tests.e2e.coordinator import Running

BIN = Path(sys.executable).parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
with_twisted = pytest_twisted.ensureDeferred


class Block(NamedTuple):
    """A code block of a document."""

    document: str
    text: str


class Example(NamedTuple):
    """A command that a document shows at a prompt, and its output."""

    command: str
    output: str


BLOCKS = [
    Block(path.name, text)
    for path in PATHS
    for text in re.findall(r"(?ms)^```\n(.*?)^```$", path.read_text())
]
CONSOLE = [block for block in BLOCKS if block.text.startswith("$ ")]
EMULATOR = [block for block in CONSOLE if "FLY_FLAPS_BASE_URL" in block.text]
STATUS = [block for block in CONSOLE if "/status" in block.text]
ACCESS = [block for block in CONSOLE if "bfaas token" in block.text]
BACKGROUND = [block for block in BLOCKS if re.search(r" &$", block.text, re.MULTILINE)]
DEPLOYMENT = [block for block in BLOCKS if block.text.startswith("fly ")]
LOG_LINES = [block for block in BLOCKS if block.text.startswith("run ")]
PYTHON = [block for block in BLOCKS if block.text.startswith(">>> ")]
MCP_CONFIGURATION = [block for block in BLOCKS if re.match(r"{\s*\"mcpServers|\[mcp_servers", block.text)]
SERVER = [block for block in BLOCKS if block.document == "deploy-docker.md"]
MAKE = [block for block in BLOCKS if block.text.startswith("make ")]


def examples(block: Block) -> Iterator[Example]:
    """Return the commands of a block of a terminal's contents."""
    lines = iter(block.text.splitlines(keepends=True))
    command, output = "", ""
    for line in lines:
        if not line.startswith("$ "):
            output += line
            continue
        if command:
            yield Example(command, output)
        command, output = line[2:], ""
        while command.endswith("\\\n"):
            command += next(lines)
        if end := re.search(r"<<'(\w+)'", command):
            while not command.endswith(f"\n{end[1]}\n"):
                command += next(lines)
    yield Example(command, output)


def masked(text: str) -> list[str]:
    """Return the lines of an output that are not empty, sorted, without varying parts."""
    text = re.sub(r'"(\w+_ms)": \d+', r'"\1": MS', text)
    text = re.sub(r"\b[0-9a-f]{14,16}\b", "ID", text)
    text = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", text)
    text = re.sub(r"\b(\d+m)?\d+s\b", "SPAN", text)
    # Two writes can be one event, or two.
    text = text.replace('\\n"}\n{"event": "stdout", "data": "', "\\n")
    # The order of the two output streams, and the width of a table's columns, may differ.
    return sorted(re.sub(" +", " ", line).rstrip() for line in text.splitlines() if line)


async def shell(script: str, port: int) -> str:
    """Run a script in bash. Return what it writes to standard output and standard error."""
    script = script.replace(".venv/bin", str(BIN)).replace("localhost:8000", f"127.0.0.1:{port}")
    environ = {**os.environ, "BFAAS_URL": f"http://127.0.0.1:{port}"}
    done = getProcessOutputAndValue("/bin/bash", ("-c", f"exec 2>&1\n{script}"), environ, reactor=reactor)
    output, _, _ = await Deadline(reactor, PATIENCE).run(done)
    text: str = output.decode()
    return text


def shape(value: Any) -> Any:
    """Return the structure of JSON data: its keys, and the types of its values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value[:1]] if isinstance(value, list) else type(value).__name__


def recipe(target: str) -> str:
    """Return the last command of a target of the Makefile."""
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={BIN.parent}"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return output.replace("\\\n", "").splitlines()[-1]


def test_every_command_is_run() -> None:
    assert (
        len(ACCESS)
        == len(EMULATOR)
        == len(STATUS)
        == len(BACKGROUND)
        == len(DEPLOYMENT)
        == len(LOG_LINES)
        == 1
    )
    assert len(CONSOLE) >= 10
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert {block.text.split()[1] for block in MAKE} <= targets
    known = [*CONSOLE, *BACKGROUND, *DEPLOYMENT, *LOG_LINES, *MAKE, *PYTHON, *MCP_CONFIGURATION, *SERVER]
    for block in BLOCKS:
        is_drawing = re.search("[─│▶]", block.text)
        is_table = block.document == "performance.md"
        assert block in known or is_drawing or is_table, block


@pytest_twisted.async_yield_fixture
async def started_by_make() -> AsyncIterator[Running]:
    """Run a coordinator with the settings of `make run`."""
    command = f'exec env {recipe("run")} "$@"'
    running = await start_program(["-c", command, "bash"], free_port(), {}, ["/bin/bash"])
    yield running
    assert await stop(running) == 0, running.program.output.decode()


@with_twisted
async def test_examples_print_what_the_documents_show(started_by_make: Running) -> None:
    run = set()
    for block in CONSOLE:
        if block in EMULATOR or block in STATUS or block in ACCESS:
            continue
        for example in examples(block):
            if example in run or ("no network" in example.command and shutil.which("bwrap") is None):
                continue
            run.add(example)
            output = await shell(example.command, started_by_make.port)
            assert masked(output) == masked(example.output), example.command


@with_twisted
async def test_access_token_is_used_and_revoked_as_documented(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.touch()
    coordinator = await start_coordinator(ACCESS_TOKENS=f"@{tokens}")
    [block] = ACCESS
    commands, outputs = zip(*examples(block), strict=True)
    output = await shell(f"cd {tmp_path}\n{''.join(commands)}", coordinator.port)
    assert output == "".join(outputs)
    assert await stop(coordinator) == 0


def test_python_examples(started_by_make: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BFAAS_URL", f"http://127.0.0.1:{started_by_make.port}")
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    for block in PYTHON:
        text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{started_by_make.port}")
        runner.run(doctest.DocTestParser().get_doctest(text, {}, block.document, None, None))
    assert runner.tries > 5
    assert runner.failures == 0


@with_twisted
async def test_status_and_log_line_have_the_documented_fields(started_by_make: Running) -> None:
    await started_by_make.run("true")
    [status] = STATUS
    [example] = examples(status)
    expected = json.loads(example.output)
    actual = json.loads(await shell(example.command, started_by_make.port))
    del expected["pool"]["machines"], actual["pool"]["machines"]
    assert shape(actual) == shape(expected)

    def numbers_masked(text: str) -> str:
        return re.sub(r"\d+", "N", re.sub(r"\b[0-9a-f]{14,16}\b", "ID", text))

    [line] = LOG_LINES
    log = started_by_make.program.output.decode()
    assert numbers_masked(line.text.rstrip("\n")) in numbers_masked(log)


@with_twisted
async def test_machines_of_the_emulator_are_listed_and_destroyed() -> None:
    fly = await start_fly()
    coordinator = await start_coordinator(**fly.settings("coord-1", 1))
    await coordinator.run("true")

    async def is_stopped() -> bool:
        return list((await fly.machines_of_pool("coord-1")).values()) == [State.STOPPED]

    await wait_until(is_stopped)
    [block] = EMULATOR
    commands, outputs = zip(*examples(block), strict=True)
    script = "".join(commands).replace("=local", "=secret").replace("4280", str(fly.emulator.port))
    output = await shell(f"exec <<< y\n{script}", 0)
    assert masked(output) == masked("".join(outputs).replace("[y/N] y\n", "[y/N] "))
    assert await stop(coordinator) == 0
    assert await stop(fly.emulator) == 0


RECORDER = """#!/bin/bash
printf '%s' "${0##*/}" >> "$CALLS"
printf ' %q' "$@" >> "$CALLS"
echo >> "$CALLS"
[ "$1 $2" != "tokens create" ] || echo "FlyV1 fm2_token"
"""


@with_twisted
async def test_deployment_uses_the_apps_of_the_files(tmp_path: Path) -> None:
    for name in ("fly", "curl", "updateWorker.sh"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    [block] = DEPLOYMENT
    calls = tmp_path / "calls"
    setup = f"set -e; cd {tmp_path}; export PATH={tmp_path}:$PATH CALLS={calls}\n"
    assert await shell(setup + block.text, 0) == ""

    coord, basher = (
        tomllib.loads((ROOT / name).read_text())["app"] for name in ("fly.toml", "fly.toml.basher")
    )
    recorded = calls.read_text()
    assert [line.split()[0] for line in recorded.splitlines()].count("fly") == 6
    assert set(re.findall(r"--app (\S+)", recorded)) == {coord, basher}
    secrets = (
        rf"(?m)^fly secrets set --stage --app {coord} PRIVATE=[0-9a-f]{{128}} FLY_TOKEN=FlyV1\\ fm2_token$"
    )
    assert re.search(secrets, recorded), recorded
    assert recorded.splitlines()[-3:] == [
        "updateWorker.sh ''",
        "fly deploy",
        f"curl -sN https://{coord}.fly.dev/run -d uptime",
    ]


class Terminal(ProcessProtocol):
    """A shell at a terminal, into which a block is pasted."""

    def __init__(self, shell: list[str], block: str, home: Path) -> None:
        self.screen = b""
        self.ended: Deferred[None] = Deferred()
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "dumb", "HOME": str(home), "PS1": "> "}
        process = reactor.spawnProcess(self, f"/bin/{shell[0]}", shell, env=env, path=str(home), usePTY=True)
        process.write(block.encode() + b"wait; exit\n")

    def outReceived(self, data: bytes) -> None:
        self.screen += data

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)


@pytest.mark.parametrize("shell", [["bash", "--norc", "-i"], ["dash", "-i"]], ids=lambda shell: shell[0])
@with_twisted
async def test_pasted_block_with_a_background_program_works(shell: list[str], tmp_path: Path) -> None:
    [block] = BACKGROUND
    text = block.text.replace(".venv/bin", str(BIN)).replace("8001", str(free_port()))
    terminal = Terminal(shell, text, tmp_path)
    await Deadline(reactor, PATIENCE).run(terminal.ended)
    assert b"hello\r\n\r\nexit: 0\r\n" in terminal.screen, terminal.screen.decode()
