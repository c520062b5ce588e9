"""
A process that has imported what a worker needs, and forks a worker on request, in milliseconds.

It has no reactor, no thread, no key, and no descriptors but its standard ones. Its standard input is a UNIX
socket (SOCK_SEQPACKET). Each message is a JSON object. Requests are:

* `{"arguments": [...], "environment": {...}, "death_signal": 9}` with one descriptor: fork a worker with
  these command-line arguments and variables. The descriptor becomes its standard input and outputs. When this
  process dies, the worker receives the signal. The response is `{"pid": 123}`, or `{"error": "..."}`.
* `{"reap": 123}`: the client no longer uses this pid, which may be assigned again. There is no response.

When a worker has ended, the server sends `{"ended": 123, "status": 0}`; the status is the negative signal if
a signal killed it. The server exits at the end of its input.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
from types import ModuleType
from typing import Any

from bfaas.protocol.formats import HEALTH_PATH
from bfaas.system import process_tree

PROCESS_NAME = b"bfaas-basher"
"""The name of forked workers, as `ps -e` shows it. Their command line remains the server's."""

_MAX_REQUEST = 1 << 20  # bytes; an environment is much smaller


def import_everything() -> None:
    """Import what a worker imports later, without installing a reactor, and compute what never changes."""
    import twisted.internet.default  # noqa: PLC0415
    import twisted.internet.epollreactor  # noqa: F401, PLC0415 - what the one above chooses on Linux

    # klein imports the reactor, and uses it only in Klein.run. The import would install it.
    reactor = "twisted.internet.reactor"
    sys.modules[reactor] = ModuleType(reactor)
    from bfaas.worker.app import WorkerApp  # noqa: PLC0415

    del sys.modules[reactor]
    WorkerApp.app.url_map.bind("localhost").match(HEALTH_PATH)


def serve_forks() -> None:
    """Serve requests until the end of input, which ends the process. Returns in each forked worker."""
    process_tree.set_non_dumpable()
    gc.collect()
    gc.freeze()  # collections in workers would write to, and so copy, every page with an object
    server = _ForkServer(socket.socket(fileno=0))
    while not server.step():
        pass


class _ForkServer:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._workers: dict[int, int] = {}  # pids by the descriptors that are readable at their end
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def step(self) -> bool:
        """Handle the next events. Return True in a forked worker only."""
        for descriptor, _ in self._poll.poll():
            if descriptor in self._workers:
                self._report_end(descriptor)
            elif self._handle_request():
                return True
        return False

    def _handle_request(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._connection, _MAX_REQUEST, 1)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "reap" in request:
            os.waitpid(request["reap"], 0)
            return False
        return self._fork(request, *descriptors)

    def _fork(self, request: dict[str, Any], descriptor: int) -> bool:
        server = os.getpid()
        preparing, prepared = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            self._send({"error": f"cannot fork: {error.strerror}"})
        if pid == 0:
            self._connection.detach()
            _become_worker(request, descriptor, server)
            return True
        os.close(prepared)
        os.close(descriptor)
        if pid > 0:
            os.read(preparing, 1)  # until the worker has closed its end, prepared or dead
            pidfd = os.pidfd_open(pid)
            self._workers[pidfd] = pid
            self._poll.register(pidfd, select.POLLIN)
            self._send({"pid": pid})
        os.close(preparing)
        return False

    def _report_end(self, pidfd: int) -> None:
        pid = self._workers.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        # Not reaped yet: its pid must not be assigned again while the client may still signal it.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None  # noqa: S101 - it is waited for without WNOHANG
        has_exited = ended.si_code == os.CLD_EXITED
        self._send({"ended": pid, "status": ended.si_status if has_exited else -ended.si_status})

    def _send(self, message: dict[str, object]) -> None:
        self._connection.send(json.dumps(message).encode())


def _become_worker(request: dict[str, Any], descriptor: int, server: int) -> None:
    """Make this forked process look as if it had been started with a command line of its own."""
    for number in range(3):
        os.dup2(descriptor, number)
    os.setsid()  # a terminal's Ctrl-C does not reach it
    process_tree.set_death_signal(request["death_signal"])
    if os.getppid() != server:
        os._exit(1)
    process_tree.set_name(PROCESS_NAME)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
