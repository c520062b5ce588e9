"""Requests in JSON and answers in lines, through a real coordinator and its workers."""

from __future__ import annotations

import codecs
import gzip
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest_twisted

from tests.e2e.coordinator import start_coordinator, stop

if TYPE_CHECKING:
    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred

LINES = {"Accept": "application/x-ndjson"}


async def post(running: Running, body: bytes, **headers: str) -> tuple[int, str, str]:
    """Send a request; its status, content type and body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await running.run(body, headers=named)
    return answer.status, answer.headers["content-type"], answer.body.decode()


async def ask(running: Running, **told: object) -> list[dict[str, Any]]:
    """Ask in JSON, and read lines."""
    body = json.dumps(told).encode()
    status, kind, text = await post(running, body, Content_Type="application/json; charset=utf-8", **LINES)
    assert (status, kind) == (200, "application/x-ndjson"), text
    return [json.loads(line) for line in text.splitlines()]


def output(lines: list[dict[str, Any]], stream: str = "stdout") -> str:
    return "".join(line["data"] for line in lines if line["event"] == stream)


@with_twisted
async def test_stdin_env_and_timeout_reach_the_script(coordinator: Running) -> None:
    lines = await ask(
        coordinator,
        script='cat; echo "$A" >&2; echo "$FLY_MACHINE_ID"; exit 3',
        stdin="in\n",
        env={"A": "\u20ac", "FLY_MACHINE_ID": "mine"},
        timeout="15s",
    )

    assert output(lines) == "in\nmine\n"
    assert output(lines, "stderr") == "\u20ac\n"
    assert (lines[-1]["event"], lines[-1]["code"]) == ("exit", 3)


@with_twisted
async def test_a_megabyte_of_input_is_sent_while_output_is_received(coordinator: Running) -> None:
    stdin = "0123456789abcde\n" * 60_000
    assert output(await ask(coordinator, script="cat", stdin=stdin)) == stdin
    assert output(await ask(coordinator, script="echo early", stdin=stdin)) == "early\n"


@with_twisted
async def test_a_timeout_in_the_request_ends_the_run(coordinator: Running) -> None:
    *lines, end = await ask(coordinator, script="echo up; sleep 1000", timeout="1.5s")

    assert output(lines) == "up\n"
    assert (end["code"], end["reason"]) == (124, "timeout")
    assert 1000 <= end["wall_ms"] < 15_000


@with_twisted
async def test_very_short_timeouts_are_reported_as_timeouts(coordinator: Running) -> None:
    for timeout in ("1ns", "1us", "1ms", "10ms", "20ms", "40ms", "60ms", "0.1s"):
        *_, end = await ask(coordinator, script="sleep 1000", timeout=timeout)
        assert (end["event"], end["code"], end["reason"]) == ("exit", 124, "timeout"), (timeout, end)
    body = json.dumps({"script": "sleep 1000", "timeout": "10ms"}).encode()
    answer = await coordinator.run(body, "?raw=1", headers={"Content-Type": "application/json"})
    assert (answer.status, answer.body) == (200, b"\nexit: 124 timeout\n")


@with_twisted
async def test_a_timeout_is_limited_by_maxreqtime(coordinator: Running) -> None:
    *lines, end = await ask(coordinator, script="echo fine", timeout="2562047h47m16.854775807s")
    assert (output(lines), end["code"]) == ("fine\n", 0)


@with_twisted
async def test_maxreqtime_may_be_short() -> None:
    coordinator = await start_coordinator(MAXREQTIME="50ms")
    answer = await coordinator.run("sleep 1000")
    assert (answer.status, answer.exit["code"], answer.exit["reason"]) == (200, 124, "timeout")
    answer = await coordinator.run("sleep 1000", "?raw=1")
    assert (answer.status, answer.body) == (200, b"\nexit: 124 timeout\n")
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_plain_body_is_the_script_with_any_content_type(coordinator: Running) -> None:
    script = b'echo "{\\"script\\"}"'
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/x-sh; a=b", ""):
        status, told, text = await post(coordinator, script, Content_Type=kind)
        assert (status, told) == (200, "text/event-stream; charset=utf-8")
        assert text.startswith('event: stdout\ndata: "{\\"script\\"}\\n"\n\n')


@with_twisted
async def test_invalid_requests_are_rejected_without_a_machine(coordinator: Running) -> None:
    for body, told in [
        (b"echo", "the body is not JSON, at line 1, column 1"),
        (codecs.BOM_UTF8 + b"{}", "the body starts with a byte order mark: send UTF-8 without one"),
        (b'{"script": "", "timeout": "5"}', 'timeout: "5" is not a duration such as 2.5s'),
        (b'{"script": "\\u0000"}', "a script cannot contain a NUL byte"),
    ]:
        status, kind, text = await post(coordinator, body, Content_Type="application/json")
        assert (status, kind, text) == (400, "text/plain; charset=utf-8", told + "\n")


def curl(running: Running, *arguments: str | bytes, data: bytes = b"") -> tuple[int, str, str]:
    """Send a request with curl: the status, the headers, the body."""
    command = [
        "curl",
        "-sN",
        "-i",
        "--max-time",
        "50",
        *arguments,
        f"http://localhost:{running.port}/run?raw=1",
    ]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    head, _, body = done.stdout.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), body.decode()


@with_twisted
async def test_curls_default_content_type_is_accepted_unless_the_body_is_a_form() -> None:
    coordinator = await start_coordinator(MAXBODY="2MiB", MAXPERCLIENT="100")
    for arguments, output in [
        (["-d", "echo hello"], "hello"),
        (["-d", "A=1; echo $A"], "1"),
        (["-d", "X=5 env | grep ^X="], "X=5"),
        (["-d", "A=1&B=2;echo $B"], "2"),
        (["-d", "echo hello", "-H", "Expect: 100-continue"], "hello"),
        (["-d", "A=1&B=2", "-H", "Content-Type: text/plain"], ""),
        (["-H", "Content-Encoding: identity", "-d", "echo hello"], "hello"),
        (["--request-target", f"http://LOCALHOST:{coordinator.port}/run?raw=1", "-d", "echo hello"], "hello"),
        (["--http1.0", "-d", "echo hello"], "hello"),
        (["-H", "Connection: Upgrade, HTTP2-Settings", "-H", "Upgrade: h2c", "-d", "echo hello"], "hello"),
    ]:
        status, head, body = curl(coordinator, *arguments)
        assert status == 200, (arguments, body)
        if output:
            assert body == f"{output}\n\nexit: 0\n", arguments

    # Larger than a megabyte: curl asks first.
    status, _, body = curl(coordinator, "--data-binary", "@-", data=b"echo large\n" + b"#" * (3 << 19))
    assert (status, body) == (200, "large\n\nexit: 0\n")

    lines = b"garbage\necho must not run\n" * 100
    for arguments, data, accepts in [
        (["--data-urlencode", "script=echo hello"], b"", "accept: text/plain, application/json"),
        (["--data-urlencode", "script@-"], b"echo hello\necho again\n", "accept: text/plain"),
        (["--data-urlencode", "@-"], b"#!/bin/bash\necho hello\n", "accept: text/plain"),
        (["-F", "script=echo hello"], b"", "accept: text/plain"),
        (["-F", "script=@-"], b"echo hello\n", "accept: text/plain"),
        (
            ["-H", "Content-Encoding: gzip", "--data-binary", "@-"],
            gzip.compress(lines),
            "accept-encoding: identity",
        ),
        (["-H", "Content-Encoding: br", "--data-binary", "@-"], lines, "accept-encoding: identity"),
        (
            ["-H", "Content-Encoding: identity, gzip", "--data-binary", "@-"],
            lines,
            "accept-encoding: identity",
        ),
        (["-H", "Content-Type: application/gzip", "--data-binary", "@-"], lines, "accept: text/plain"),
        (
            ["-H", "Content-Type: text/plain; charset=utf-16", "--data-binary", "@-"],
            lines,
            "accept: text/plain",
        ),
    ]:
        status, head, body = curl(coordinator, *arguments, data=data)
        assert (status, body.count("\n")) == (415, 1), (arguments, body)
        assert f"\r\n{accepts}" in head
    for arguments in (
        ["-H", "Content-Type: text/plain", "-H", "Content-Type: application/json", "--data-binary", "@-"],
        ["-H", "Content-Range: bytes 0-9/100", "--data-binary", "@-"],
        ["--request-target", "http://elsewhere/run", "--data-binary", "@-"],
    ):
        status, _, body = curl(coordinator, *arguments, data=lines)
        assert (status, body.count("\n")) == (400, 1), (arguments, body)
    status, _, body = curl(coordinator, "--data-binary", "@-", data=codecs.BOM_UTF8 + lines)
    assert (status, body) == (400, "the script starts with a byte order mark: send UTF-8 without one\n")
    status, _, body = curl(coordinator, "-H", "Expect: a-miracle", "--data-binary", "@-", data=lines)
    assert (status, body.count("\n")) == (417, 1)
    recent = json.loads((await coordinator.get("/status")).body)["runs"]["recent"]
    assert {run["outcome"] for run in recent} == {"exit 0"}
    assert await stop(coordinator) == 0
