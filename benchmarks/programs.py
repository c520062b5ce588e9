"""The programs that are measured, each run for a while and ended in order; nothing of them is left."""

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

from benchmarks.client import ask, get, post
from benchmarks.report import ROOT
from bfaas.machines.local.host import available_script_users, can_sandbox
from bfaas.system.confinement import sandbox_prefix
from bfaas.tokens import Signer, genkey
from tests.support.network import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.client import Heard
    from bfaas.system.confinement import User

MAX_OUTPUT = 4 << 30
COORD = ("-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "bfaas-coord")

ENDS_WITH_US = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
"""What a program is started through that is to end when we are killed: it runs in its place."""

_KEYS = genkey()
_MACHINE = "measured"
TRUST = {"PUBLIC": _KEYS.public, "FLY_MACHINE_ID": _MACHINE}
"""What a worker is told of whom to trust, and who it is."""

_PATIENCE = 60.0
_TOLD = 4000


@dataclass(frozen=True)
class Program:
    """A program that listens."""

    process: subprocess.Popen[bytes]
    port: int

    def status(self) -> Any:
        """Ask a coordinator what it does."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        with closing(connection):
            connection.request("GET", "/status")
            return json.load(connection.getresponse())

    def wait_for(self, **machines: int) -> None:
        """Wait until a coordinator has so many machines in each phase, and none in any other."""
        began = time.monotonic()
        while (there := self.status()["pool"]["machines"]) != machines:
            if time.monotonic() - began > _PATIENCE:
                raise RuntimeError(f"{there}, where there should be {machines}")
            time.sleep(0.02)

    def resident_kib(self) -> int:
        """Tell how much memory it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0])


@contextmanager
def program(*arguments: str, **settings: str) -> Iterator[Program]:
    """Run a program that is told where to listen, with nothing but these settings, from when it does."""
    port = free_port()
    usual = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": "/",
        "PYTHONPATH": str(ROOT),
    }
    command = [*ENDS_WITH_US, sys.executable, *arguments, "--listen", f"tcp:{port}:interface=127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=usual | settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _wait_for(process, port)
            yield Program(process, port)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-_TOLD:].decode("utf-8", "replace"))
            raise
        finally:
            _end(process)


def coordinator(command: Sequence[str] = COORD, **settings: str) -> AbstractContextManager[Program]:
    """Run a coordinator, over local machines where the settings do not say otherwise."""
    usual = {"WORKER_APP": "mock", "MAXREQTIME": "100s", "MAXPERCLIENT": "1000", "MAXOUTPUT": str(MAX_OUTPUT)}
    return program(*command, **usual | settings)


def signed(script: str, query: str = "") -> bytes:
    """Write a request to a worker to run a script, as a coordinator would."""
    ticket = Signer(_KEYS.private).sign(_MACHINE, time.time())
    return post(script, query, f"Authorization: {ticket}")


@dataclass(frozen=True)
class Worker:
    """A worker without a coordinator, for one run."""

    program: Program

    def run(self, script: str, query: str = "") -> Heard:
        """Run a script, as a coordinator would have it run."""
        return ask(self.program.port, signed(script, query))

    def end(self) -> None:
        """Kill it, as a pool frees a machine."""
        self.program.process.kill()
        self.program.process.wait(_PATIENCE)


class Confined(NamedTuple):
    """What local machines confine a script with: a home, a user, or none, a sandbox if there is one."""

    home: str
    user: User | None
    sandbox: tuple[str, ...]


@contextmanager
def confined() -> Iterator[Confined]:
    """Make a home for scripts."""
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
    """Run a worker as local machines are run, from when all of it is loaded: it has answered twice."""
    with confined() as (home, user, sandbox):
        settings = {
            **TRUST, "MAXREQTIME": "100s", "MAXOUTPUT": str(MAX_OUTPUT), "HOME": home,
            "RUN_AS": str(user.uid) if user else "", "SANDBOX": shlex.join(sandbox),
        }  # fmt: skip
        with program("-m", "bfaas.basher", **settings) as running:
            for _ in range(2):
                ask(running.port, get("/healthz"))
            yield Worker(running)


@cache
def _sandboxed() -> bool:
    return can_sandbox()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    began = time.monotonic()
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() - began > _PATIENCE:
            raise RuntimeError(f"{process.args!r} does not listen")
        time.sleep(0.005)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
