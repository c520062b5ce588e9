"""Access tokens from end to end: made, used by each client, revoked, and counted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import pytest_twisted
from twisted.internet.threads import deferToThread

from bfaas.client import BfaasError, Client
from tests.e2e.coordinator import PATIENCE, start_coordinator, start_listening, stop
from tests.e2e.hostile import start_harness
from tests.e2e.test_page import OUTPUT, STATE, needs_chromium
from tests.e2e.test_page import run as run_in_page
from tests.support.hostile_worker import post
from tests.support.network import free_port
from tests.support.responses import parse_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from tests.e2e.chromium import Chromium
    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred
BFAAS = [sys.executable, "-m", "bfaas.cli.main"]


def bfaas(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command; return its exit code, output and errors."""
    done = subprocess.run(
        [*BFAAS, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr


def new_token(name: str) -> tuple[str, str]:
    """Return a new token, and its line for the setting."""
    code, output, errors = bfaas("token", name)
    assert (code, errors) == (0, "")
    variable, line = output.splitlines()
    assert re.fullmatch(r"BFAAS_TOKEN=bfaas_[\w-]{43}", variable)
    assert re.fullmatch(name + ":[0-9a-f]{64}", line)
    return variable.partition("=")[2], line


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


@asynccontextmanager
async def coordinator_of(tokens: Path, *lines: str) -> AsyncIterator[Running]:
    """Start a coordinator that accepts the tokens of these lines, from a file."""
    write(tokens, *lines)
    coordinator = await start_coordinator(ACCESS_TOKENS=f"@{tokens}")
    try:
        yield coordinator
    finally:
        assert await stop(coordinator) == 0


@with_twisted
async def test_a_token_is_made_used_and_revoked_with_curl(tmp_path: Path) -> None:
    (alice, alice_line), (bob, bob_line) = new_token("alice"), new_token("bob")
    tokens = tmp_path / "tokens"

    async def curl(path: str, *options: str) -> tuple[int, str]:
        command = [
            "curl",
            "-sS",
            "-w",
            "\n%{http_code}",
            f"http://127.0.0.1:{coordinator.port}{path}",
            *options,
        ]
        done = await deferToThread(subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE)
        body, _, status = done.stdout.rpartition("\n")
        return int(status), body

    async with coordinator_of(tokens, alice_line, bob_line) as coordinator:
        with_alice, with_bob = ["--oauth2-bearer", alice], ["-H", f"Authorization: Bearer {bob}"]
        script = ["-d", "echo hello"]
        assert await curl("/run?raw=1", *with_alice, *script) == (200, "hello\n\nexit: 0\n")
        assert await curl("/run?raw=1", *with_bob, *script) == (200, "hello\n\nexit: 0\n")
        missing = "an access token is required: Authorization: Bearer TOKEN\n"
        assert await curl("/run", *script) == (401, missing)
        assert await curl("/run", "-u", f"alice:{alice}", *script) == (401, missing)
        assert await curl("/status") == (401, missing)
        assert (await curl("/status?request=x", *with_bob))[0] == 200
        for path in ("/healthz", "/readyz", "/", "/page.js"):
            assert (await curl(path))[0] == 200, path
        status, headers = await curl("/run", "-i", *script)
        assert status == 401
        assert 'WWW-Authenticate: Bearer realm="bfaas"\n' in headers

        status, body = await curl("/status", *with_alice)
        assert [run["client"] for run in json.loads(body)["runs"]["recent"]] == ["alice", "bob"]

        write(tokens, bob_line)
        invalid = "the access token is not valid\n"
        assert await curl("/run", *with_alice, *script) == (401, invalid)
        assert await curl("/run?raw=1", *with_bob, *script) == (200, "hello\n\nexit: 0\n")

    log = coordinator.program.output.decode()
    assert "of alice on" in log
    assert "of bob on" in log
    for secret in (alice, bob, *(line.partition(":")[2] for line in (alice_line, bob_line))):
        assert secret not in log


@with_twisted
async def test_each_client_sends_its_token(tmp_path: Path) -> None:
    token, line = new_token("ci")
    async with coordinator_of(tmp_path / "tokens", line) as coordinator:
        url = f"http://127.0.0.1:{coordinator.port}"

        async def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
            return await deferToThread(bfaas, "run", "--url", url, *arguments, environment=environment)

        assert await command("echo fine", BFAAS_TOKEN=token) == (0, "fine\n", "")
        assert await command("--token", token, "--env", "A=b", "echo $A", BFAAS_TOKEN="other") == (
            0,
            "b\n",
            "",
        )
        required = "bfaas: 401: an access token is required: Authorization: Bearer TOKEN\n"
        assert await command("true") == (69, "", required)
        assert await command("--token", "wrong", "true") == (
            69,
            "",
            "bfaas: 401: the access token is not valid\n",
        )
        assert (await command("--token", "two words", "true"))[0] == 2
        assert "two words" not in (await command("--token", "two words", "true"))[2]

        def library() -> None:
            with Client(url, token=token) as client:
                assert client.run("echo fine").stdout == "fine\n"
                assert client.status()["runs"]["recent"][-1]["client"] == "ci"
            with Client(url) as client, pytest.raises(BfaasError, match="401: an access token is required"):
                client.run("true")

        await deferToThread(library)

        # A client that knows nothing of this project.
        def http() -> None:
            stream = httpx.post(f"{url}/run?raw=1", content="echo fine", headers=bearer(token))
            assert stream.text == "fine\n\nexit: 0\n"
            refused = httpx.post(f"{url}/run", content="true", headers=bearer("wrong"))
            assert refused.headers["WWW-Authenticate"] == 'Bearer realm="bfaas", error="invalid_token"'

        await deferToThread(http)


@with_twisted
async def test_fairness_and_limits_count_by_token() -> None:
    (alice, alice_line), (spare, spare_line), (bob, bob_line) = map(new_token, ("alice", "alice", "bob"))
    coordinator = await start_coordinator(
        ACCESS_TOKENS=f"{alice_line}, {bob_line},{spare_line}", POOLSIZE="2", MAXPERCLIENT="1"
    )
    busy = await coordinator.begin("echo started; sleep 1000", headers=bearer(alice))
    # Another token of the same name is the same client; another name at the same address is not.
    for token, status in ((alice, 429), (spare, 429), (bob, 200)):
        assert (await coordinator.run("true", headers=bearer(token))).status == status
    busy.leave()
    assert await stop(coordinator) == 0


@with_twisted
async def test_metrics_count_runs_by_token_and_rejections() -> None:
    token, line = new_token("alice")
    port = free_port()
    settings = {"WORKER_APP": "mock", "MAXREQTIME": "30s", "ACCESS_TOKENS": line}
    options = ["--metrics", f"tcp:{port}:interface=127.0.0.1"]
    coordinator = await start_listening("bfaas-coord", free_port(), options, settings)
    assert (await coordinator.run("sleep 0.2", headers=bearer(token))).status == 200
    assert (await coordinator.run("true")).status == 401
    text = (await deferToThread(httpx.get, f"http://127.0.0.1:{port}/metrics")).text
    assert 'bfaas_token_runs_total{token="alice"} 1.0\n' in text
    [seconds] = re.findall(r'bfaas_token_run_seconds_total\{token="alice"\} (\S+)\n', text)
    assert float(seconds) >= 0.2
    assert 'bfaas_requests_rejected_total{reason="unauthorized"} 1.0\n' in text
    assert token not in text
    assert await stop(coordinator) == 0


@with_twisted
async def test_a_request_without_a_token_reaches_no_worker() -> None:
    token, line = new_token("alice")
    async with start_harness(ACCESS_TOKENS=line) as harness:
        for headers in (
            [],
            [f"Authorization: Bearer {token}x"],
            [f"Authorization: Bearer {token}"] * 2,
            ["Authorization: Bearer \xff"],
        ):
            received, _ = await harness.request(post("/run", b"honest", *headers))
            assert parse_response(received)[0].status in (400, 401), received
        received, _ = await harness.request(post("/run", b"honest", f"Authorization: Bearer {token}"))
        assert parse_response(received)[0].status == 200, received
        [(head, _)] = harness.worker.runs
        assert token not in "".join(head)  # a worker gets an auth token of the coordinator instead


@needs_chromium
@with_twisted
async def test_the_page_asks_for_the_token_and_keeps_it_in_the_tab(
    chromium: Chromium, tmp_path: Path
) -> None:
    token, line = new_token("alice")
    form, panel = "document.querySelector('#access')", "document.querySelector('#pool-state').textContent"
    async with coordinator_of(tmp_path / "tokens", line) as coordinator, chromium.open(coordinator) as tab:
        await tab.wait_until(f"!{form}.hidden")
        assert await tab.text("#access-reason") == "This coordinator requires an access token."
        await tab.wait_until(f"{panel}.includes('have an access token')")
        await run_in_page(tab, "echo with a token")
        await tab.wait_until(f"{STATE} === 'Not run'")
        assert (await tab.text("#problem")).startswith("401: an access token is required")

        await tab.do(lambda page: page.fill("#token", "wrong"))
        await tab.do(lambda page: page.press("#token", "Enter"))
        await tab.wait_until("document.querySelector('#access-reason').textContent.includes('not accept')")
        await tab.do(lambda page: page.fill("#token", f"BFAAS_TOKEN={token}"))
        await tab.do(lambda page: page.click("#access button"))
        await tab.wait_until(f"{form}.hidden && {panel}.startsWith('Up to')")
        await run_in_page(tab, "echo with a token")
        await tab.wait_until(f"{STATE}.startsWith('Done') && {OUTPUT}.includes('with a token')")

        # A reload keeps it; nothing shows it, and the curl command takes it from the environment.
        await tab.do(lambda page: page.reload())
        await tab.wait_until(f"{panel}.startsWith('Up to')")
        assert await tab.evaluate(f"{form}.hidden")
        assert await tab.evaluate(f"!document.documentElement.outerHTML.includes({token!r})")
        assert await tab.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        curl = "document.querySelector('#command').textContent"
        assert "Bearer $BFAAS_TOKEN" in str(await tab.evaluate(curl))

        await tab.do(lambda page: page.click("#forget"))
        await tab.wait_until(f"!{form}.hidden")
        assert await tab.evaluate("document.querySelector('#forget').hidden")
