"""What `bfaas machines` and `bfaas destroy` do: look at an app's machines, and destroy a pool's."""

from __future__ import annotations

import time
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar

from bfaas.http.client import pooled_agent
from bfaas.machines.api import NotFoundError
from bfaas.machines.fly import FlyMachines
from bfaas.pooling.config import pool_of
from bfaas.pooling.reconciler import destroy_own
from bfaas.system.runtime import run_with_reactor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from twisted.internet.defer import Deferred

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.settings import ApiSettings

T = TypeVar("T")

_HEADINGS = ("ID", "POOL", "STATE", "AGE", "LEASE", "NAME")


def with_api(settings: ApiSettings, work: Callable[[MachinesAPI], Coroutine[Deferred[Any], Any, T]]) -> T:
    """Do something with the Machines API, in a reactor of its own. Raises `MachinesError`."""

    async def run(reactor: Any) -> T:
        agent, connections = pooled_agent(reactor)
        api = FlyMachines(reactor, agent, SystemRandom(), settings.url, settings.worker_app, settings.token)
        try:
            return await work(api)
        finally:
            await connections.closeCachedConnections()

    return run_with_reactor(run)


async def table(api: MachinesAPI) -> str:
    """Describe the app's machines, a line each: whose, in which state, how old, how long still leased."""
    rows = [_HEADINGS]
    for machine in sorted(await api.list(), key=lambda machine: machine.name):
        try:
            left = _span((await api.get_lease(machine.id)).expires_at - time.time())
        except NotFoundError:
            left = "none"
        age = _span(time.time() - machine.created_at)
        rows.append((machine.id, pool_of(machine.name) or "-", machine.state, age, left, machine.name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


async def of_pool(api: MachinesAPI, pool: str) -> list[Machine]:
    """Find a pool's machines."""
    return [machine for machine in await api.list() if pool_of(machine.name) == pool]


async def destroy(api: MachinesAPI, machines: list[Machine]) -> int:
    """Destroy machines, one after the other; tells how many."""
    for machine in machines:
        await destroy_own(api, machine)
    return len(machines)


def _span(seconds: float) -> str:
    """Write a span of time in its two largest units."""
    whole = max(0, round(seconds))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller}{name}"
    return f"{whole}s"
