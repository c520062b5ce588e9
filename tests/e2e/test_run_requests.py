"""Requests to `POST /run`: JSON and plain bodies, NDJSON responses, rejected requests."""

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

ACCEPT_NDJSON = {"Accept": "application/x-ndjson"}


async def post(running: Running, body: bytes, **headers: str) -> tuple[int, str, str]:
    """Send a request; return the status, the content type and the body of its response."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await running.run(body, headers=fields)
    return response.status, response.headers["content-type"], response.body.decode()


async def run_json(running: Running, **fields: object) -> list[dict[str, Any]]:
    """Send a request in JSON; return the events of its NDJSON response."""
    body = json.dumps(fields).encode()
    status, content_type, text = await post(
        running, body, Content_Type="application/json; charset=utf-8", **ACCEPT_NDJSON
    )
    assert (status, content_type) == (200, "application/x-ndjson"), text
    return [json.loads(line) for line in text.splitlines()]


def output(events: list[dict[str, Any]], stream: str = "stdout") -> str:
    return "".join(event["data"] for event in events if event["event"] == stream)


@with_twisted
async def test_stdin_env_and_timeout_reach_the_script(coordinator: Running) -> None:
    events = await run_json(
        coordinator,
        script='cat; echo "$A" >&2; echo "$FLY_MACHINE_ID"; exit 3',
        stdin="in\n",
        env={"A": "\u20ac", "FLY_MACHINE_ID": "mine"},
        timeout="15s",
    )

    assert output(events) == "in\nmine\n"
    assert output(events, "stderr") == "\u20ac\n"
    assert (events[-1]["event"], events[-1]["code"]) == ("exit", 3)


@with_twisted
async def test_a_megabyte_of_input_is_sent_while_output_is_received(coordinator: Running) -> None:
    stdin = "0123456789abcde\n" * 60_000
    assert output(await run_json(coordinator, script="cat", stdin=stdin)) == stdin
    assert output(await run_json(coordinator, script="echo early", stdin=stdin)) == "early\n"


@with_twisted
async def test_a_run_ends_at_the_timeout_of_its_request(coordinator: Running) -> None:
    *events, end = await run_json(coordinator, script="echo up; sleep 1000", timeout="1.5s")

    assert output(events) == "up\n"
    assert (end["code"], end["reason"]) == (124, "timeout")
    assert 1000 <= end["wall_ms"] < 15_000


@with_twisted
async def test_very_short_timeouts_are_reported_as_timeouts(coordinator: Running) -> None:
    for timeout in ("1ns", "1us", "1ms", "10ms", "20ms", "40ms", "60ms", "0.1s"):
        *_, end = await run_json(coordinator, script="sleep 1000", timeout=timeout)
        assert (end["event"], end["code"], end["reason"]) == ("exit", 124, "timeout"), (timeout, end)
    body = json.dumps({"script": "sleep 1000", "timeout": "10ms"}).encode()
    response = await coordinator.run(body, "?raw=1", headers={"Content-Type": "application/json"})
    assert (response.status, response.body) == (200, b"\nexit: 124 timeout\n")


@with_twisted
async def test_a_timeout_above_maxreqtime_is_accepted(coordinator: Running) -> None:
    *events, end = await run_json(coordinator, script="echo fine", timeout="2562047h47m16.854775807s")
    assert (output(events), end["code"]) == ("fine\n", 0)


@with_twisted
async def test_runs_time_out_with_a_very_short_maxreqtime() -> None:
    coordinator = await start_coordinator(MAXREQTIME="50ms")
    response = await coordinator.run("sleep 1000")
    assert (response.status, response.exit["code"], response.exit["reason"]) == (200, 124, "timeout")
    response = await coordinator.run("sleep 1000", "?raw=1")
    assert (response.status, response.body) == (200, b"\nexit: 124 timeout\n")
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_plain_body_is_the_script_with_any_content_type(coordinator: Running) -> None:
    script = b'echo "{\\"script\\"}"'
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "application/x-sh; a=b", ""):
        status, response_type, text = await post(coordinator, script, Content_Type=content_type)
        assert (status, response_type) == (200, "text/event-stream; charset=utf-8")
        assert text.startswith('event: stdout\ndata: "{\\"script\\"}\\n"\n\n')


@with_twisted
async def test_invalid_requests_are_rejected_without_a_machine(coordinator: Running) -> None:
    for body, reason in [
        (b"echo", "the body is not JSON, at line 1, column 1"),
        (codecs.BOM_UTF8 + b"{}", "the body starts with a byte order mark: send UTF-8 without one"),
        (b'{"script": "", "timeout": "5"}', 'timeout: "5" is not a duration such as 2.5s'),
        (b'{"script": "\\u0000"}', "a script cannot contain a NUL byte"),
    ]:
        status, content_type, text = await post(coordinator, body, Content_Type="application/json")
        assert (status, content_type, text) == (400, "text/plain; charset=utf-8", reason + "\n")


def curl(running: Running, *arguments: str | bytes, data: bytes = b"") -> tuple[int, str, str]:
    """Send a request with curl; return the status, the response head in lower case, and the body."""
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
    for arguments, expected in [
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
        if expected:
            assert body == f"{expected}\n\nexit: 0\n", arguments

    # Above 1 MiB curl sends `Expect: 100-continue`.
    status, _, body = curl(coordinator, "--data-binary", "@-", data=b"echo large\n" + b"#" * (3 << 19))
    assert (status, body) == (200, "large\n\nexit: 0\n")

    script = b"garbage\necho must not run\n" * 100
    for arguments, data, accepted in [
        (["--data-urlencode", "script=echo hello"], b"", "accept: text/plain, application/json"),
        (["--data-urlencode", "script@-"], b"echo hello\necho again\n", "accept: text/plain"),
        (["--data-urlencode", "@-"], b"#!/bin/bash\necho hello\n", "accept: text/plain"),
        (
            ["-H", "Content-Type: multipart/mixed; boundary=x", "--data-binary", "@-"],
            script,
            "accept: text/plain, application/json, multipart/form-data",
        ),
        (
            ["-H", "Content-Encoding: gzip", "--data-binary", "@-"],
            gzip.compress(script),
            "accept-encoding: identity",
        ),
        (["-H", "Content-Encoding: br", "--data-binary", "@-"], script, "accept-encoding: identity"),
        (
            ["-H", "Content-Encoding: identity, gzip", "--data-binary", "@-"],
            script,
            "accept-encoding: identity",
        ),
        (["-H", "Content-Type: application/gzip", "--data-binary", "@-"], script, "accept: text/plain"),
        (
            ["-H", "Content-Type: text/plain; charset=utf-16", "--data-binary", "@-"],
            script,
            "accept: text/plain",
        ),
    ]:
        status, head, body = curl(coordinator, *arguments, data=data)
        assert (status, body.count("\n")) == (415, 1), (arguments, body)
        assert f"\r\n{accepted}" in head
    for arguments in (
        ["-H", "Content-Type: text/plain", "-H", "Content-Type: application/json", "--data-binary", "@-"],
        ["-H", "Content-Range: bytes 0-9/100", "--data-binary", "@-"],
        ["--request-target", "http://other-host/run", "--data-binary", "@-"],
    ):
        status, _, body = curl(coordinator, *arguments, data=script)
        assert (status, body.count("\n")) == (400, 1), (arguments, body)
    status, _, body = curl(coordinator, "--data-binary", "@-", data=codecs.BOM_UTF8 + script)
    assert (status, body) == (400, "the script starts with a byte order mark: send UTF-8 without one\n")
    status, _, body = curl(coordinator, "-H", "Expect: unsupported", "--data-binary", "@-", data=script)
    assert (status, body.count("\n")) == (417, 1)
    recent = json.loads((await coordinator.get("/status")).body)["runs"]["recent"]
    assert {run["outcome"] for run in recent} == {"exit 0"}
    assert await stop(coordinator) == 0
