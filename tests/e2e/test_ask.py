"""Requests in JSON and answers in lines, through a real coordinator and its workers."""

from __future__ import annotations

import json
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
async def test_all_that_a_request_says_reaches_the_script(coordinator: Running) -> None:
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
async def test_a_megabyte_of_input_goes_in_while_output_comes_out(coordinator: Running) -> None:
    stdin = "0123456789abcde\n" * 60_000
    assert output(await ask(coordinator, script="cat", stdin=stdin)) == stdin
    assert output(await ask(coordinator, script="echo early", stdin=stdin)) == "early\n"


@with_twisted
async def test_a_timeout_of_its_own_ends_a_run(coordinator: Running) -> None:
    *lines, end = await ask(coordinator, script="echo up; sleep 1000", timeout="1.5s")

    assert output(lines) == "up\n"
    assert (end["code"], end["reason"]) == (124, "timeout")
    assert 1000 <= end["wall_ms"] < 15_000


@with_twisted
async def test_a_run_whose_time_is_over_is_a_timeout_however_short_it_was(coordinator: Running) -> None:
    for timeout in ("1ns", "1us", "1ms", "10ms", "20ms", "40ms", "60ms", "0.1s"):
        *_, end = await ask(coordinator, script="sleep 1000", timeout=timeout)
        assert (end["event"], end["code"], end["reason"]) == ("exit", 124, "timeout"), (timeout, end)
    body = json.dumps({"script": "sleep 1000", "timeout": "10ms"}).encode()
    answer = await coordinator.run(body, "?raw=1", headers={"Content-Type": "application/json"})
    assert (answer.status, answer.body) == (200, b"\nexit: 124 timeout\n")


@with_twisted
async def test_the_longest_timeout_is_no_more_than_any_run_may_take(coordinator: Running) -> None:
    *lines, end = await ask(coordinator, script="echo fine", timeout="2562047h47m16.854775807s")
    assert (output(lines), end["code"]) == ("fine\n", 0)


@with_twisted
async def test_the_time_of_all_runs_may_be_short_too() -> None:
    coordinator = await start_coordinator(MAXREQTIME="50ms")
    answer = await coordinator.run("sleep 1000")
    assert (answer.status, answer.exit["code"], answer.exit["reason"]) == (200, 124, "timeout")
    answer = await coordinator.run("sleep 1000", "?raw=1")
    assert (answer.status, answer.body) == (200, b"\nexit: 124 timeout\n")
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_plain_body_is_the_script_whatever_else_it_is_called(coordinator: Running) -> None:
    script = b'echo "{\\"script\\"}"'
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json-seq"):
        status, told, text = await post(coordinator, script, Content_Type=kind)
        assert (status, told) == (200, "text/event-stream; charset=utf-8")
        assert text.startswith('event: stdout\ndata: "{\\"script\\"}\\n"\n\n')


@with_twisted
async def test_what_is_wrong_is_told_and_no_machine_is_used(coordinator: Running) -> None:
    for body, told in [
        (b"echo", "the body is not JSON, at line 1, column 1"),
        (b'{"script": "", "timeout": "5"}', 'timeout: "5" is not a duration such as 2.5s'),
        (b'{"script": "\\u0000"}', "a script cannot contain a NUL byte"),
    ]:
        status, kind, text = await post(coordinator, body, Content_Type="application/json")
        assert (status, kind, text) == (400, "text/plain; charset=utf-8", told + "\n")
