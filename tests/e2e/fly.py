"""The emulator of the Machines API as a separate program, and a client of it."""

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

    emulator: Running
    proxy_port: int
    api: FlyMachines

    def settings(self, pool: str, size: int = 2, **more: str) -> dict[str, str]:
        """Return the settings of a coordinator that uses the emulator."""
        return {
            "WORKER_APP": "workers",
            "WORKER_IMAGE": "basher:1",
            "FLY_TOKEN": "secret",
            "FLY_REGION": "ams",
            "FLY_MACHINE_ID": pool,
            "FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{self.emulator.port}",
            "WORKER_URL": f"http://127.0.0.1:{self.proxy_port}",
            "PRIVATE": genkey().private,
            "POOLSIZE": str(size),
            **more,
        }

    async def machines_of_pool(self, pool: str) -> dict[str, State]:
        """Return the state of each machine of a pool, by machine id."""
        return {
            machine.id: machine.state for machine in await self.api.list() if pool_of(machine.name) == pool
        }


async def start_emulator(port: int, proxy_port: int, **settings: str) -> Running:
    """Start the emulator without a client."""
    proxy = f"tcp:{proxy_port}:interface=127.0.0.1"
    needed = {"FLY_TOKEN": "secret", **settings}
    return await start_listening("bfaas-machines", port, ["--proxy", proxy], needed)


async def start_fly(**settings: str) -> Fly:
    """Start the emulator on free ports, and create a client."""
    proxy_port = free_port()
    emulator = await start_emulator(free_port(), proxy_port, **settings)
    url = f"http://127.0.0.1:{emulator.port}"
    api = FlyMachines(reactor, emulator.agent, random.Random(1), url, "workers", "secret")
    return Fly(emulator, proxy_port, api)
