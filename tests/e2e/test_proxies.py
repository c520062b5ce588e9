"""Streams through nginx, haproxy and Caddy, with compression: lines arrive while the script runs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import zlib
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, TWISTD, Running, reactor, start, start_coordinator, stop
from tests.support.hostile_worker import post
from tests.support.network import free_port
from tests.support.paths import ROOT
from tests.support.responses import parse_response
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from twisted.python.failure import Failure

with_twisted = pytest_twisted.ensureDeferred

NGINX = """
daemon off; pid {home}/pid; error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;
    uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;
    {more}
    server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{origin}; }} }}
}}
"""

HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    {more}
listen all
    bind 127.0.0.1:{port}
    server origin 127.0.0.1:{origin}
"""

CADDY = """
{{
    admin off
    auto_https off
}}
http://:{port} {{
    bind 127.0.0.1
    {more}
    reverse_proxy 127.0.0.1:{origin}
}}
"""

COMMANDS = {
    "nginx": (NGINX, "nginx -e stderr -c {config}"),
    "haproxy": (HAPROXY, "haproxy -db -f {config}"),
    "caddy": (CADDY, "caddy run --adapter caddyfile --config {config}"),
}

CASES = [
    ("nginx", ""),
    ("nginx", "gzip on; gzip_types *; gzip_proxied any;"),
    ("haproxy", ""),
    ("haproxy", "compression algo gzip"),
    ("caddy", ""),
    ("caddy", "encode gzip { match header Content-Type * }"),
]

# Longer than the least size for compression (512 bytes in Caddy), shorter than any buffer.
LONG = "printf %02000d 0; echo; echo one; sleep 5"


class Proxy(ProcessProtocol):
    """A proxy process."""

    def __init__(self) -> None:
        self.output = b""
        self.ended: Deferred[None] = Deferred()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output += data

    def processEnded(self, _: Failure) -> None:
        self.ended.callback(None)


@asynccontextmanager
async def proxied(name: str, more: str, origin: int, home: Path) -> AsyncIterator[int]:
    """Run a proxy in front of a port. Yields the port of the proxy."""
    template, _ = COMMANDS[name]
    port = free_port()
    if name == "caddy":
        more = more.replace("{ ", "{\n").replace(" }", "\n}")
    async with running(name, template.format(home=home, port=port, origin=origin, more=more), port, home):
        yield port


@asynccontextmanager
async def running(name: str, configuration: str, port: int, home: Path) -> AsyncIterator[None]:
    """Run a proxy that listens on a port."""
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert "CI" not in os.environ, name
        pytest.skip(f"{name} is not installed")
    config = home / "config"
    config.write_text(configuration)
    _, command = COMMANDS[name]
    words = command.format(config=config).split()
    proxy = Proxy()
    process = reactor.spawnProcess(proxy, program, words, env={"HOME": str(home)})
    try:
        for _ in range(int(PATIENCE / 0.05)):
            assert not proxy.ended.called, proxy.output.decode()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            await deferLater(reactor, 0.05)
        yield
    finally:
        if not proxy.ended.called:
            process.signalProcess(signal.SIGKILL if name == "caddy" else signal.SIGTERM)
            await Deadline(reactor, PATIENCE).run(proxy.ended)


async def receive(port: int, request: bytes) -> AsyncGenerator[bytes]:
    """Send a request; yield data as it is received until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.setblocking(False)
        client.sendall(request)
        for _ in range(int(PATIENCE / 0.05)):
            try:
                piece = client.recv(1 << 16)
            except BlockingIOError:
                await deferLater(reactor, 0.05)
                continue
            if not piece:
                return
            yield piece
    raise AssertionError("the response does not end")


async def first_lines(request: bytes, port: int) -> bytes:
    """Send a request that runs `LONG`; return the body up to its first lines."""
    response = b""
    async with aclosing(receive(port, request)) as pieces:
        async for piece in pieces:
            response += piece
            if b"\r\n\r\n" in response and b"one" in (body := _decoded(response)):
                return body
    raise AssertionError(response)


def _decoded(received: bytes) -> bytes:
    """Decode the received part of a response's body."""
    head, _, rest = received.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        rest = b"".join(_chunks(rest))
    if b"content-encoding: gzip" in head.lower():
        return zlib.decompressobj(31).decompress(rest)
    return rest


