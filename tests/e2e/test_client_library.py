"""`bfaas.client` against a real coordinator, and against servers that fail."""

from __future__ import annotations

import asyncio
import doctest
import signal
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import pytest_twisted

import bfaas.client
import bfaas.client.asynchronous
from bfaas.client import (
    AsyncClient,
    BfaasError,
    BusyError,
    CancelledRunError,
    Client,
    Exit,
    File,
    NoResponseError,
    Output,
    OutputFile,
    RejectedError,
    ResponseLostError,
    ScriptFailedError,
)
from tests.e2e.coordinator import start_coordinator, stop
from tests.e2e.test_listeners import certificate, listening
from tests.support.network import free_port
from tests.support.waiting import block_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.coordinator import Running

with_twisted = pytest_twisted.ensureDeferred

BINARY = bytes(range(256)) * 100
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def url(coordinator: Running) -> str:
    return f"http://127.0.0.1:{coordinator.port}"


def outcomes(client: Client) -> list[str]:
    """Return the outcomes of the runs that have ended, the latest last."""
    return [run["outcome"] for run in client.status()["runs"]["recent"]]


@pytest.mark.parametrize("module", [bfaas.client, bfaas.client.asynchronous], ids=lambda each: each.__name__)
def test_examples_of_the_docstrings(
    module: object, coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BFAAS_URL", url(coordinator))
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0


def test_the_client_imports_neither_twisted_nor_the_server() -> None:
    program = "import sys, bfaas.client; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "httpx" in modules
    assert not [name for name in modules if name.partition(".")[0] in ("twisted", "klein", "treq", "mcp")]


def test_everything_that_a_run_can_have(coordinator: Running, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/bash\necho called with $1\n")
    program.chmod(0o750)
    script = """
        cat >&2
        ./program "$WHO"; stat -c %a program data
        mkdir out; cat in/text > out/text; cp data out; chmod 600 out/data
        exit 3
    """
    with Client(url(coordinator)) as client:
        result = client.run(
            script,
            stdin=BINARY[:256],
            env={"WHO": "wörld"},
            timeout=15,
            files={"program": program, "data": BINARY, "in/text": "grüße\n"},
            outputs=["out/*", "missing"],
        )
    assert result.stdout == "called with wörld\n750\n644\n"
    assert result.stderr == BINARY[:256].decode("utf-8", "replace")
    assert result.exit.code == 3
    assert [(failure.name, failure.error) for failure in result.exit.output_errors] == [
        ("missing", "not-found")
    ]
    assert result.files == {
        "out/data": OutputFile("out/data", BINARY, 0o600),
        "out/text": OutputFile("out/text", "grüße\n".encode(), 0o644),
    }
    assert result.run_id
    assert result.machine
    with pytest.raises(ScriptFailedError) as caught:
        result.check()
    assert (str(caught.value), caught.value.result) == ("exit 3", result)

    for _ in range(2):  # a file that exists is replaced
        saved = result.files["out/data"].save(tmp_path / "new")
    assert saved == tmp_path / "new" / "out" / "data"
    assert (saved.read_bytes(), saved.stat().st_mode & 0o777) == (BINARY, 0o600)


def test_a_mode_and_an_executable_file(coordinator: Running) -> None:
    with Client(url(coordinator)) as client:
        files = {"run": File(b"#!/bin/sh\necho ran\n", 0o755)}
        assert client.run("./run", files=files).check().stdout == "ran\n"


def test_a_timeout_is_an_exit(coordinator: Running) -> None:
    with Client(url(coordinator)) as client:
        for timeout in (0.5, "500ms"):
            exit_ = client.run("sleep 60", timeout=timeout).exit
            assert (exit_.code, exit_.reason) == (124, "timeout")


def test_output_arrives_while_the_script_runs(coordinator: Running) -> None:
    script = "echo 1; sleep 0.5; echo 2 >&2"
    with Client(url(coordinator)) as client, client.stream(script) as run:
        assert next(run) == Output(bfaas.client.Stream.STDOUT, "1\n")
        assert run.exit is None
        *others, last = run
        assert others == [Output(bfaas.client.Stream.STDERR, "2\n")]
        assert last == run.exit
        assert isinstance(last, Exit)
        run.cancel()  # has no effect any more
        assert client.run("echo same connection").stdout == "same connection\n"
        assert list(run) == []


def test_leaving_the_block_ends_the_run(own_coordinator: Running) -> None:
    with Client(url(own_coordinator)) as client:
        with client.stream("echo started; sleep 60") as run:
            next(run)
        block_until(lambda: outcomes(client) == ["client-disconnected"])

        with pytest.raises(ZeroDivisionError), client.stream("echo started; sleep 60"):
            _ = 1 / 0
        block_until(lambda: outcomes(client) == 2 * ["client-disconnected"])


def cancel_in_another_thread(client: Client) -> None:
    with client.stream("echo started; sleep 60") as run:
        assert next(run)
        reader = threading.get_native_id()

        def cancel() -> None:
            stat = Path(f"/proc/self/task/{reader}/stat")
            block_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "the thread waits")
            run.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(CancelledRunError):
            next(run)
        thread.join()
    block_until(lambda: outcomes(client) == ["client-disconnected"])
    assert client.run("echo next").stdout == "next\n"


def test_cancel_from_another_thread(own_coordinator: Running) -> None:
    with Client(url(own_coordinator)) as client:
        cancel_in_another_thread(client)


@with_twisted
async def test_cancel_over_tls(tmp_path: Path) -> None:
    pem, port = certificate(tmp_path), free_port()
    trust = ssl.create_default_context(cafile=pem)
    async with listening(f"ssl:{port}:interface=127.0.0.1:privateKey={pem}:certKey={pem}"):
        with httpx.Client(verify=trust) as http:
            cancel_in_another_thread(Client(f"https://127.0.0.1:{port}", http=http))
        with Client(f"https://127.0.0.1:{port}") as untrusting, pytest.raises(NoResponseError) as caught:
            untrusting.run("true")
        assert not caught.value.may_have_run


def test_runs_of_several_threads(coordinator: Running) -> None:
    with Client(url(coordinator)) as client, ThreadPoolExecutor(8) as threads:
        results = threads.map(lambda number: client.run(f"echo {number}").stdout, range(8))
        assert list(results) == [f"{number}\n" for number in range(8)]


def test_asyncio_cancellation_and_files(own_coordinator: Running) -> None:
    async def main() -> None:
        async with AsyncClient(url(own_coordinator)) as client:
            task = asyncio.create_task(client.run("sleep 60"))
            while (await client.status())["runs"]["running"] == 0:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.run("echo started; sleep 60"), 1)
            async with client.stream("echo started; sleep 60") as run:
                assert await anext(run) == Output(bfaas.client.Stream.STDOUT, "started\n")
            while len((await client.status())["runs"]["recent"]) < 3:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
            result = await client.run("cp in out", files={"in": BINARY}, outputs=["out"])
            assert result.files["out"].data == BINARY

    asyncio.run(main())
    with Client(url(own_coordinator)) as client:
        assert outcomes(client) == [*3 * ["client-disconnected"], "exit 0"]


