"""The configuration of a pool; the names and metadata of its machines."""

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


RECONCILE_INTERVAL = 300.0
"""Seconds between two reconciliations, plus or minus a fifth."""


@dataclass(frozen=True)
class StepTimeouts:
    """
    Timeouts of the steps of a machine's lifecycle, in seconds. A machine whose step times out is destroyed.

    `create` bounds one attempt to create it, and its first start, which waits for the image; attempts
    continue while it is not known whether the machine exists. `inspect` bounds the reconciler's work on one
    machine, and its request for the list. `exit` is how much longer than `max_req_time` `Pool.destroy` may
    take.
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
    Which machines a pool creates, and how many. Durations are in seconds.

    Machines are created from `template`, to which the pool adds its own metadata. `standby` machines are
    started in advance of requests, and then suspended if `suspend_standby` is true.
    """

    name: str
    size: int
    region: str
    template: MachineConfig
    max_req_time: float
    lease_ttl: int
    standby: int = 0
    suspend_standby: bool = False
    reconcile_interval: float = RECONCILE_INTERVAL
    timeouts: StepTimeouts = field(default_factory=StepTimeouts)

    @property
    def pool_id(self) -> str:
        """The value of `pool_id` in a machine's metadata."""
        return f"{self.name}//{self.template.image}"

    @property
    def safe_lease_ttl(self) -> float:
        """Seconds that a lease is relied on: 5 % less than its TTL, since the API's clock may run faster."""
        return 0.95 * self.lease_ttl

    @cached_property
    def metadata(self) -> dict[str, str]:
        """
        The metadata that identifies this pool's machines: the pool's id and a digest of the template.

        The digest covers the template except its metadata. A machine that was created before a change of key,
        limits or size therefore does not match, and is replaced.
        """
        template = self.template
        spec = [
            template.image,
            sorted(template.env.items()),
            template.cpus,
            template.memory_mb,
            template.idle_timeout,
        ]
        spec_hash = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
        return {"pool_id": self.pool_id, "spec_hash": spec_hash}

    @property
    def machine_config(self) -> MachineConfig:
        """The configuration of new machines: the template with the pool's metadata."""
        return replace(self.template, metadata={**self.template.metadata, **self.metadata})

    def owns(self, machine: Machine) -> bool:
        """Return whether a machine belongs to this pool: its name says so, and cannot be changed."""
        return pool_of(machine.name) == self.name

    def metadata_matches(self, machine: Machine) -> bool:
        """Return whether a machine has this pool's metadata: from the same template, and unchanged since."""
        return all(machine.metadata.get(key) == value for key, value in self.metadata.items())


def lease_ttl(max_req_time: float) -> int:
    """Return the TTL of leases in seconds: five minutes, or four full requests if longer."""
    return max(300, int(4 * max_req_time) + 1)


def machine_name(pool: str, random: Random) -> str:
    """Return a new unique machine name."""
    return f"worker-{pool}-{random.getrandbits(64):016x}"


def pool_of(name: str) -> str | None:
    """Return the pool in a machine's name, which may contain dashes; None if it is not a worker's name."""
    prefix, _, rest = name.partition("-")
    pool, dash, unique = rest.rpartition("-")
    return pool if prefix == "worker" and dash and pool and unique else None


IDLE_MARGIN = 60
"""Seconds by which the idle timeout of the workers' proxy exceeds the longest silence of a run."""


def worker_max_body(max_body: int) -> int:
    """
    Return the size in bytes of the largest request that a coordinator sends to a worker.

    Forms are sent as JSON, in which files are encoded in base64: up to 4/3 of their size, plus names.
    """
    return 2 * max_body


def pool_config(settings: CoordSettings) -> PoolConfig:
    """
    Return the pool's configuration for a coordinator's settings.

    Workers read the public key that they trust, and their limits, from the template's environment.
    """
    images = (settings.fly, settings.docker)
    image = next((provider.worker_image for provider in images if provider is not None), "local")
    ttl = lease_ttl(settings.max_req_time)
    environment = {
        "PUBLIC": settings.signer.public,
        "MAXREQTIME": f"{settings.max_req_time:.9f}s",
        "MAXBODY": str(worker_max_body(settings.max_body)),
        "MAXOUTPUT": str(settings.max_output),
        # A coordinator that lives sends each worker that waits a request three times in this time.
        "MAX_SILENCE": f"{ttl}s",
    }
    return PoolConfig(
        name=settings.machine_id,
        size=settings.pool_size,
        region=settings.region,
        template=MachineConfig(
            image=image,
            env=environment,
            cpus=settings.worker_cpus,
            memory_mb=settings.worker_memory_mb,
            # A raw run may be silent for all of its time, on the connection to the worker too.
            idle_timeout=ceil(max(settings.max_req_time, settings.max_wait)) + IDLE_MARGIN,
        ),
        max_req_time=settings.max_req_time,
        lease_ttl=ttl,
        standby=settings.standby,
        suspend_standby=settings.standby_suspended,
    )
