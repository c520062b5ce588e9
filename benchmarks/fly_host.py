"""
The Machines API and Fly's proxy on one host, whose machines run any worker. Run as a program, as root.

The proxy waits until a machine that has started listens.

Each machine has a network namespace of its own, as on Fly, so that all workers listen on the same port. It
boots for `--boot` seconds, and then runs the command `--worker`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import MultiService
from twisted.application.strports import service as listening
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError as RefusedError
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from benchmarks.programs import DIE_WITH_PARENT
from bfaas.http.client import single_use_agent
from bfaas.http.server import BoundedSite
from bfaas.machines.emulator.backend import MachineBackend
from bfaas.machines.emulator.fly_proxy import FlyProxy
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.emulator.state import EmulatedMachines, Timing
from bfaas.system.runtime import RoleOptions, configure_reactor, run_service

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.application.service import IService
    from twisted.python.failure import Failure
    from twisted.web.server import Request

    from bfaas.machines.api import Machine, MachineConfig

WORKER_PORT = 8001
"""Port of the workers: that of the Go original, which cannot be chosen."""

_MAX_BODY = 16 << 20


class _Worker(ProcessProtocol):
    def __init__(self, exited: Callable[[], None]) -> None:
        self.exited = exited
        self.ended: Deferred[None] = Deferred()

    def processEnded(self, reason: Failure) -> None:  # noqa: ARG002 - a machine stops in any case
        self.ended.callback(None)
        self.exited()


class NamespacedProcesses(MachineBackend):
    """Runs each machine's worker in the machine's network namespace."""

    def __init__(self, reactor: Any, command: list[str], network: int) -> None:
        self._reactor = reactor
        self._command = command
        self._network = network
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._workers: dict[str, _Worker] = {}

    def allocate_url(self) -> str:
        """Make a network namespace, which a sleeping process holds, with a link to it."""
        number = len(self._holders) + 1
        own = Path("/proc/self/ns/net").readlink()
        holder = subprocess.Popen([*DIE_WITH_PARENT, "unshare", "--net", "sleep", "infinity"])
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            time.sleep(0.001)
        subnet, inside = f"10.{self._network}.{number}", ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        link = f"m{self._network}-{number}"
        for command in (
            f"ip link add {link} type veth peer name eth0 netns {holder.pid}",
            f"ip addr add {subnet}.1/24 dev {link}",
            f"ip link set {link} up",
        ):
            subprocess.run(command.split(), check=True)
        for command in ("link set lo up", f"addr add {subnet}.2/24 dev eth0", "link set eth0 up"):
            subprocess.run([*inside, "ip", *command.split()], check=True)
        url = f"http://{subnet}.2:{WORKER_PORT}"
        self._holders[url] = holder
        return url

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start a worker."""
        worker = self._workers[machine.id] = _Worker(exited)
        pid = self._holders[machine.url or ""].pid
        command = ["setsid", "nsenter", f"--net=/proc/{pid}/ns/net", *self._command]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": "/tmp",  # noqa: S108 - a directory in which scripts can write
            "FLY_MACHINE_ID": machine.id,
            **config.env,
        }
        self._reactor.spawnProcess(worker, command[0], command, env=environment, childFDs={1: 2, 2: 2})

    async def kill(self, machine_id: str) -> None:
        """Kill the worker with its session."""
        worker = self._workers.pop(machine_id, None)
        if worker is None:
            return
        transport: Any = worker.transport
        if transport is not None and transport.pid is not None:
            try:
                os.killpg(transport.pid, signal.SIGKILL)
            except ProcessLookupError:
                transport.signalProcess("KILL")
        if not worker.ended.called:
            await worker.ended

    async def pause(self, machine_id: str) -> None:
        """Stop the worker."""
        transport: Any = self._workers[machine_id].transport
        os.killpg(transport.pid, signal.SIGSTOP)

    async def resume(self, machine_id: str) -> None:
        """Continue the worker."""
        transport: Any = self._workers[machine_id].transport
        os.killpg(transport.pid, signal.SIGCONT)


class _Server(MachinesServer):
    """The API, with `autostop` as a boolean, as it was when the original was written: it reads no string."""

    def _reply(self, request: Request, document: object, status: int = 200) -> bytes:
        reply = super()._reply(request, document, status)
        return reply.replace(b'"autostop": "off"', b'"autostop": false')


@implementer(IAgent)
class _PatientAgent:
    """Connects again while a machine that has started does not listen yet: the original needs that."""

    _INTERVAL = 0.005
    _ATTEMPTS = 1000

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._agent = single_use_agent(reactor)

    def request(self, *arguments: Any) -> Deferred[IResponse]:
        """Send a request."""
        return Deferred.fromCoroutine(self._request(arguments))

    async def _request(self, arguments: tuple[Any, ...]) -> IResponse:
        for _ in range(self._ATTEMPTS):
            try:
                return await self._agent.request(*arguments)
            except RefusedError:
                await deferLater(self._reactor, self._INTERVAL)
        return await self._agent.request(*arguments)


class Options(RoleOptions):
    """Endpoints, and what machines are."""

    role = "fly_host"
    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint of the Machines API."],
        ["proxy", "p", None, "Endpoint of the proxy in front of the machines."],
        ["worker", "w", None, "Command of a worker, which listens on port 8001."],
        ["boot", "b", "0.3", "Seconds that a machine boots before that."],
        ["network", "n", "1", "Machines have addresses in 10.NETWORK.0.0/16."],
    ]


def make_service(options: Options, reactor: Any) -> IService:
    """Compose the service."""
    configure_reactor(reactor)
    backend = NamespacedProcesses(reactor, shlex.split(options["worker"]), int(options["network"]))
    machines = EmulatedMachines(reactor, time.time, backend, Timing(boot=float(options["boot"])))
    api = _Server(machines, "workers", None).app.resource()
    service = MultiService()
    for endpoint, resource in (
        (options["listen"], api),
        (options["proxy"], FlyProxy(machines, _PatientAgent(reactor))),
    ):
        site = BoundedSite(reactor, resource, _MAX_BODY)
        listening(endpoint, site, reactor).setServiceParent(service)
    return service


if __name__ == "__main__":
    run_service(Options(), make_service)
