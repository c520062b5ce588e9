"""`bfaas mcp` as a program, with the client of the protocol's SDK, against a real coordinator."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tomllib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from mcp import Client as MCPClient
from mcp import MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import BlobResourceContents, EmbeddedResource, ImageContent, TextContent, TextResourceContents
from twisted.internet.threads import deferToThread

from bfaas.access_tokens import AccessToken, generate_token
from bfaas.client import Client
from tests.e2e.coordinator import start_coordinator, stop
from tests.e2e.test_client_library import outcomes, serving, status, url
from tests.e2e.test_readme import BIN, MCP_CONFIGURATION
from tests.support.waiting import block_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from mcp.types import CallToolResult

    from tests.e2e.coordinator import Running
    from tests.e2e.test_readme import Block

with_twisted = pytest_twisted.ensureDeferred

PROGRAM = ["-m", "bfaas.cli.main", "mcp"]
STATES = ("waiting for a machine", "running")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


@asynccontextmanager
async def connected(
    tmp_path: Path, *arguments: str, mode: str = "auto", **environment: str
) -> AsyncIterator[MCPClient]:
    """Start `bfaas mcp`, and connect to it; fail if it writes to standard error."""
    program = StdioServerParameters(
        command=sys.executable,
        args=[*PROGRAM, *arguments],
        env={**environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    log = tmp_path / "stderr"
    with log.open("w") as errors:
        async with MCPClient(stdio_client(program, errors), mode=mode) as client:
            yield client
    assert log.read_text() == ""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(limited())


async def wait_for_outcomes(coordinator: Running, expected: list[str]) -> None:
    with Client(url(coordinator)) as client:
        await asyncio.to_thread(block_until, lambda: outcomes(client) == expected)


class Progress:
    """Records the progress of a call."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.messages: list[str] = []
        self.reported = asyncio.Event()
        self.silent = asyncio.Event()

    async def __call__(self, progress: float, total: float | None, message: str | None) -> None:
        self.times.append(progress)
        self.messages.append(message or "")
        self.reported.set()
        if message == "running" and "4\n" in "".join(self.messages):
            self.silent.set()


def text(result: CallToolResult) -> str:
    [first, *_] = result.content
    assert isinstance(first, TextContent)
    return first.text


def structured(result: CallToolResult) -> dict[str, Any]:
    assert not result.is_error, result
    assert isinstance(result.structured_content, dict)
    return result.structured_content


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_tools_are_listed_and_called(mode: str, coordinator: Running, tmp_path: Path) -> None:
    async def main() -> None:
        async with connected(tmp_path, "--url", url(coordinator), mode=mode) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert set(tools) == {"run_bash", "sandbox_status"}
            schema = tools["run_bash"].input_schema
            assert schema["required"] == ["script"]
            assert set(schema["properties"]) == {
                "script", "stdin", "env", "timeout_seconds", "files", "outputs",
            }  # fmt: skip
            assert all("description" in each for each in schema["properties"].values())
            assert tools["run_bash"].output_schema is not None
            assert "exit_code" in tools["run_bash"].output_schema["required"]

            arguments = {
                "script": "cat; echo $WHO >&2; exit 3", "stdin": "hello\n", "env": {"WHO": "world"},
            }  # fmt: skip
            result = await client.call_tool("run_bash", arguments)
            assert text(result) == "hello\n[stderr]\nworld\n[exit 3]"
            fields = structured(result)
            assert (fields["exit_code"], fields["stdout"], fields["stderr"]) == (3, "hello\n", "world\n")
            assert fields["reason"] is None
            assert not fields["truncated"]
            assert fields["run_id"]

            for data in ('{"a": [1]}', "null", "[]", "7"):
                echoed = await client.call_tool("run_bash", {"script": "cat", "stdin": data})
                assert structured(echoed)["stdout"] == data

            limited = {"script": "echo started; sleep 60", "timeout_seconds": 0.5}
            fields = structured(await client.call_tool("run_bash", limited))
            assert (fields["exit_code"], fields["reason"]) == (124, "timeout")
            assert fields["stdout"] == "started\n"

            fields = structured(await client.call_tool("sandbox_status"))
            assert fields["max_run_seconds"] == 20
            assert (fields["max_request_bytes"], fields["max_output_bytes"]) == (1 << 20, 64 << 20)
            assert (fields["max_machines"], fields["shutting_down"]) == (2, False)

    run(main)


