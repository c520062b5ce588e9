"""A real worker process, and a client of it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from treq.client import HTTPClient
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol, Protocol, connectionDone
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.http_headers import Headers

import bfaas
from bfaas.system import process_tree
from bfaas.tokens import Signer, genkey
from bfaas.worker.fork_server import PROCESS_NAME
from tests.support.network import free_port
from tests.support.responses import Response
from tests.support.waiting import TIMEOUT, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from treq.response import _Response
    from twisted.python.failure import Failure
    from twisted.trial.unittest import TestCase

reactor: Any = _reactor

MACHINE = "machine-under-test"
KEYS = genkey()
LIMIT = TIMEOUT
"""Seconds until a test gives up waiting: far more than anything takes."""

BASHER = ("-m", "bfaas.basher")
TWISTD = ("-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "bfaas-basher")

_ROOT = Path(bfaas.__file__).resolve().parents[1]


def auth_token(machine_id: str = MACHINE, private: str = KEYS.private) -> str:
    """Sign an auth token that is valid from now on."""
    return Signer(private).sign(machine_id, time.time())


def fork_server_for(program: str) -> tuple[str, ...]:
    """Return the command of a fork server whose workers run a Python program."""
    start = "from bfaas.worker.fork_server import serve_forks\nserve_forks()\n"
    return (sys.executable, "-c", start + program)


def is_fork_server(pid: int) -> bool:
    """Return whether a process forks workers. Its workers have its command line, and another name."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        name = Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return False
    return (b"--fork-server" in command or b"serve_forks" in command) and name.strip() != PROCESS_NAME


def watch_for_leftovers(test: TestCase) -> Callable[[], list[process_tree.Process]]:
    """
    Become a subreaper; return a function that returns the live processes that tests have started.

    Fork servers do not count. At the end of the test there must be none, and no fork server. Remaining ones
    are killed.
    """
    process_tree.become_subreaper()
    known = frozenset(process_tree.children(os.getpid()))

    def alive() -> list[process_tree.Process]:
        return [process for process in process_tree.descendants(os.getpid(), known) if not process.dead]

    def leftovers() -> list[process_tree.Process]:
        return [process for process in alive() if not is_fork_server(process.pid)]

    def clean_up() -> None:
        found = alive()
        while process_tree.kill_descendants_once(os.getpid(), known):
            process_tree.reap_orphans(known)
            time.sleep(0.005)
        test.assertEqual([], found)

    test.addCleanup(clean_up)
    return leftovers


class Reader(Protocol):
    """A client that reads a response at the pace that the test sets."""

    transport: Any

    def __init__(self) -> None:
        self.data = bytearray()
        self.finished: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.finished.callback(None)

    def pause(self) -> None:
        self.transport.pauseProducing()

    def resume(self) -> None:
        self.transport.resumeProducing()

    def leave(self) -> None:
        self.transport.loseConnection()


class Worker(ProcessProtocol):
    """A worker process. It is killed at the end of its test if it still runs."""

    transport: Any

    def __init__(self, port: int) -> None:
        self.output = bytearray()
        self.errors = bytearray()
        self.status: int | None = None
        self.pid: int = 0
        self.port = port
        pool = HTTPConnectionPool(reactor, persistent=False)
        self._client = HTTPClient(Agent(reactor, pool=pool))

    @classmethod
    async def start(
        cls,
        test: TestCase,
        *arguments: str,
        program: tuple[str, ...] = BASHER,
        leaders: tuple[str, ...] = (),
        up: bool = True,
        **environment: str,
    ) -> Self:
        """
        Start a worker on a free port, and wait until it listens, unless `up` is false.

        `leaders` is a command line that executes the worker, such as that of `setpriv`.
        """
        port = free_port()
        worker = cls(port)
        watch_for_leftovers(test)
        listen = f"tcp:{port}:interface=127.0.0.1"
        command = [*leaders, sys.executable, *program, "--listen", listen, *arguments]
        defaults = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(_ROOT),
            "HOME": "/tmp",
            "PUBLIC": KEYS.public,
            "FLY_MACHINE_ID": MACHINE,
            "FLY_REGION": "ams",
        }
        worker.pid = reactor.spawnProcess(worker, command[0], command, env=defaults | environment).pid
        test.addCleanup(worker._clean_up)
        if up:
            await wait_until(lambda: worker.listens or worker.status is not None, "a worker listens")
            assert worker.status is None, worker.errors.decode()
        return worker

    @property
    def listens(self) -> bool:
        """Whether the port accepts connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def resident_kb(self) -> int:
        """The resident memory in KiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    @property
    def peak_kb(self) -> int:
        """The peak of the resident memory in KiB; 0 if the process has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return int((status.partition("VmHWM:")[2].split() or ["0"])[0])

    def below(self, name: str) -> int:
        """Return the number of descendants with a name."""
        names = []
        for process in process_tree.descendants(self.pid):
            try:
                names.append(Path(f"/proc/{process.pid}/comm").read_text().strip())
            except (FileNotFoundError, ProcessLookupError):
                continue
        return names.count(name)

    def send_signal(self, name: str) -> None:
        self.transport.signalProcess(name)

    def end_input(self) -> None:
        self.transport.closeStdin()

    async def ended(self) -> int:
        """Wait for the end of the process; return its exit code, negative for a signal."""
        await wait_until(lambda: self.status is not None, "a worker ends")
        assert self.status is not None
        return os.waitstatus_to_exitcode(self.status)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        authorization: str | None = None,
        content_type: str | None = None,
    ) -> _Response:
        """Send a request; return its response, whose body is still to be read."""
        headers = Headers({} if authorization is None else {"Authorization": [authorization]})
        if content_type is not None:
            headers.setRawHeaders("Content-Type", [content_type])
        url = f"http://127.0.0.1:{self.port}{path}"
        return await self._client.request(method, url, data=body, headers=headers, unbuffered=True)

    async def fetch(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        authorization: str | None = None,
        content_type: str | None = None,
    ) -> Response:
        """Send a request; return its complete response."""
        response = await self.send(method, path, body, authorization, content_type)
        content = await response.content()
        headers = {
            name.decode().lower(): values[0].decode() for name, values in response.headers.getAllRawHeaders()
        }
        return Response(response.code, headers, content)

    async def run(self, script: str | bytes, query: str = "") -> Response:
        """Run a script; return the complete response."""
        body = script.encode() if isinstance(script, str) else script
        return await self.fetch("POST", f"/run{query}", body, auth_token())

    async def run_json(self, **fields: object) -> Response:
        """Send a JSON request; return the complete response."""
        body = json.dumps(fields).encode()
        return await self.fetch("POST", "/run", body, auth_token(), "application/json")

    async def stream(self, script: str, query: str = "", *, paused: bool = False) -> Reader:
        """Run a script; return a reader of the response."""
        response = await self.send("POST", f"/run{query}", script.encode(), auth_token())
        assert response.code == 200, response.code
        reader = Reader()
        response.deliverBody(reader)
        if paused:  # deliverBody has resumed the transport
            reader.pause()
        return reader

    def outReceived(self, data: bytes) -> None:
        self.output += data

    def errReceived(self, data: bytes) -> None:
        self.errors += data

    def processEnded(self, reason: Failure) -> None:
        self.status = getattr(reason.value, "status", 0)

    async def _clean_up(self) -> None:
        if self.status is None:
            self.send_signal("KILL")
            await self.ended()
