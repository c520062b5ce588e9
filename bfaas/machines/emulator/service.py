"""The emulator as a program, `twistd bfaas-machines`: the Machines API and Fly's proxy for local machines."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred

from bfaas.http.client import single_use_agent
from bfaas.http.server import MAX_CONNECTIONS, BoundedSite
from bfaas.machines.emulator.fly_proxy import FlyProxy
from bfaas.machines.emulator.routes import MachinesServer
from bfaas.machines.local.host import examine_host
from bfaas.machines.local.processes import LocalMachines
from bfaas.system.listener import Listener
from bfaas.system.logs import with_logging
from bfaas.system.runtime import RoleOptions, check_options, configure_reactor, max_connections

if TYPE_CHECKING:
    from twisted.application.service import IService

_MAX_BODY = 16 << 20  # bytes


class Options(RoleOptions):
    """Command-line options of the emulator. If FLY_TOKEN is set, clients need this token."""

    role = "bfaas-machines"

    optParameters: ClassVar = [
        ["listen", "l", "tcp:4280:interface=127.0.0.1", "Endpoint of the Machines API."],
        ["proxy", "p", "tcp:4281:interface=127.0.0.1", "Endpoint of the proxy in front of the machines."],
        ["app", "a", "workers", "Name of the app that the machines belong to."],
    ]
    optFlags: ClassVar = [["rate-limits", "r", "Limit the rate of calls, as Fly does."]]


class MachinesService(MultiService):
    """The API, the proxy and the machines."""

    def __init__(self, machines: LocalMachines, sites: list[BoundedSite]) -> None:
        super().__init__()
        self._machines = machines
        self._sites = sites

    def stopService(self) -> Deferred[None]:
        """Stop listening and kill all machines."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await MultiService.stopService(self)
        await self._machines.shutdown()
        for site in self._sites:
            await site.drain()


def makeService(options: Options, reactor: Any = None) -> IService:
    """Create the emulator. Raises `StartError` or `HostError`, whose messages are one line."""
    if reactor is None:
        check_options(options)
        from twisted.internet import reactor  # noqa: PLC0415 - twistd has chosen the reactor by now
    configure_reactor(reactor)
    limited = bool(options["rate-limits"])
    host = examine_host()
    machines = LocalMachines(
        reactor, time.time, sandboxed=host.sandboxed, directory=host.directory, rate_limited=limited
    )
    server = MachinesServer(machines, options["app"], os.environ.get("FLY_TOKEN"))
    max_open = min(MAX_CONNECTIONS, max_connections())
    agent = single_use_agent(reactor)
    api = BoundedSite(reactor, server.app.resource(), _MAX_BODY, max_connections=max_open)
    proxy = BoundedSite(reactor, FlyProxy(machines, agent), _MAX_BODY, max_connections=max_open)
    service = MachinesService(machines, [api, proxy])
    for option, site in (("listen", api), ("proxy", proxy)):
        Listener(reactor, f"--{option}", options[option], site).setServiceParent(service)
    return with_logging(service, options, reactor)
