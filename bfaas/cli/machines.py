"""`bfaas machines` and `bfaas destroy`: list the machines that exist, and destroy those of a pool."""

from __future__ import annotations

import time
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar

from bfaas.http.client import pooled_agent
from bfaas.machines.api import NotFoundError
from bfaas.machines.fly import FlyMachines
from bfaas.machines.local.containers import ContainerInventory
from bfaas.machines.local.engine import Engine, examine_engine
from bfaas.pooling.config import pool_of
from bfaas.pooling.reconciler import destroy_own
from bfaas.settings import ApiSettings, EngineSettings, uses_containers
from bfaas.system.runtime import run_with_reactor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from twisted.internet.defer import Deferred

    from bfaas.machines.api import Machine, MachineInventory

T = TypeVar("T")

_HEADERS = ("ID", "POOL", "STATE", "AGE", "LEASE", "NAME")


def with_machines(
    environ: Mapping[str, str], work: Callable[[MachineInventory], Coroutine[Deferred[Any], Any, T]]
) -> T:
    """
    Call `work` with the machines that the environment names, in a reactor, and return its result.

    Raises `SettingsError`, `EngineError` or `MachinesError`.
    """
    if uses_containers(environ):
        return _with_containers(EngineSettings.from_environment(environ), work)
    return _with_api(ApiSettings.from_environment(environ), work)


def _with_containers(
    settings: EngineSettings, work: Callable[[MachineInventory], Coroutine[Deferred[Any], Any, T]]
) -> T:
    info = examine_engine(settings)

    async def run(reactor: Any) -> T:
        engine = Engine(reactor, settings, info)
        try:
            return await work(ContainerInventory(engine))
        finally:
            await engine.close()

    return run_with_reactor(run)


def _with_api(
    settings: ApiSettings, work: Callable[[MachineInventory], Coroutine[Deferred[Any], Any, T]]
) -> T:
    async def run(reactor: Any) -> T:
        agent, connections = pooled_agent(reactor)
        api = FlyMachines(reactor, agent, SystemRandom(), settings.url, settings.worker_app, settings.token)
        try:
            return await work(api)
        finally:
            await connections.closeCachedConnections()

    return run_with_reactor(run)


async def format_table(api: MachineInventory) -> str:
    """Return a table of the app's machines: pool, state, age, and remaining time of the lease."""
    rows = [_HEADERS]
    for machine in sorted(await api.list(), key=lambda machine: machine.name):
        try:
            lease = _format_span((await api.get_lease(machine.id)).expires_at - time.time())
        except NotFoundError:
            lease = "none"
        age = _format_span(time.time() - machine.created_at)
        rows.append((machine.id, pool_of(machine.name) or "-", machine.state, age, lease, machine.name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


async def machines_of(api: MachineInventory, pool: str) -> list[Machine]:
    """Return a pool's machines."""
    return [machine for machine in await api.list() if pool_of(machine.name) == pool]


async def destroy(api: MachineInventory, machines: list[Machine]) -> int:
    """Destroy machines, one after the other. Return how many."""
    for machine in machines:
        await destroy_own(api, machine)
    return len(machines)


def format_count(count: int) -> str:
    """Format a number of machines, such as `1 machine`."""
    return f"{count} machine{'' if count == 1 else 's'}"


def _format_span(seconds: float) -> str:
    """Format a span of time in its two largest units, such as `4m59s`."""
    total = max(0, round(seconds))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            return f"{total // size}{unit}{total % size // smaller}{name}"
    return f"{total}s"