def _chunks(rest: bytes) -> list[bytes]:
    chunks = []
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        chunks.append(rest[:length])
        rest = rest[length + 2 :]
    return chunks


@pytest.mark.parametrize(("name", "more"), CASES)
@with_twisted
async def test_lines_arrive_through_proxies_while_the_script_runs(
    coordinator: Running, name: str, more: str, tmp_path: Path
) -> None:
    async with proxied(name, more, coordinator.port, tmp_path) as port:
        for path, accept in (("/run", "*/*"), ("/run", "application/x-ndjson"), ("/run?raw=1", "*/*")):
            body = await first_lines(
                post(path, LONG.encode(), "Accept-Encoding: gzip", f"Accept: {accept}"), port
            )
            assert b"exit" not in body
    await coordinator.settle()


HOST = "bfaas.example.com"


def documented(name: str, port: int, listening: str, home: Path) -> str:
    """Return the configuration in deploy/ with plain HTTP on a port, for a coordinator's socket."""
    file = ROOT / "deploy" / {"nginx": "nginx.conf", "caddy": "Caddyfile"}[name]
    text = file.read_text().replace("/run/bfaas/coord.sock", listening)
    if name == "caddy":
        text = text.replace(f"{HOST} {{", f"http://{HOST}:{port} {{\nbind 127.0.0.1")
        return "{\nadmin off\nauto_https off\n}\n" + text
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    server = "".join(line for line in text.splitlines(keepends=True) if "ssl_certificate" not in line)
    return NGINX.format(home=home, port=free_port(), origin=free_port(), more=server)  # beside another server


@pytest.fixture
def runtime_directory() -> Iterator[Path]:
    """Make a directory as systemd does, which a proxy of another user can enter."""
    with tempfile.TemporaryDirectory(prefix="bfaas-run-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def from_page(origin: str, script: str, port: int) -> bytes:
    """Return a request of a page of this origin to the documented host."""
    request = post("/run", script.encode(), f"Origin: {origin}")
    return request.replace(b"Host: localhost", f"Host: {HOST}:{port}".encode())


@pytest.mark.parametrize("name", ["nginx", "caddy"])
@with_twisted
async def test_documented_configuration_passes_streams_and_the_pages_requests(
    name: str, tmp_path: Path, runtime_directory: Path
) -> None:
    listening, port = runtime_directory / "coord.sock", free_port()
    program, pid = start(
        [*TWISTD, "bfaas-coord", "--listen", f"unix:{listening}:mode=666"],
        {"WORKER_APP": "mock", "MAXREQTIME": "20s"},
    )
    await wait_until(lambda: listening.exists() or program.status is not None)
    async with running(name, documented(name, port, str(listening), tmp_path), port, tmp_path):
        body = await first_lines(from_page(f"https://{HOST}:{port}", LONG, port), port)
        assert b"exit" not in body
        foreign = from_page("https://other.example", "true", port)
        response, _ = parse_response(b"".join([piece async for piece in receive(port, foreign)]))
        assert response.status == 403
    assert await stop(Running(program, port, pid)) == 0


@with_twisted
async def test_startup_warns_of_limits_longer_than_the_proxys_idle_timeout() -> None:
    coordinator = await start_coordinator(MAXREQTIME="5m", MAXWAIT="30s", PROXY_IDLE_TIMEOUT="60s")
    assert b"MAXREQTIME is 300 s: a raw response" in coordinator.program.output
    assert b"MAXWAIT is" not in coordinator.program.output
    # It accepts connections before it handles signals.
    assert (await coordinator.get("/healthz")).status == 200
    assert await stop(coordinator) == 0


@with_twisted
async def test_heartbeats_keep_silent_runs_alive_behind_a_proxy(tmp_path: Path) -> None:
    # Heartbeats are sent every 15 s; the proxy waits for 18.
    coordinator = await start_coordinator(MAXREQTIME="60s")
    more = "proxy_read_timeout 18s;"
    async with proxied("nginx", more, coordinator.port, tmp_path) as port:
        pieces = [piece async for piece in receive(port, post("/run", b"sleep 20; echo late"))]
    response, body = parse_response(b"".join(pieces))
    assert response.status == 200
    assert b"late" in body
    assert b'"code": 0' in body
    assert await stop(coordinator) == 0