def test_files(coordinator: Running, tmp_path: Path) -> None:
    async def main() -> None:
        async with connected(tmp_path, "--url", url(coordinator), "--max-output", "1000") as client:
            arguments = {
                "script": """
                    ./run
                    sort data.csv > sorted.csv
                    cp plot.png out.png
                    printf 'a\\xff' > binary
                    head -c 5000 /dev/zero | tr '\\0' x > long.txt
                    head -c 4000000 /dev/zero | tr '\\0' '\\377' > huge
                """,
                "files": {
                    "data.csv": "b\na\n",
                    "plot.png": {"base64": base64.b64encode(PNG).decode()},
                    "run": {"base64": base64.b64encode(b"#!/bin/sh\necho ran\n").decode(), "mode": "0755"},
                },
                "outputs": ["sorted.csv", "out.png", "binary", "long.txt", "huge", "missing"],
            }
            result = await client.call_tool("run_bash", arguments)
            fields = structured(result)
            assert fields["stdout"] == "ran\n", fields
            assert {each["name"]: (each["size"], each["complete"]) for each in fields["files"]} == {
                "sorted.csv": (4, True),
                "out.png": (len(PNG), True),
                "binary": (2, True),
                "long.txt": (5000, False),
                "huge": (4_000_000, False),
            }
            assert fields["missing_files"] == [{"name": "missing", "error": "not-found"}]
            assert "[file huge: 4000000 bytes, not returned completely]" in text(result)

            contents: dict[str, Any] = {}
            for content in result.content[1:]:
                if isinstance(content, ImageContent):
                    assert content.mime_type == "image/png"
                    contents["image"] = base64.b64decode(content.data)
                else:
                    assert isinstance(content, EmbeddedResource)
                    resource = content.resource
                    name = str(resource.uri).rpartition("/")[2]
                    if isinstance(resource, TextResourceContents):
                        contents[name] = resource.text
                    else:
                        assert isinstance(resource, BlobResourceContents)
                        contents[name] = base64.b64decode(resource.blob)
            assert contents.pop("long.txt") == f"{500 * 'x'}\n[4000 characters omitted]\n{500 * 'x'}"
            assert contents == {"image": PNG, "sorted.csv": "a\nb\n", "binary": b"a\xff"}

    run(main)


@with_twisted
async def test_truncated_output_is_reported(tmp_path: Path) -> None:
    running = await start_coordinator(MAXOUTPUT="100000")

    async def main() -> None:
        async with connected(tmp_path, BFAAS_URL=url(running)) as client:
            script = "echo begin; head -c 50000 /dev/zero | tr '\\0' x; echo end"
            fields = structured(await client.call_tool("run_bash", {"script": script}))
            assert fields["stdout"].startswith("begin\nxxx")
            assert fields["stdout"].endswith("xxxend\n")
            assert fields["stdout_omitted"] == 20_010
            assert "\n[20010 characters omitted]\n" in fields["stdout"]
            assert (fields["truncated"], fields["dropped_bytes"]) == (True, 0)

            script = "head -c 300000 /dev/zero | tr '\\0' x"
            result = await client.call_tool("run_bash", {"script": script})
            fields = structured(result)
            assert fields["truncated"]
            assert fields["dropped_bytes"] > 100_000
            assert f"[{fields['dropped_bytes']} bytes of output were dropped]" in text(result)

    run(main)
    assert await stop(running) == 0


def test_output_and_silence_are_reported_as_progress(coordinator: Running, tmp_path: Path) -> None:
    async def main() -> None:
        progress = Progress()
        async with connected(tmp_path, "--url", url(coordinator)) as client:
            arguments = {"script": "for i in 1 2 3; do echo $i; sleep 0.5; done; echo 4 >&2; sleep 60"}
            call = asyncio.create_task(client.call_tool("run_bash", arguments, progress_callback=progress))
            await progress.silent.wait()
            call.cancel()
        output = [message for message in progress.messages if message not in STATES]
        assert "".join(output) == "1\n2\n3\n4\n"
        assert len(output) > 1
        assert progress.times == sorted(set(progress.times))

    run(main)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_cancelling_a_call_ends_the_run(mode: str, own_coordinator: Running, tmp_path: Path) -> None:
    async def main() -> None:
        progress = Progress()
        async with connected(tmp_path, "--url", url(own_coordinator), mode=mode) as client:
            arguments = {"script": "echo started; sleep 60"}
            call = asyncio.create_task(client.call_tool("run_bash", arguments, progress_callback=progress))
            await progress.reported.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await wait_for_outcomes(own_coordinator, ["client-disconnected"])
            with pytest.raises(MCPError):
                await client.call_tool("run_bash", arguments, read_timeout_seconds=1)
            await wait_for_outcomes(own_coordinator, 2 * ["client-disconnected"])
            assert structured(await client.call_tool("run_bash", {"script": "true"}))["exit_code"] == 0

    run(main)


