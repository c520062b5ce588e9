"""The coordinator program, `twistd bfaas-coord`: its options, composition and shutdown."""

from __future__ import annotations

import gc
import os
import time
from random import SystemRandom
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from bfaas.coordinator.access import AccessControl
from bfaas.coordinator.app import Coordinator
from bfaas.coordinator.metrics import Metrics
from bfaas.coordinator.run_tracker import RunTracker
from bfaas.coordinator.worker_client import WorkerClient
from bfaas.http.client import pooled_agent
from bfaas.http.origin_check import cross_origin_reason
from bfaas.http.server import MAX_CONNECTIONS, BoundedSite
from bfaas.machines.fly import FlyMachines
from bfaas.machines.local.containers import compose_container_machines
from bfaas.machines.local.host import examine_host
from bfaas.machines.local.processes import LocalMachines
from bfaas.pool import Pool
from bfaas.pooling.config import pool_config
from bfaas.settings import CoordSettings
from bfaas.system.listener import Listener
from bfaas.system.logs import with_logging
from bfaas.system.runtime import (
    RoleOptions,
    check_options,
    configure_reactor,
    max_connections,
    settings_or_exit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from random import Random

    from klein import Klein
    from twisted.application.service import IService

    from bfaas.machines.api import MachinesAPI
    from bfaas.settings import DockerSettings, FlySettings

_log = Logger()

METRICS_CONNECTIONS = 16
"""Limit on connections to the metrics endpoint."""

FEW_CONNECTIONS = 256
"""If the limit on open files allows fewer connections than this, the start logs a warning."""

FILES_PER_MACHINE = 4
"""Open files per machine: three pipes of a local one, and a connection to it."""


_LOOPBACK = "tcp:8000:interface=127.0.0.1"


class CoordService(MultiService):
    """The coordinator as a Twisted service. On stop it drains, then closes its pool or destroys it."""

    def __init__(
        self,
        coordinator: Coordinator,
        site: BoundedSite,
        listener: IService,
        pool: Pool,
        shut_down_machines: Callable[[], Awaitable[object]],
        *,
        destroy_on_exit: bool = False,
    ) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._site = site
        self._pool = pool
        self._shut_down_machines = shut_down_machines
        self._destroy_on_exit = destroy_on_exit
        listener.setServiceParent(self)

    def startService(self) -> None:
        """Start to accept requests and to manage machines."""
        super().startService()
        self._pool.start()

    def stopService(self) -> Deferred[None]:
        """Stop listening, wait for active runs, deliver their responses, close the pool."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await MultiService.stopService(self)
        # This rejects queued requests now; the pool waits for machines that are running.
        closing = Deferred.fromCoroutine(
            self._pool.destroy() if self._destroy_on_exit else self._pool.close()
        )
        await self._coordinator.drain()
        await self._site.drain()
        await closing
        await self._shut_down_machines()


class Options(RoleOptions):
    """Command-line options of the coordinator. All other settings are environment variables."""

    role = "bfaas-coord"

    optParameters: ClassVar = [
        ["listen", "l", None, "Endpoint for requests [default: tcp:8000; on loopback with local machines]."],
        ["metrics", "m", None, "Endpoint for Prometheus metrics, at /metrics [default: none]."],
    ]


class _Provider(NamedTuple):
    """A provider of machines, and what depends on the choice of one."""

    machines: MachinesAPI
    shut_down: Callable[[], Awaitable[object]]
    worker_url: str | None
    default_endpoint: str
    sandbox: str


def _fly_provider(reactor: Any, random: Random, fly: FlySettings) -> _Provider:
    agent, connections = pooled_agent(reactor)
    machines = FlyMachines(reactor, agent, random, fly.api.url, fly.api.worker_app, fly.api.token)
    return _Provider(
        machines, connections.closeCachedConnections, fly.worker_url, "tcp:8000", "virtual machine"
    )


def _local_provider(reactor: Any) -> _Provider:
    host = examine_host()
    machines = LocalMachines(reactor, time.time, sandboxed=host.sandboxed, directory=host.directory)
    sandbox = "bubblewrap" if host.sandboxed else "none"
    return _Provider(machines, machines.shutdown, None, _LOOPBACK, sandbox)


def _container_provider(reactor: Any, pool: str, docker: DockerSettings) -> _Provider:
    machines = compose_container_machines(reactor, time.time, docker, pool, os.environ)
    sandbox = f"container ({docker.runtime})" if docker.runtime else "container"
    return _Provider(machines, machines.shutdown, None, _LOOPBACK, sandbox)


def _provider(reactor: Any, random: Random, settings: CoordSettings) -> _Provider:
    if settings.fly is not None:
        return _fly_provider(reactor, random, settings.fly)
    if settings.docker is not None:
        return _container_provider(reactor, settings.machine_id, settings.docker)
    return _local_provider(reactor)


def makeService(options: Options, reactor: Any = None) -> IService:
    """Compose the coordinator from the environment. Raise `StartError` or exit if it cannot start."""
    if reactor is None:
        check_options(options)
        from twisted.internet import reactor  # noqa: PLC0415 - twistd has installed it by now
    settings = settings_or_exit("bfaas-coord", CoordSettings.from_environment)
    for warning in settings.idle_timeout_warnings:
        _log.warn("{warning}", warning=warning)
    configure_reactor(reactor)
    # Objects made during start-up are permanent. Frozen, they do not slow down garbage collections, which
    # delay deadlines.
    reactor.callWhenRunning(gc.freeze)

    access = None if settings.access is None else AccessControl(settings.access, time.time)
    random = SystemRandom()
    provider = _provider(reactor, random, settings)
    worker_client = WorkerClient(reactor, provider.worker_url, settings.max_output)
    metrics = Metrics()
    pool = Pool(provider.machines, worker_client, reactor, random, pool_config(settings), metrics)
    runs = RunTracker(reactor, time.time, random, metrics)
    coordinator = Coordinator(
        reactor, settings, pool, worker_client, time.time, runs, provider.sandbox, access
    )
    metrics.register_gauges(pool, coordinator)

    site = _public_site(reactor, coordinator.app, settings, has_metrics=bool(options["metrics"]))
    listener = Listener(reactor, "--listen", options["listen"] or provider.default_endpoint, site)
    service = CoordService(
        coordinator, site, listener, pool, provider.shut_down, destroy_on_exit=settings.destroy_on_exit
    )
    if options["metrics"]:
        metrics_site = BoundedSite(
            reactor, metrics.app.resource(), max_body=0, max_connections=METRICS_CONNECTIONS
        )
        Listener(reactor, "--metrics", options["metrics"], metrics_site).setServiceParent(service)
    return with_logging(service, options, reactor)


def _public_site(reactor: Any, app: Klein, settings: CoordSettings, *, has_metrics: bool) -> BoundedSite:
    """Return the site for requests, with as many connections as the limit on open files allows."""
    other_files = settings.pool_size * FILES_PER_MACHINE + (METRICS_CONNECTIONS if has_metrics else 0)
    connections = min(MAX_CONNECTIONS, max_connections(other_files))
    if connections < FEW_CONNECTIONS:
        _log.warn(
            "the limit on open files (ulimit -n) allows only {connections} connections",
            connections=connections,
        )
    on_fly = settings.fly is not None
    return BoundedSite(
        reactor,
        app.resource(),
        settings.max_body,
        max_connections=connections,
        # On Fly all connections come from its proxy. Elsewhere no address gets all of them: a web page can
        # open many from its reader's browser.
        max_per_address=connections if on_fly else connections // 2,
        request_filter=None if on_fly else cross_origin_reason,
    )