@with_twisted
async def test_busy_coordinators_are_waited_for() -> None:
    running = await start_coordinator(POOLSIZE="1", MAXPERCLIENT="1")
    with Client(url(running)) as client, Client(url(running), max_wait=0) as impatient:
        with client.stream("echo started; sleep 1.5") as run:
            next(run)
            with pytest.raises(BusyError) as caught:
                impatient.run("echo other")
            assert (caught.value.status, caught.value.may_have_run) == (429, False)
            assert caught.value.retry_after >= 1
            assert caught.value.message == "too many concurrent requests from this client"
            with ThreadPoolExecutor(1) as thread:
                waiting = thread.submit(client.run, "echo waited")
                assert [type(event) for event in run] == [Exit]
                assert waiting.result().stdout == "waited\n"

        async def main() -> str:
            async with AsyncClient(url(running)) as asynchronous:
                first, second = await asyncio.gather(
                    asynchronous.run("sleep 0.5; echo a"), asynchronous.run("sleep 0.5; echo a")
                )
                return first.stdout + second.stdout

        assert asyncio.run(main()) == "a\na\n"
    assert await stop(running) == 0


def test_rejected_requests(coordinator: Running) -> None:
    with Client(url(coordinator)) as client:
        invalid_scripts = {"a\0": "a script cannot contain a NUL byte", "\ufeffA": "the script starts"}
        for script, message in invalid_scripts.items():
            with pytest.raises(RejectedError, match=message) as caught:
                client.run(script)
            assert (caught.value.status, caught.value.may_have_run) == (400, False)
            assert caught.value.run_id
        with pytest.raises(RejectedError, match="413: the body is larger than 1048576 bytes"):
            client.run("true", files={"large": bytes(8 << 20)})
        with pytest.raises(RejectedError, match="files"):
            client.run("true", files={"../up": "x"})
        assert client.run("echo still usable").stdout == "still usable\n"
    for case in ("ftp://host", "http://user:secret@host", "host:8000", "http://host/?query"):
        with pytest.raises(ValueError, match="URL") as invalid:
            Client(case)
        assert "secret" not in str(invalid.value)
    with pytest.raises(ValueError, match="token"):
        Client(token="two\r\nlines")


