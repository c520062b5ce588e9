"""Endpoints of `--listen`, tested with independent programs: curl, openssl, haproxy, Python's ssl."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import socket
import ssl
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from twisted.internet.threads import deferToThread
from twisted.internet.utils import getProcessOutputAndValue

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, TWISTD, Program, reactor, start
from tests.support.network import free_port
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

with_twisted = pytest_twisted.ensureDeferred

SYSTEM = os.environ.get("PATH", os.defpath) + ":/usr/sbin"

needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy", path=SYSTEM) is None and "CI" not in os.environ,
    reason="haproxy is not installed",
)

SETTINGS = {"WORKER_APP": "mock", "MAXREQTIME": "20s", "MAXWAIT": "60s"}
SOCKET_ACTIVATION = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(server.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="bfaas.socket")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@asynccontextmanager
async def listening(endpoint: str, leader: list[str] | None = None) -> AsyncIterator[Program]:
    """Run a coordinator that listens on an endpoint; check that it exits with 0 and has logged no error."""
    arguments = [*(leader or []), *TWISTD, "bfaas-coord", "--listen", endpoint]
    program, pid = start(arguments, SETTINGS)

    async def listens() -> bool:
        assert program.status is None, program.output.decode()
        return b" starting on " in program.output

    await wait_until(listens)
    try:
        yield program
    finally:
        os.kill(pid, signal.SIGTERM)
        await Deadline(reactor, PATIENCE).run(program.ended)
    assert program.status == 0, program.output.decode()
    for word in (b"Traceback", b"Unhandled", b"#error", b"#critical"):
        assert word not in program.output, program.output.decode()


async def curl(*arguments: str) -> str:
    """Run curl; return its standard output."""
    out, err, code = await getProcessOutputAndValue(
        "curl", ["-sSN", "-m", str(PATIENCE), *arguments], env=os.environ, reactor=reactor
    )
    assert code == 0, (code, out, err)
    return str(out.decode())


def certificate(directory: Path) -> Path:
    """Write a key and a self-signed certificate for localhost to one file; return its path."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    now = dt.datetime.now(dt.UTC)
    self_signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + self_signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


# TLS.


@with_twisted
async def test_curl_runs_scripts_over_tls(tmp_path: Path) -> None:
    pem, port = certificate(tmp_path), free_port()
    large = tmp_path / "large"
    large.write_bytes(b"x" * (8 << 20))
    async with listening(f"ssl:{port}:interface=127.0.0.1:privateKey={pem}:certKey={pem}") as program:
        url = f"https://localhost:{port}/run?raw=1"
        trust = ("--cacert", str(pem))
        for protocol in ("--http2", "--http1.1", "--http1.0", "--no-alpn"):  # the first offers h2, then 1.1
            assert await curl(*trust, protocol, url, "-d", "echo hi") == "hi\n\nexit: 0\n", protocol
        for options in ((), ("--limit-rate", "16M")):
            out = await curl(*trust, *options, url, "-d", "head -c 33554432 /dev/zero | tr '\\0' x")
            assert len(out) == (32 << 20) + len("\nexit: 0\n")
        for options in ((), ("-H", "Expect:")):  # the second sends the whole body before it reads
            out = await curl(*trust, *options, "-w", "%{http_code}", url, "--data-binary", f"@{large}")
            assert out == "the body is larger than 1048576 bytes\n413"
        client = Program()
        arguments = ["curl", "-sN", *trust, url, "-d", "echo started; sleep 15"]
        process = reactor.spawnProcess(client, "curl", arguments, env=os.environ)

        async def started() -> bool:
            return b"started" in client.output

        await wait_until(started)
        process.signalProcess("KILL")
        await client.ended

        async def disconnected() -> bool:
            return b": client-disconnected, " in program.output

        await wait_until(disconnected)
        plain = await getProcessOutputAndValue(
            "curl", ["-s", f"http://localhost:{port}/"], env=os.environ, reactor=reactor
        )
        assert plain[2] in (52, 56)  # no response


@with_twisted
async def test_responses_over_tls_end_with_close_notify(tmp_path: Path) -> None:
    pem, port = certificate(tmp_path), free_port()

    def get_health(protocols: list[str]) -> tuple[str | None, bytes]:
        context = ssl.create_default_context(cafile=pem)
        context.set_alpn_protocols(protocols)
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as plain,
            # recv raises if the connection ends without close_notify.
            context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as secure,
        ):
            negotiated = secure.selected_alpn_protocol()
            secure.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            received = b""
            while data := secure.recv(65536):
                received += data
            secure.unwrap()
            return negotiated, received

    async with listening(f"ssl:{port}:interface=127.0.0.1:privateKey={pem}:certKey={pem}"):
        for protocols in (["h2", "http/1.1"], ["http/1.1"]):
            negotiated, received = await deferToThread(get_health, protocols)
            assert negotiated == "http/1.1"
            assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        with pytest.raises(ssl.SSLError):
            await deferToThread(get_health, ["h2"])
        request = "printf 'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n'"
        command = f"{request} | openssl s_client -connect localhost:{port} -CAfile {pem} -quiet -ign_eof"
        out, err, code = await getProcessOutputAndValue(
            "bash", ["-c", command], env=os.environ, reactor=reactor
        )
        assert (code, out.partition(b"\r\n")[0]) == (0, b"HTTP/1.1 200 OK"), err


