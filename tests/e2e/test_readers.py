"""Event streams and NDJSON, read with independent parsers: lines and events are complete for any output."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import httpx_sse
import pytest
import pytest_twisted
import sseclient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred

SCRIPT = r"""
printf 'a\u2028b\u2029c\u0085d\v\f\x1c\x1d\x1e\x7f\r\ne\0f\ufefff\u200b\u009b"\\u2028\\\n'
head -c 300000 /dev/zero
head -c 200000 /dev/zero | tr '\0' '"'
for i in $(seq 4000); do printf '\U1f600\u20ac\u00e9\\'; done
exit 3
"""
OUTPUT = (
    'a\u2028b\u2029c\x85d\v\f\x1c\x1d\x1e\x7f\r\ne\0f\ufefff\u200b\x9b"\\u2028\\\n'
    + "\0" * 300_000
    + '"' * 200_000
    + "\U0001f600\u20ac\xe9\\" * 4000
)
EXPECTED = f"{hashlib.sha256(OUTPUT.encode()).hexdigest()} 3"

# Each program reads a response from its standard input, line by line, and writes the hash of the output and
# the exit code. Lines of event streams and of NDJSON differ in their first characters.
_ASYNCIO = r"""
import asyncio, hashlib, json, sys

async def main():
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    output, code, name = hashlib.sha256(), None, None
    while line := (await reader.readline()).decode():
        if line.startswith("event: "):
            name = line[7:].strip()
        elif line.startswith(("data: ", "{")):
            value = json.loads(line.removeprefix("data: "))
            if line.startswith("{"):
                name = value["event"]
            if name == "exit":
                code = value["code"]
            elif name == "stdout":
                output.update((value["data"] if line.startswith("{") else value).encode())
    print(output.hexdigest(), code)

asyncio.run(main())
"""

_NODE = r"""
const output = require("crypto").createHash("sha256");
let code = null, name = null;
require("readline").createInterface({input: process.stdin, crlfDelay: Infinity}).on("line", (line) => {
    if (line.startsWith("event: ")) {
        name = line.slice(7);
    } else if (line.startsWith("data: ") || line.startsWith("{")) {
        const value = JSON.parse(line.startsWith("{") ? line : line.slice(6));
        if (line.startsWith("{")) name = value.event;
        if (name === "exit") code = value.code;
        else if (name === "stdout") output.update(line.startsWith("{") ? value.data : value);
    } else if (line !== "") {
        throw new Error("invalid line");
    }
}).on("close", () => console.log(output.digest("hex"), code));
"""

_GO = r"""
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

type event struct {
	Event string
	Data  string
	Code  int
}

func main() {
	output, code, name := sha256.New(), -1, ""
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		line := lines.Text()
		data, isData := strings.CutPrefix(line, "data: ")
		parsed := event{Event: name}
		switch {
		case strings.HasPrefix(line, "event: "):
			name = line[7:]
			continue
		case isData && name == "exit", strings.HasPrefix(line, "{"):
			check(json.Unmarshal([]byte(data), &parsed))
		case isData:
			check(json.Unmarshal([]byte(data), &parsed.Data))
		default:
			continue
		}
		if parsed.Event == "exit" {
			code = parsed.Code
		} else if parsed.Event == "stdout" {
			output.Write([]byte(parsed.Data))
		}
	}
	check(lines.Err())
	fmt.Printf("%x %d\n", output.Sum(nil), code)
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
"""


def run_with_curl(coordinator: Running, accept: str) -> bytes:
    """Run the script with curl; return the body of the response."""
    url = f"http://127.0.0.1:{coordinator.port}/run"
    command = ["curl", "-sSN", "--max-time", "60", "-H", f"Accept: {accept}", "--data-binary", "@-", url]
    return subprocess.run(command, input=SCRIPT.encode(), capture_output=True, check=True).stdout


def run_reader(data: bytes, *program: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        program, input=data, capture_output=True, check=False, env={**os.environ, **(environment or {})}
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def summary(events: Iterator[tuple[str, Any]]) -> str:
    """Return the hash of the standard output and the exit code, in the form of EXPECTED."""
    output, code = hashlib.sha256(), None
    for name, value in events:
        if name == "stdout":
            output.update(value.encode())
        elif name == "exit":
            code = value["code"]
    return f"{output.hexdigest()} {code}"


def read_with_httpx(url: str) -> str:
    with (
        httpx.Client(timeout=60) as client,
        httpx_sse.connect_sse(client, "POST", url, content=SCRIPT) as source,
    ):
        return summary((event.event, event.json()) for event in source.iter_sse())


def read_with_httpx_lines(url: str) -> str:
    headers = {"Accept": "application/x-ndjson"}
    with httpx.stream("POST", url, content=SCRIPT, headers=headers, timeout=60) as response:
        events = (json.loads(line) for line in response.iter_lines())
        return summary((event["event"], event.get("data", event)) for event in events)


def read_with_sseclient(url: str) -> str:
    with httpx.stream("POST", url, content=SCRIPT, timeout=60) as response:
        client = sseclient.SSEClient(response.iter_bytes())
        return summary((event.event, json.loads(event.data)) for event in client.events())


@with_twisted
@pytest.mark.parametrize("read", [read_with_httpx, read_with_httpx_lines, read_with_sseclient])
async def test_python_clients_read_every_event(coordinator: Running, read: Callable[[str], str]) -> None:
    assert read(f"http://127.0.0.1:{coordinator.port}/run") == EXPECTED


def read_with_asyncio(data: bytes, _: Path) -> str:
    return run_reader(data, sys.executable, "-c", _ASYNCIO)


def read_with_node(data: bytes, _: Path) -> str:
    return run_reader(data, "node", "-e", _NODE)


def read_with_go(data: bytes, directory: Path) -> str:
    program = directory / "scan"
    if not program.exists():
        source = directory / "main.go"
        source.write_text(_GO)
        environment = {"GO111MODULE": "off", "GOTOOLCHAIN": "local"}
        run_reader(b"", "go", "build", "-o", str(program), str(source), environment=environment)
    return run_reader(data, str(program))


@with_twisted
@pytest.mark.parametrize(
    "read",
    [
        read_with_asyncio,
        pytest.param(
            read_with_node, marks=pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
        ),
        pytest.param(
            read_with_go, marks=pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
        ),
    ],
)
async def test_line_readers_read_every_line(
    coordinator: Running, tmp_path: Path, read: Callable[[bytes, Path], str]
) -> None:
    for accept in ("text/event-stream", "application/x-ndjson"):
        assert read(run_with_curl(coordinator, accept), tmp_path) == EXPECTED, accept


@with_twisted
@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
async def test_jq_reads_every_line(coordinator: Running) -> None:
    lines = run_with_curl(coordinator, "application/x-ndjson")
    assert max(map(len, lines.splitlines())) <= 17 * 1024
    code = run_reader(lines, "jq", "-r", 'if .event == "exit" then .code else empty end')
    assert code == "3"
