"""
The coordinator: its options, what it is made of, how it ends.

`twistd bfaas-coord`.
"""

from __future__ import annotations

import gc
import time
from random import SystemRandom
from typing import TYPE_CHECKING, Any, ClassVar

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from bfaas.coordinator.app import Coordinator
from bfaas.coordinator.metrics import Metrics
from bfaas.coordinator.run_tracker import RunTracker
from bfaas.coordinator.worker_client import WorkerClient
from bfaas.http.client import pooled_agent
from bfaas.http.origin_check import cross_origin_reason
from bfaas.http.server import MAX_CONNECTIONS, BoundedSite
from bfaas.machines.fly import FlyMachines
from bfaas.machines.local.host import examine_host
from bfaas.machines.local.processes import LocalMachines
from bfaas.pool import Pool
from bfaas.pooling.config import pool_config
from bfaas.settings import CoordSettings
from bfaas.system.listener import Listener
from bfaas.system.logs import LOG_FORMAT, with_logging
from bfaas.system.runtime import (
    RoleOptions,
    check_options,
    configure_reactor,
    max_connections,
    settings_or_exit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from twisted.application.service import IService

    from bfaas.machines.api import MachinesAPI

_log = Logger()


METRICS_CONNECTIONS = 16
"""Connections to the metrics at the most."""

FEW_CONNECTIONS = 256
"""Below so many connections the log tells why there are no more."""

FILES_A_MACHINE = 4
"""Open files for each machine: a local one's three pipes, and a connection to it."""


class CoordService(MultiService):
    """The coordinator as a service: on stopping it drains, then closes its pool, or destroys it."""

    def __init__(
        self,
        coordinator: Coordinator,
        site: BoundedSite,
        listener: IService,
        pool: Pool,
        shut_down_machines: Callable[[], Awaitable[object]],
        *,
        destroys: bool = False,
    ) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._site = site
        self._pool = pool
        self._shut_down_machines = shut_down_machines
        self._destroys = destroys
        listener.setServiceParent(self)

    def startService(self) -> None:
        """Begin to take requests, and to look after the pool's machines."""
        super().startService()
        self._pool.start()

    def stopService(self) -> Deferred[None]:
        """Stop listening, let running requests end, deliver their answers, close the pool."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await MultiService.stopService(self)
        # Requests that wait in line are told now; the pool waits for machines that are in use.
        closing = Deferred.fromCoroutine(self._pool.destroy() if self._destroys else self._pool.close())
        await self._coordinator.drain()
        await self._site.drain()
        await closing
        await self._shut_down_machines()


class Options(RoleOptions):
    """Command-line options of the coordinator; everything else is in its environment."""

    role = "bfaas-coord"

    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint to take requests on; tcp:8000, on a laptop on loopback alone."],
        ["metrics", "m", None, "Endpoint to tell Prometheus on, at /metrics; none without it."],
        LOG_FORMAT,
    ]


def makeService(options: Options, reactor: Any = None) -> IService:
    """Compose the coordinator from the environment. Raise, or exit, with one line where it cannot be."""
    if reactor is None:
        check_options(options)
        from twisted.internet import reactor  # noqa: PLC0415 - the role was chosen, so the reactor was too
    settings = settings_or_exit("bfaas-coord", CoordSettings.from_environment)
    for warning in settings.idle_timeout_warnings:
        _log.warn("{warning}", warning=warning)
    configure_reactor(reactor)
    # What is there by then stays: looking through all of it for garbage, again and again, takes long enough
    # to make deadlines late.
    reactor.callWhenRunning(gc.freeze)
    random, fly = SystemRandom(), settings.fly
    machines: MachinesAPI
    if fly is None:
        host = examine_host()
        machines = local = LocalMachines(
            reactor, time.time, sandboxed=host.sandboxed, directory=host.directory
        )
        shut_down, worker_url, endpoint = local.shutdown, None, "tcp:8000:interface=127.0.0.1"
    else:
        agent, connections = pooled_agent(reactor)
        machines = FlyMachines(reactor, agent, random, fly.api.url, fly.api.worker_app, fly.api.token)
        shut_down, worker_url, endpoint = connections.closeCachedConnections, fly.worker_url, "tcp:8000"
    proxy = WorkerClient(reactor, worker_url, settings.max_output)
    metrics = Metrics()
    pool = Pool(machines, proxy, reactor, random, pool_config(settings), metrics)
    runs = RunTracker(reactor, time.time, random, metrics)
    coordinator = Coordinator(reactor, settings, pool, proxy, time.time, runs)
    metrics.register_gauges(pool, coordinator)
    others = settings.pool_size * FILES_A_MACHINE + (METRICS_CONNECTIONS if options["metrics"] else 0)
    most = min(MAX_CONNECTIONS, max_connections(others))
    if most < FEW_CONNECTIONS:
        _log.warn("the open files that are allowed (ulimit -n) suffice for {most} connections", most=most)
    site = BoundedSite(
        reactor, coordinator.app.resource(), settings.max_body, max_connections=most,
        # On Fly all connections come from its proxy; on a laptop some come from pages in a browser.
        max_per_address=most if fly else most // 2, request_filter=None if fly else cross_origin_reason,
    )  # fmt: skip
    listener = Listener(reactor, "--listen", options["listen"] or endpoint, site)
    service = CoordService(coordinator, site, listener, pool, shut_down, destroys=settings.destroy_on_exit)
    if options["metrics"]:
        told = metrics.app.resource()
        page = BoundedSite(reactor, told, max_body=0, max_connections=METRICS_CONNECTIONS)
        Listener(reactor, "--metrics", options["metrics"], page).setServiceParent(service)
    return with_logging(service, options, reactor)