@with_twisted
async def test_a_lost_coordinator_is_reported() -> None:
    running = await start_coordinator()
    with Client(url(running)) as client:
        with client.stream("echo started; sleep 60") as run:
            next(run)
            running.kill(signal.SIGKILL)
            with pytest.raises(ResponseLostError) as lost:
                list(run)
        assert lost.value.may_have_run
        await running.program.ended
        with pytest.raises(NoResponseError) as refused:
            client.run("true")
        assert not refused.value.may_have_run


class Server:
    """A server that sends the same bytes to each connection, and then closes it."""

    def __init__(self, response: bytes) -> None:
        self._response = response
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                request = connection.recv(65536)
                if not request:
                    return
                self.requests.append(request)
                connection.sendall(self._response)
                connection.shutdown(socket.SHUT_WR)
                # Closed with unread data, the connection would be reset, and the response could be lost.
                with suppress(ConnectionError):
                    while connection.recv(65536):
                        pass

    def close(self) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()


@contextmanager
def serving(response: bytes) -> Iterator[Server]:
    server = Server(response)
    try:
        yield server
    finally:
        server.close()


def status(line: str, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {line}", *headers, "Content-Length: 4", "Connection: close", "", "why\n"]
    return "\r\n".join(head).encode()


FAILURES: dict[str, tuple[bytes, type[BfaasError], bool]] = {
    "no response": (b"", NoResponseError, True),
    "half a head": (b"HTTP/1.1 20", NoResponseError, True),
    "no HTTP": (b"hello\r\n\r\n", NoResponseError, True),
    "a redirect": (status("307 Elsewhere", "Location: /run"), RejectedError, False),
    "502": (status("502 Bad Gateway", "Retry-After: 0"), RejectedError, True),
    "503 of a proxy": (status("503 Unavailable"), RejectedError, True),
    "503 with a date": (
        status("503 Unavailable", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT"), RejectedError, True,
    ),
    "504": (status("504 Timeout", "Retry-After: 0"), RejectedError, True),
    "401": (status("401 Unauthorized", "WWW-Authenticate: Bearer", "Retry-After: 0"), RejectedError, False),
    "no body": (HEAD, ResponseLostError, True),
    "output alone": (HEAD + b'event: stdout\ndata: "a"\n\n', ResponseLostError, True),
    "half an exit": (HEAD + b'event: exit\ndata: {"code": 0}\n', ResponseLostError, True),
    "no exit code": (HEAD + b"event: exit\ndata: {}\n\n", ResponseLostError, True),
    "no events": (HEAD + b"<html></html>\n\n", ResponseLostError, True),
    "a foreign file": (
        HEAD + b'event: file\ndata: {"name": "../a", "size": 0, "mode": "0644", "base64": ""}\n\n',
        ResponseLostError,
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_request_that_may_have_run_is_sent_once(case: str) -> None:
    response, kind, may_have_run = FAILURES[case]
    with serving(response) as server, Client(server.url, token="secret") as client:
        with pytest.raises(BfaasError) as caught:
            client.run("echo hi", outputs=["a"])
        assert (type(caught.value), caught.value.may_have_run) == (kind, may_have_run)
        assert "secret" not in str(caught.value)

        async def run() -> None:
            async with AsyncClient(server.url) as client:
                await client.run("echo hi", outputs=["a"])

        with pytest.raises(kind) as again:
            asyncio.run(run())
        assert again.value.may_have_run is may_have_run
        assert len(server.requests) == 2
        assert b"\r\nAuthorization: Bearer secret\r\n" in server.requests[0]


def test_retry_after_is_honoured_within_the_budget() -> None:
    with serving(status("503 Unavailable", "Retry-After: 1")) as server:
        with Client(server.url, max_wait=2.5) as client, pytest.raises(BusyError, match="503: why"):
            client.run("true")
        assert len(server.requests) == 3


def test_silence_is_limited() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", silence=0.2)
        with client, pytest.raises(NoResponseError) as caught:
            client.run("true")
        assert caught.value.may_have_run


def test_the_environment_configures_a_client(coordinator: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BFAAS_URL", f"{url(coordinator)}/")
    with Client() as client:
        assert client.run("echo hi").stdout == "hi\n"
    monkeypatch.setenv("BFAAS_TOKEN", "from-environment")
    with serving(status("401 Unauthorized")) as server:
        for client in (Client(server.url), Client(server.url, token="other"), Client(server.url, token="")):
            with client, pytest.raises(RejectedError):
                client.run("true")
        sent = [b"Bearer from-environment\r\n" in request for request in server.requests]
        assert sent == [True, False, False]
