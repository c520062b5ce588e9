"""Tests of the fork server through its socket, with workers that describe themselves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, NamedTuple, TextIO

from klein import _app as klein_app
from twisted.trial.unittest import SynchronousTestCase

from tests.support.waiting import TIMEOUT, block_until
from tests.support.workers import fork_server_for

DESCRIBE = """
import json, os, random, sys
print(json.dumps({
    "arguments": sys.argv[1:], "environment": dict(os.environ), "descriptors": os.listdir("/proc/self/fd"),
    "leads_session": os.getsid(0) == os.getpid(), "random": [random.random(), os.urandom(8).hex()],
}), flush=True)
print(sys.stdin.read(), file=sys.stderr, flush=True)
sys.exit(7)
"""

# What `python -m bfaas.basher --fork-server` does, until all is imported.
IMPORT = """
import gc, json, os, sys, threading
sys.modules["OpenSSL"] = sys.modules["ssl"] = None
import bfaas.basher
from bfaas.worker.fork_server import import_everything
import_everything()
print(json.dumps([
    "twisted.internet.reactor" in sys.modules, threading.active_count(), sorted(os.listdir("/proc/self/fd"))
]))
"""

# A worker that stops at once, and reports the modules that were not imported before it was forked.
LATE = """
import atexit
before = set(sys.modules)
atexit.register(lambda: print("late:", sorted(set(sys.modules) - before), flush=True))
from bfaas.system.runtime import run_service
run_service(bfaas.basher.Options(), bfaas.basher.makeService)
"""


class Forked(NamedTuple):
    """A forked worker, and the other end of its standard streams."""

    pid: int
    connection: socket.socket
    output: TextIO


class ForkServerTests(SynchronousTestCase):
    def start(self, command: tuple[str, ...]) -> None:
        self.connection, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(TIMEOUT)
        with remote:
            environment = {**os.environ, "SECRET": "of the server"}
            self.server = subprocess.Popen(
                command, stdin=remote.fileno(), stdout=subprocess.DEVNULL, env=environment
            )
        self.addCleanup(self.server.wait, TIMEOUT)
        self.addCleanup(self.connection.close)

    def send(self, message: dict[str, Any], *descriptors: int) -> None:
        socket.send_fds(self.connection, [json.dumps(message).encode()], descriptors)

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.connection.recv(4096))
        return message

    def fork(self, *arguments: str, **environment: str) -> Forked:
        local, remote = socket.socketpair()
        local.settimeout(TIMEOUT)
        self.addCleanup(local.close)
        with remote:
            request = {"arguments": arguments, "environment": environment, "death_signal": 9}
            self.send(request, remote.fileno())
        output = local.makefile("r")
        self.addCleanup(output.close)
        return Forked(self.receive()["pid"], local, output)

    def end(self, worker: Forked) -> int:
        """End the standard input of a worker, and wait for its end; return its status."""
        worker.connection.shutdown(socket.SHUT_WR)
        message = self.receive()
        self.assertEqual(worker.pid, message["ended"])
        status: int = message["status"]
        return status

    def test_worker_is_as_if_it_had_been_executed(self) -> None:
        self.start(fork_server_for(DESCRIBE))
        workers = self.fork("-a", "b", A="1"), self.fork(B="2")
        first, second = (json.loads(worker.output.readline()) for worker in workers)

        self.assertEqual((["-a", "b"], {"A": "1"}), (first["arguments"], first["environment"]))
        self.assertEqual(([], {"B": "2"}), (second["arguments"], second["environment"]))
        for each in (first, second):
            self.assertEqual({"0", "1", "2"}, set(each["descriptors"]) - {"3"})  # 3 is the directory
            self.assertTrue(each["leads_session"])
        self.assertEqual(set(), set(first["random"]) & set(second["random"]))
        for worker in workers:
            self.assertEqual(7, self.end(worker))

    def test_pid_is_not_assigned_again_before_it_is_released(self) -> None:
        self.start(fork_server_for(DESCRIBE))
        worker = self.fork()
        worker.output.readline()
        os.kill(worker.pid, signal.SIGKILL)
        self.assertEqual({"ended": worker.pid, "status": -signal.SIGKILL}, self.receive())
        self.assertEqual("Z", _state(worker.pid))

        self.send({"reap": worker.pid})
        self.fork()  # answered after the request before it
        self.assertEqual("", _state(worker.pid))

    def test_workers_end_with_the_server_and_the_server_with_its_client(self) -> None:
        self.start(fork_server_for(DESCRIBE))
        worker = self.fork()
        worker.output.readline()
        self.connection.close()

        self.assertEqual(0, self.server.wait(TIMEOUT))
        self.assertEqual("", worker.output.read())  # killed: it has written nothing to its standard error
        # Its end is not yet reported when its descriptors are closed.
        block_until(lambda: _state(worker.pid) in ("", "Z"), "the worker ends")

    def test_server_has_no_reactor_thread_or_descriptor_and_workers_import_nothing_late(self) -> None:
        imported = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)
        has_reactor, threads, descriptors = json.loads(imported.stdout)
        self.assertEqual((False, 1), (has_reactor, threads))
        self.assertEqual({"0", "1", "2"}, set(descriptors) - {"3"})

        serve = "import bfaas.worker.fork_server as server\nserver.serve_forks()\n"
        self.start((sys.executable, "-c", IMPORT + serve + LATE))
        listen = ("--exit-on-stdin-eof", "--listen", "tcp:0:interface=127.0.0.1")
        worker = self.fork(*listen, PUBLIC="0" * 64, FLY_MACHINE_ID="m", HOME="/tmp", MAXREQTIME="1s")
        self.assertEqual(0, self.end(worker))
        [late] = [line for line in worker.output if line.startswith("late:")]
        self.assertEqual("late: ['twisted.internet.reactor']\n", late)

    def test_klein_uses_the_reactor_in_run_only(self) -> None:
        users = {
            name
            for owner in (klein_app, klein_app.Klein)
            for name, function in vars(owner).items()
            if "reactor" in getattr(getattr(function, "__code__", None), "co_names", ())
        }
        self.assertEqual({"run"}, users)


def _state(pid: int) -> str:
    """Return the state of a process, such as Z; nothing if it does not exist."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
