"""What a pool is configured with, and how its machines are named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

from bfaas.machines.api import MachineConfig

if TYPE_CHECKING:
    from random import Random

    from bfaas.machines.api import Machine
    from bfaas.settings import CoordSettings


CLEANING_PERIOD = 300.0
"""Seconds between two cleanings, give or take a fifth."""


@dataclass(frozen=True)
class StepTimeouts:
    """
    Seconds that each step of a machine's life may take before the machine is given up.

    `create` bounds one attempt to make it, since while nobody knows whether there is one, attempts go on;
    and its first start, which waits for the image. `inspect` bounds what cleaning does about one machine,
    `exit` how much longer than a run `Pool.destroy` takes.
    """

    create: float = 90.0
    start: float = 20.0
    ready: float = 15.0
    stop: float = 20.0
    destroy: float = 20.0
    lease: float = 10.0
    inspect: float = 20.0
    exit: float = 75.0


@dataclass(frozen=True)
class PoolConfig:
    """
    Which machines a pool makes, and how many.

    Spans of time are in seconds. `config` is given the metadata that says whose it is. `standby` machines are
    kept ready ahead of requests, suspended if `suspend_standby` says so.
    """

    name: str
    size: int
    region: str
    config: MachineConfig
    max_req_time: float
    lease_ttl: int
    standby: int = 0
    suspend_standby: bool = False
    cleaning_period: float = CLEANING_PERIOD
    limits: StepTimeouts = field(default_factory=StepTimeouts)

    @property
    def pool_id(self) -> str:
        """What a machine's metadata says of it, under the key `pool_id`."""
        return f"{self.name}//{self.config.image}"

    @property
    def trusted_ttl(self) -> float:
        """Seconds that we take a lease to last: less than it does, since two clocks never run alike."""
        return 0.95 * self.lease_ttl

    @cached_property
    def labels(self) -> dict[str, str]:
        """
        What its metadata says of a machine of ours: whose it is, and of what make.

        The make is a digest of all that it is made from: a machine of before a change of key, of limits or
        of size is another's.
        """
        config = self.config
        made_from = [
            config.image, sorted(config.env.items()), config.cpus, config.memory_mb, config.idle_timeout,
        ]  # fmt: skip
        make = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        return {"pool_id": self.pool_id, "make": make}

    def tagged(self) -> MachineConfig:
        """Make the config that machines are created with."""
        return replace(self.config, metadata={**self.config.metadata, **self.labels})

    def owns(self, machine: Machine) -> bool:
        """Tell whether a machine is this pool's: by its name, which cannot be changed."""
        return pool_of(machine.name) == self.name

    def recognizes(self, machine: Machine) -> bool:
        """Tell whether its metadata is what we gave it: it is of our make, and nobody meddled with it."""
        return all(machine.metadata.get(key) == value for key, value in self.labels.items())


def lease_ttl(max_req_time: float) -> int:
    """Choose how long leases last, in seconds: five minutes, and at least four requests of full length."""
    return max(300, int(4 * max_req_time) + 1)


def machine_name(pool: str, random: Random) -> str:
    """Make a name that no machine has had."""
    return f"worker-{pool}-{random.getrandbits(64):016x}"


def pool_of(name: str) -> str | None:
    """Tell the pool that a machine's name says, dashes and all; None if the name is no pool's."""
    prefix, _, rest = name.partition("-")
    pool, dash, unique = rest.rpartition("-")
    return pool if prefix == "worker" and dash and pool and unique else None


IDLE_MARGIN = 60
"""Seconds for which the workers' proxy keeps a silent connection beyond the longest silence of a run."""


def pool_config(settings: CoordSettings) -> PoolConfig:
    """Say what machines the pool makes: their environment tells a worker whom to trust, and its limits."""
    environment = {
        "PUBLIC": settings.signer.public,
        "MAXREQTIME": f"{settings.max_req_time:.9f}s",
        "MAXBODY": str(settings.max_body),
        "MAXOUTPUT": str(settings.max_output),
    }
    return PoolConfig(
        name=settings.machine_id,
        size=settings.pool_size,
        region=settings.region,
        config=MachineConfig(
            image=settings.fly.worker_image if settings.fly else "local",
            env=environment,
            cpus=settings.worker_cpus,
            memory_mb=settings.worker_memory_mb,
            # A raw run may be silent for all of its time, on this side of the coordinator too.
            idle_timeout=ceil(max(settings.max_req_time, settings.max_wait)) + IDLE_MARGIN,
        ),
        max_req_time=settings.max_req_time,
        lease_ttl=lease_ttl(settings.max_req_time),
        standby=settings.standby,
        suspend_standby=settings.standby_suspended,
    )
