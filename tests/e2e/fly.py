"""The emulator of the Machines API as a program, and its clients."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfaas.machines.fly import FlyMachines
from bfaas.pooling.config import pool_of
from bfaas.tokens import genkey
from tests.e2e.coordinator import Running, reactor, start_listening
from tests.support.network import free_port

if TYPE_CHECKING:
    from bfaas.machines.api import State


@dataclass
class Fly:
    """The emulator, and a client of it."""

    machines: Running
    proxy_port: int
    api: FlyMachines

    def settings(self, pool: str, size: int = 2, **more: str) -> dict[str, str]:
        """Tell a coordinator what it has to know."""
        return {
            "WORKER_APP": "workers",
            "WORKER_IMAGE": "basher:1",
            "FLY_TOKEN": "secret",
            "FLY_REGION": "ams",
            "FLY_MACHINE_ID": pool,
            "FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{self.machines.port}",
            "WORKER_URL": f"http://127.0.0.1:{self.proxy_port}",
            "PRIVATE": genkey().private,
            "POOLSIZE": str(size),
            **more,
        }

    async def of_pool(self, pool: str) -> dict[str, State]:
        """Tell a pool's machines."""
        return {
            machine.id: machine.state for machine in await self.api.list() if pool_of(machine.name) == pool
        }


async def start_emulator(port: int, proxy_port: int, **settings: str) -> Running:
    """Start the emulator without a client."""
    proxy = f"tcp:{proxy_port}:interface=127.0.0.1"
    needed = {"FLY_TOKEN": "secret", **settings}
    return await start_listening("bfaas-machines", port, ["--proxy", proxy], needed)


async def start_fly(**settings: str) -> Fly:
    """Start the emulator."""
    proxy_port = free_port()
    machines = await start_emulator(free_port(), proxy_port, **settings)
    url = f"http://127.0.0.1:{machines.port}"
    api = FlyMachines(reactor, machines.agent, random.Random(1), url, "workers", "secret")
    return Fly(machines, proxy_port, api)
