"""
Looks into both images, built by `make images` with buildah: what runs there, as whom, what a script can do.

Needs root, since it runs them with chroot isolation, and so shares this host's network. Where no base can be
pulled, one made by debootstrap does: `buildah from scratch`, copied into it, committed as the base's name.
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
"""Seconds after which something is taken not to happen."""

# What a script finds in a worker's machine: a command, and what it has to print.
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
    """A role in its image: buildah's process, the role's own, its address, seconds until it answered."""

    outer: subprocess.Popen[bytes]
    pid: int
    url: str
    start: float


def buildah(*words: str) -> str:
    """Have buildah do something, and tell what it says."""
    return subprocess.run([*BUILDAH, *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def ask(url: str, script: str | None = None, **headers: str) -> bytes:
    """Get a path, or have a script run."""
    body = None if script is None else script.encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=LIMIT) as answer:
        return bytes(answer.read())


def role_of(pid: int) -> int | None:
    """Find the role among the processes that buildah has started."""
    try:
        # Of all threads: whichever of buildah's it was that started it.
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
    """Run what the image's entry point names, as its user, on a free port of loopback."""
    entry = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]["Entrypoint"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    container = buildah("from", "--pull-never", image)
    try:
        given = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        listen = ["--listen", f"tcp:{port}:interface=127.0.0.1"]
        words = [*BUILDAH, "run", "--isolation", "chroot", *given, container, "--", *entry, *listen]
        began = time.monotonic()
        outer = subprocess.Popen(words)
        try:
            url = f"http://127.0.0.1:{port}"
            until_it_answers(url, began)
            took, pid = time.monotonic() - began, role_of(outer.pid)
            assert pid, "the role is not among what buildah has started"
            yield Running(outer, pid, url, took)
        finally:
            if pid := role_of(outer.pid):
                os.kill(pid, signal.SIGKILL)
            outer.wait(LIMIT)
    finally:
        buildah("rm", container)


def until_it_answers(url: str, began: float) -> None:
    """Ask for its health until it tells."""
    while True:
        try:
            ask(url + "/healthz")
        except urllib.error.URLError:
            assert time.monotonic() < began + LIMIT, "it does not answer"
            time.sleep(0.02)
        else:
            return


def worker(image: str) -> float:
    """Have a worker for each script; tell the median of the seconds until they answered."""
    keys, starts = genkey(), []
    for script, expected in SCRIPTS.items():
        # It takes one run in its life.
        with running(image, PUBLIC=keys.public, FLY_MACHINE_ID="m1", FLY_REGION="ams") as one:
            starts.append(one.start)
            ticket = Signer(keys.private).sign("m1", time.time())
            said = ask(one.url + "/run?raw=1", script.replace("WORKER", str(one.pid)), Authorization=ticket)
            assert said.decode() == f"{expected}\nexit: 0\n", (script, said)
            assert one.outer.wait(LIMIT) == 0, "a worker whose run is over ends with 0"
    return sorted(starts)[len(starts) // 2]


def coordinator(image: str) -> float:
    """Have a coordinator with local machines run a script and end; tell the seconds until it answered."""
    with running(image, WORKER_APP="mock", MAXREQTIME="10s") as one:
        user = Path(f"/proc/{one.pid}").stat().st_uid
        assert user != 0, "a coordinator is not root"
        said = ask(one.url + "/run?raw=1", "id -u")
        assert said.decode() == f"{user}\n\nexit: 0\n", said
        assert b"<html" in ask(one.url + "/"), "its page is in the image"
        assert b"\nbfaas_queue_seconds_count 1.0\n" in ask("http://[::1]:9091/metrics"), "as fly.toml has it"
        os.kill(one.pid, signal.SIGTERM)
        assert one.outer.wait(LIMIT) == 0, "a coordinator that is told to end ends with 0"
        return one.start


def trust(image: str) -> None:
    """Check that a coordinator's image verifies certificates against Debian's trust store."""
    authority = Authority()
    container = buildah("from", "--pull-never", image)
    try:
        with TemporaryDirectory() as home, tls_server(authority, Path(home)) as url:
            settings = {"FLY_FLAPS_BASE_URL": url, "FLY_TOKEN": "t", "WORKER_APP": "workers"}
            given = [word for name, value in settings.items() for word in ("--env", f"{name}={value}")]
            words = [*BUILDAH, "run", "--isolation", "chroot", *given, container, "--", "bfaas", "machines"]

            def machines() -> str:
                said = subprocess.run(
                    words, check=False, timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
                return said.stdout.decode()

            assert "the certificate is not trusted" in (said := machines()), said
            known = Path(home) / "tests.crt"
            known.write_bytes(authority.certificate)
            buildah("copy", container, str(known), "/usr/local/share/ca-certificates/tests.crt")
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

    both = home / "server.pem"
    both.write_bytes(b"".join(authority.issue("localhost")))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(both)
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
    """Look into both, and tell how long they take to start, buildah's own time included."""
    print(f"basher: {len(SCRIPTS)} scripts as they should be; answers after {worker('bfaas-basher'):.2f} s")
    print(f"coord: runs a script and ends in order; answers after {coordinator('bfaas-coord'):.2f} s")
    trust("bfaas-coord")
    print("coord: trusts what Debian's trust store has, and nothing else")


if __name__ == "__main__":
    main()