@pytest.mark.parametrize("end", ["stdin", signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_server_ends_its_runs(end: str | signal.Signals, own_coordinator: Running) -> None:
    command = [sys.executable, *PROGRAM, "--url", url(own_coordinator)]
    messages: list[dict[str, Any]] = [
        {"id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        }},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": {
            "name": "run_bash", "arguments": {"script": "sleep 60"}, "_meta": {"progressToken": 1},
        }},
    ]  # fmt: skip
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program,
        Client(url(own_coordinator)) as client,
    ):
        assert program.stdin is not None
        assert program.stdout is not None
        for message in messages:
            program.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        program.stdin.flush()
        assert json.loads(program.stdout.readline())["result"]["serverInfo"]["name"] == "bfaas"
        block_until(lambda: client.status()["runs"]["running"] == 1)
        if isinstance(end, str):
            program.stdin.close()
        else:
            program.send_signal(end)
        block_until(lambda: outcomes(client) == ["client-disconnected"])
        expected = 0 if isinstance(end, str) else -end
        assert program.wait(30) == expected


def test_errors_are_results(coordinator: Running, tmp_path: Path) -> None:
    async def failure(client: MCPClient, **arguments: object) -> str:
        result = await client.call_tool("run_bash", arguments)
        assert result.is_error
        return text(result)

    async def main() -> None:
        async with connected(tmp_path, "--url", url(coordinator)) as client:
            message = await failure(client, script="a\0")
            assert message.endswith("400: a script cannot contain a NUL byte (the script was not started)")
            assert "files" in await failure(client, script="true", files={"/etc/passwd": "x"})
            assert "ase64" in await failure(client, script="true", files={"a": {"base64": "?"}})
            assert "mode" in await failure(client, script="true", files={"a": {"base64": "", "mode": "4755"}})
            assert "timeout_seconds" in await failure(client, script="true", timeout_seconds=-1)
            assert "script" in await failure(client)
            assert structured(await client.call_tool("run_bash", {"script": "true"}))["exit_code"] == 0

    run(main)


def test_a_token_is_sent_and_not_shown(tmp_path: Path) -> None:
    async def main(response: bytes, expected: str) -> None:
        with serving(response) as server:
            for arguments, environment in ((["--token", "secret"], {}), ([], {"BFAAS_TOKEN": "secret"})):
                async with connected(tmp_path, "--url", server.url, *arguments, **environment) as client:
                    for tool, parameters in (("run_bash", {"script": "true"}), ("sandbox_status", {})):
                        result = await client.call_tool(tool, parameters)
                        assert result.is_error
                        assert text(result).endswith(expected)
                        assert "secret" not in text(result)
            assert len(server.requests) == 4
            assert all(b"Authorization: Bearer secret\r\n" in request for request in server.requests)

    run(lambda: main(status("401 Unauthorized"), "401: why (the script was not started)"))
    run(lambda: main(status("502 Bad Gateway"), "502: why (the script may have run)"))


@with_twisted
async def test_a_token_gives_access(tmp_path: Path) -> None:
    token = generate_token()
    coordinator = await start_coordinator(ACCESS_TOKENS=str(AccessToken.of("agent", token)))

    async def main() -> None:
        async with connected(tmp_path, "--url", url(coordinator), BFAAS_TOKEN=token) as client:
            result = await client.call_tool("run_bash", {"script": "echo fine"})
            assert structured(result)["stdout"] == "fine\n"
            await client.call_tool("sandbox_status", {})
        async with connected(tmp_path, "--url", url(coordinator)) as client:
            result = await client.call_tool("run_bash", {"script": "true"})
            assert "401: an access token is required" in text(result)

    await deferToThread(run, main)
    assert await stop(coordinator) == 0


@pytest.mark.parametrize("block", MCP_CONFIGURATION, ids=lambda block: block.text.split()[0])
def test_documented_configuration(block: Block, coordinator: Running, tmp_path: Path) -> None:
    content = block.text.replace("/path/to/bfaas/.venv/bin", str(BIN)).replace(
        "http://127.0.0.1:8000", url(coordinator)
    )
    is_json = content.startswith("{")
    configuration = json.loads(content)["mcpServers"] if is_json else tomllib.loads(content)["mcp_servers"]

    async def main() -> None:
        with (tmp_path / "stderr").open("w") as errors:
            program = StdioServerParameters(**configuration["bfaas"])
            async with MCPClient(stdio_client(program, errors)) as client:
                result = await client.call_tool("run_bash", {"script": "echo configured"})
                assert structured(result)["stdout"] == "configured\n"

    run(main)


def test_invalid_arguments() -> None:
    for arguments, message in (
        (["--url", "ftp://host"], b"'ftp://host' is not a URL such as http://127.0.0.1:8000\n"),
        (["--token", "a b"], b"the access token contains characters that no token has\n"),
        (["--max-output", "0"], b"--max-output: must be above zero\n"),
    ):
        done = subprocess.run([sys.executable, *PROGRAM, *arguments], capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", message)


def test_the_missing_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['mcp'] = None; from bfaas.cli.main import main; sys.exit(main(['mcp']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bfaas mcp requires its extra: pip install 'bfaas[mcp]'")
    assert done.stderr.count("\n") == 1
