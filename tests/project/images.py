"""
Check both images, built by `make images` with buildah: the processes, their users, and what a script can do.

Needs root, since the images run with chroot isolation, which shares this host's network. If no base image can
be pulled, one from debootstrap will do: `buildah from scratch`, copy it, commit it under the base's name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from bfaas.tokens import Signer, genkey
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator

BUILDAH = os.environ.get("BUILDAH", "buildah").split()
LIMIT = 60.0
"""Seconds after which a step has failed."""

# Scripts for a worker, and their expected output.
SCRIPTS = {
    "id -u; id -G": "10001\n10001\n",
    "echo $HOME; touch ~/mine && cat ~/mine && pwd": "/home/worker\n/home/worker\n",
    "su -c id </dev/null >/dev/null 2>&1 || grep NoNewPrivs /proc/self/status": "NoNewPrivs:\t1\n",
    "cat /proc/WORKER/environ 2>/dev/null; kill -9 WORKER 2>/dev/null; echo $?": "1\n",
    "for d in / /etc /opt/bfaas /usr/bin; do touch $d/x 2>/dev/null && echo $d; done; echo none": "none\n",
    "command -v awk bc bzip2 curl file git jq less patch ps unzip vi xz zip setsid | wc -l": "15\n",
    "python3 -c 'print(6 * 7)'": "42\n",
}


class Running(NamedTuple):
    """A role in its image: buildah's process, the role's pid, its URL, and the seconds until it responded."""

    outer: subprocess.Popen[bytes]
    pid: int
    url: str
    start: float


def buildah(*words: str) -> str:
    """Run buildah, and return its output."""
    return subprocess.run([*BUILDAH, *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def fetch(url: str, script: str | None = None, **headers: str) -> bytes:
    """GET a URL, or POST a script. Return the body of the response."""
    body = None if script is None else script.encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=LIMIT) as response:
        return bytes(response.read())


def role_of(pid: int) -> int | None:
    """Return the pid of the role among the processes that buildah has started."""
    try:
        # The children of all threads, since any thread of buildah may have started it.
        children = [
            c for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()
        ]
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return None
    if b"bfaas" in name and b"buildah" not in name and b"chroot" not in name:
        return pid
    return next((found for child in children if (found := role_of(int(child)))), None)


@contextmanager
def running(image: str, **env: str) -> Iterator[Running]:
    """Run the image's entry point, as its user, on a free port of loopback."""
    entry = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]["Entrypoint"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    container = buildah("from", "--pull-never", image)
    try:
        options = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        listen = ["--listen", f"tcp:{port}:interface=127.0.0.1"]
        words = [*BUILDAH, "run", "--isolation", "chroot", *options, container, "--", *entry, *listen]
        began = time.monotonic()
        outer = subprocess.Popen(words)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_response(url, began)
            took, pid = time.monotonic() - began, role_of(outer.pid)
            assert pid, "the role is not among what buildah has started"
            yield Running(outer, pid, url, took)
        finally:
            if pid := role_of(outer.pid):
                os.kill(pid, signal.SIGKILL)
            outer.wait(LIMIT)
    finally:
        buildah("rm", container)


def wait_for_response(url: str, began: float) -> None:
    """Poll the health check until it responds."""
    while True:
        try:
            fetch(url + "/healthz")
        except urllib.error.URLError:
            assert time.monotonic() < began + LIMIT, "it does not respond"
            time.sleep(0.02)
        else:
            return


def worker(image: str) -> float:
    """Run each script on a worker of its own. Return the median of the seconds until they responded."""
    keys, starts = genkey(), []
    for script, expected in SCRIPTS.items():
        # A worker accepts one run.
        with running(image, PUBLIC=keys.public, FLY_MACHINE_ID="m1", FLY_REGION="ams") as one:
            starts.append(one.start)
            token = Signer(keys.private).sign("m1", time.time())
            output = fetch(
                one.url + "/run?raw=1", script.replace("WORKER", str(one.pid)), Authorization=token
            )
            assert output.decode() == f"{expected}\nexit: 0\n", (script, output)
            assert one.outer.wait(LIMIT) == 0, "a worker exits with 0 after its run"
    return sorted(starts)[len(starts) // 2]


def coordinator(image: str) -> float:
    """Run a script at a coordinator with local machines. Return the seconds until it responded."""
    with running(image, WORKER_APP="mock", MAXREQTIME="10s") as one:
        user = Path(f"/proc/{one.pid}").stat().st_uid
        assert user != 0, "a coordinator does not run as root"
        output = fetch(one.url + "/run?raw=1", "id -u")
        assert output.decode() == f"{user}\n\nexit: 0\n", output
        assert b"<html" in fetch(one.url + "/"), "the page is in the image"
        assert b"\nbfaas_queue_wait_seconds_count 1.0\n" in fetch("http://[::1]:9091/metrics"), (
            "the port in fly.toml"
        )
        os.kill(one.pid, signal.SIGTERM)
        assert one.outer.wait(LIMIT) == 0, "a coordinator exits with 0 after SIGTERM"
        return one.start


def trust(image: str) -> None:
    """Check that a coordinator's image verifies certificates against Debian's trust store."""
    authority = Authority()
    container = buildah("from", "--pull-never", image)
    try:
        with TemporaryDirectory() as home, tls_server(authority, Path(home)) as url:
            settings = {"FLY_FLAPS_BASE_URL": url, "FLY_TOKEN": "t", "WORKER_APP": "workers"}
            options = [word for name, value in settings.items() for word in ("--env", f"{name}={value}")]
            words = [*BUILDAH, "run", "--isolation", "chroot", *options, container, "--", "bfaas", "machines"]

            def machines() -> str:
                done = subprocess.run(
                    words, check=False, timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
                return done.stdout.decode()

            assert "the certificate is not trusted" in (output := machines()), output
            trusted = Path(home) / "tests.crt"
            trusted.write_bytes(authority.certificate)
            buildah("copy", container, str(trusted), "/usr/local/share/ca-certificates/tests.crt")
            buildah(
                "run", "--isolation", "chroot", "--user", "root", container, "--", "update-ca-certificates"
            )
            assert machines().split() == ["ID", "POOL", "STATE", "AGE", "LEASE", "NAME"], machines()
    finally:
        buildah("rm", container)


@contextmanager
def tls_server(authority: Authority, home: Path) -> Iterator[str]:
    """Serve an app without machines on loopback, over TLS, with a certificate for localhost."""

    class App(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

    pem = home / "server.pem"
    pem.write_bytes(b"".join(authority.issue("localhost")))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    with ThreadingHTTPServer(("127.0.0.1", 0), App) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    """Check both images, and print how long they take to start, buildah's own time included."""
    print(f"basher: {len(SCRIPTS)} scripts passed; responds after {worker('bfaas-basher'):.2f} s")
    print(f"coord: runs a script and shuts down; responds after {coordinator('bfaas-coord'):.2f} s")
    trust("bfaas-coord")
    print("coord: trusts Debian's trust store, and nothing else")


if __name__ == "__main__":
    main()