# The PROXY protocol.

HAPROXY = """
global
  maxconn 500
defaults
  mode http
  timeout connect 30s
  timeout client 60s
  timeout server 60s
{}
"""
FRONTEND = """
frontend from{port}
  bind 127.0.0.1:{port}
  default_backend to{port}
backend to{port}
  option httpchk GET /healthz
  server coordinator {server} {option} check check-send-proxy inter 100ms
"""


@needs_haproxy
@with_twisted
async def test_client_addresses_are_known_behind_haproxy(tmp_path: Path) -> None:
    port, pieces, ports = free_port(), [], []
    for option in ("send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id"):
        ports.append(free_port())
        pieces.append(FRONTEND.format(port=ports[-1], server=f"127.0.0.1:{port}", option=option))
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(HAPROXY.format("".join(pieces)))
    async with listening(f"haproxy:tcp:{port}:interface=127.0.0.1") as program:
        proxy, path = Program(), {"PATH": SYSTEM}
        running = reactor.spawnProcess(proxy, "env", ["env", "haproxy", "-f", str(configuration)], env=path)
        try:
            for number, frontend in enumerate(ports):
                client = f"127.0.0.{7 + number}"
                url = f"http://127.0.0.1:{frontend}/run?raw=1"

                async def served(client: str = client, url: str = url) -> bool:
                    retry = ("--retry", "20", "--retry-connrefused", "--retry-delay", "1")
                    return (
                        await curl(*retry, "--interface", client, url, "-d", "echo hi") == "hi\n\nexit: 0\n"
                    )

                await wait_until(served)
                assert f" of {client} on ".encode() in program.output
            # Health checks of haproxy carry no client address; they are answered too.
            assert b"is DOWN" not in proxy.output
        finally:
            running.signalProcess("KILL")
            await proxy.ended


@with_twisted
async def test_a_proxy_can_connect_thousands_of_times() -> None:
    port = free_port()

    def connect(number: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            header = f"PROXY TCP4 10.0.{number >> 8}.{number & 255} 192.0.2.1 56324 443\r\n"
            connection.sendall(f"{header}GET /healthz HTTP/1.0\r\n\r\n".encode())
            return connection.recv(4096)

    def connect_often() -> None:
        for number in range(3000):
            assert b" 200 OK\r\n" in connect(number), number

    async with listening(f"haproxy:tcp:{port}:interface=127.0.0.1"):
        await deferToThread(connect_often)


@with_twisted
async def test_the_proxy_protocol_header_is_read_inside_tls(tmp_path: Path) -> None:
    pem, port = certificate(tmp_path), free_port()

    def run_script() -> bytes:
        context = ssl.create_default_context(cafile=pem)
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.sendall(b"PROXY TCP4 198.51.100.7 192.0.2.1 1 2\r\n")
            secure.sendall(
                b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nConnection: close\r\n\r\necho hi"
            )
            received = b""
            while data := secure.recv(65536):
                received += data
            return received

    async with listening(f"haproxy:ssl:{port}:interface=127.0.0.1:privateKey={pem}:certKey={pem}") as program:
        assert b'data: "hi\\n"' in await deferToThread(run_script)
        assert b" of 198.51.100.7 on " in program.output


# Other endpoints.


@with_twisted
async def test_a_unix_socket_is_reused_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    arguments = ("--unix-socket", str(path), "http://localhost/run?raw=1", "-d", "echo hi")
    killed, pid = start([*TWISTD, "bfaas-coord", "--listen", f"unix:{path}"], SETTINGS)

    async def exists() -> bool:
        return path.exists()

    await wait_until(exists)
    os.kill(pid, signal.SIGKILL)
    await killed.ended
    assert path.exists()
    async with listening(f"unix:{path}:mode=600") as program:
        assert path.stat().st_mode & 0o777 == 0o600
        for _ in range(3):
            assert await curl(*arguments) == "hi\n\nexit: 0\n"
        assert b" of no address on " in program.output
    assert not path.exists()
    async with listening(f"haproxy:unix:{path}") as program:
        assert await curl("--haproxy-protocol", *arguments) == "hi\n\nexit: 0\n"


@with_twisted
async def test_a_socket_of_systemd_is_used() -> None:
    port = free_port()
    for endpoint in ("systemd:domain=INET:index=0", "systemd:domain=INET:name=bfaas.socket"):
        async with listening(endpoint, ["-c", SOCKET_ACTIVATION, str(port)]):
            url = f"http://127.0.0.1:{port}/run?raw=1"
            assert await curl(url, "-d", "echo hi; ls /proc/self/fd | wc -l") == "hi\n4\n\nexit: 0\n"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
@with_twisted
async def test_requests_over_ipv6_are_served() -> None:
    for endpoint in ("tcp6:{}:interface=\\:\\:1", "tcp:{}:interface=\\:\\:1"):
        port = free_port()
        async with listening(endpoint.format(port)) as program:
            assert await curl(f"http://[::1]:{port}/run?raw=1", "-d", "echo hi") == "hi\n\nexit: 0\n"
            assert b" of ::/64 on " in program.output
