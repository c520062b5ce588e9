"""Context managers that run the measured programs, and end them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.client import fetch, get, post
from benchmarks.report import ROOT
from bfaas.machines.local.host import available_script_users, examine_host
from bfaas.system.confinement import sandbox_prefix
from bfaas.tokens import Signer, genkey
from tests.support.network import free_port
from tests.support.processes import end_process

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.client import Response
    from bfaas.system.confinement import User

MAX_OUTPUT = 4 << 30
COORD = ("-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "bfaas-coord")

DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
"""Command prefix of programs that must end if this process is killed."""

_KEYS = genkey()
_MACHINE_ID = "measured"
WORKER_IDENTITY = {"PUBLIC": _KEYS.public, "FLY_MACHINE_ID": _MACHINE_ID}
"""Settings of a worker: the public key that it trusts, and its machine id."""

_TIMEOUT = 60.0
_LOG_TAIL = 4000  # bytes


@dataclass(frozen=True)
class Program:
    """A program that listens on a port."""

    process: subprocess.Popen[bytes]
    port: int

    def status(self) -> Any:
        """Fetch a coordinator's /status."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)
        with closing(connection):
            connection.request("GET", "/status")
            return json.load(connection.getresponse())

    def wait_for(self, **machines: int) -> None:
        """Wait until a coordinator has exactly these numbers of machines by phase."""
        started_at = time.monotonic()
        while (current := self.status()["pool"]["machines"]) != machines:
            if time.monotonic() - started_at > _TIMEOUT:
                raise RuntimeError(f"the machines are {current}, not {machines}")
            time.sleep(0.02)

    def processor_ms(self) -> float:
        """Return the processor time of all threads so far, in ms."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text("ascii").split()[0]) for task in tasks) / 1e6

    def pin(self, cores: set[int]) -> None:
        """Keep all threads on these cores."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)

    def resident_kib(self) -> int:
        """Return the resident memory in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0])


@contextmanager
def program(*arguments: str, root: str | Path = ROOT, **settings: str) -> Iterator[Program]:
    """
    Run a program of the checkout `root` with `--listen` and these settings only.

    Enter the context when it listens.
    """
    port = free_port()
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": "/",
        "PYTHONPATH": str(root),
    }
    command = [*DIE_WITH_PARENT, sys.executable, *arguments, "--listen", f"tcp:{port}:interface=127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=root, env=environment | settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _wait_for(process, port)
            yield Program(process, port)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-_LOG_TAIL:].decode("utf-8", "replace"))
            raise
        finally:
            end_process(process, _TIMEOUT)


def coordinator(
    command: Sequence[str] = COORD, root: str | Path = ROOT, **settings: str
) -> AbstractContextManager[Program]:
    """Run a coordinator, with local machines unless the settings say otherwise."""
    defaults = {
        "WORKER_APP": "mock",
        "MAXREQTIME": "100s",
        "MAXPERCLIENT": "1000",
        "MAXOUTPUT": str(MAX_OUTPUT),
    }
    return program(*command, root=root, **defaults | settings)


class SharedWorker(NamedTuple):
    """One worker that serves the machines of all coordinators: see `benchmarks/shared_worker.py`."""

    api: Program
    port: int

    def coordinator(self, root: str | Path = ROOT, **settings: str) -> AbstractContextManager[Program]:
        """Run a coordinator whose machines have this worker."""
        defaults = {
            "WORKER_APP": "workers", "WORKER_IMAGE": "basher:1", "FLY_TOKEN": "token", "FLY_REGION": "ams",
            "FLY_MACHINE_ID": f"coord{free_port()}", "FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{self.api.port}",
            "PRIVATE": _KEYS.private, "WORKER_URL": f"http://127.0.0.1:{self.port}", "MAXREQTIME": "600s",
        }  # fmt: skip
        return coordinator(root=root, **defaults | settings)


@contextmanager
def shared_worker() -> Iterator[SharedWorker]:
    """Run the shared worker."""
    port = free_port()
    workers = f"tcp:{port}:interface=127.0.0.1"
    with program("-m", "benchmarks.shared_worker", "--workers", workers) as api:
        yield SharedWorker(api, port)


def signed(script: str, query: str = "") -> bytes:
    """Encode a request to a worker to run a script, with an auth token."""
    ticket = Signer(_KEYS.private).sign(_MACHINE_ID, time.time())
    return post(script, query, f"Authorization: {ticket}")


@dataclass(frozen=True)
class Worker:
    """A worker without a coordinator, for one run."""

    program: Program

    def run(self, script: str, query: str = "") -> Response:
        """Run a script."""
        return fetch(self.program.port, signed(script, query))

    def end(self) -> None:
        """Kill it, as a pool stops a machine."""
        self.program.process.kill()
        self.program.process.wait(_TIMEOUT)


class Confined(NamedTuple):
    """The confinement of scripts on local machines: home, user and sandbox command, as far as available."""

    home: str
    user: User | None
    sandbox: tuple[str, ...]


@contextmanager
def confined() -> Iterator[Confined]:
    """Create a home, and acquire a user for scripts."""
    with tempfile.TemporaryDirectory(prefix="bfaas-bench-") as directory:
        users = available_script_users()
        home, user = Path(directory, "home"), users.acquire() if users else None
        home.mkdir(mode=0o700)
        Path(directory).chmod(0o711)
        if user is not None:
            os.chown(home, *user)
        yield Confined(str(home), user, sandbox_prefix(str(home)) if _sandboxed() else ())


@contextmanager
def worker() -> Iterator[Worker]:
    """Run a worker as a local machine does; enter the context when all its code is loaded."""
    with confined() as (home, user, sandbox):
        settings = {
            **WORKER_IDENTITY, "MAXREQTIME": "100s", "MAXOUTPUT": str(MAX_OUTPUT), "HOME": home,
            "RUN_AS": str(user.uid) if user else "", "SANDBOX": shlex.join(sandbox),
        }  # fmt: skip
        with program("-m", "bfaas.basher", **settings) as running:
            for _ in range(2):  # the first response does not need all of it
                fetch(running.port, get("/healthz"))
            yield Worker(running)


@cache
def _sandboxed() -> bool:
    return examine_host().sandboxed


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    started_at = time.monotonic()
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() - started_at > _TIMEOUT:
            raise RuntimeError(f"{process.args!r} does not listen")
        time.sleep(0.005)
