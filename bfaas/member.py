"""What a pool is told, and what it knows of each of its machines."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Lease, Machine, MachineConfig


CLEANING_PERIOD = 300.0
"""Seconds between two cleanings, give or take a fifth."""


@dataclass(frozen=True)
class Limits:
    """
    Seconds that each step of a machine's life may take before the machine is given up.

    `create` bounds one attempt to make it, since while nobody knows whether there is one, attempts go on;
    and its first start, which waits for the image. `look` bounds what cleaning does about one machine, `exit`
    how much longer than a run `Pool.destroy` takes.
    """

    create: float = 90.0
    start: float = 20.0
    ready: float = 15.0
    stop: float = 20.0
    destroy: float = 20.0
    lease: float = 10.0
    look: float = 20.0
    exit: float = 75.0


@dataclass(frozen=True)
class PoolSettings:
    """
    Which machines a pool makes, and how many.

    Spans of time are in seconds. `config` is given the metadata that says whose it is. `standby` machines are
    kept ready ahead of requests, suspended if `suspends` says so.
    """

    name: str
    size: int
    region: str
    config: MachineConfig
    max_req_time: float
    lease_ttl: int
    standby: int = 0
    suspends: bool = False
    cleaning_period: float = CLEANING_PERIOD
    limits: Limits = field(default_factory=Limits)

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

    def labelled(self) -> MachineConfig:
        """Make the config that machines are created with."""
        return replace(self.config, metadata={**self.config.metadata, **self.labels})

    def owns(self, machine: Machine) -> bool:
        """Tell whether a machine is this pool's: by its name, which cannot be changed."""
        return owner(machine.name) == self.name

    def recognizes(self, machine: Machine) -> bool:
        """Tell whether its metadata is what we gave it: it is of our make, and nobody meddled with it."""
        return all(machine.metadata.get(key) == value for key, value in self.labels.items())


def lease_ttl(max_req_time: float) -> int:
    """Choose how long leases last, in seconds: five minutes, and at least four requests of full length."""
    return max(300, int(4 * max_req_time) + 1)


def machine_name(pool: str, random: Random) -> str:
    """Make a name that no machine has had."""
    return f"worker-{pool}-{random.getrandbits(64):016x}"


def owner(name: str) -> str | None:
    """Tell the pool that a machine's name says, dashes and all; None if the name is no pool's."""
    prefix, _, rest = name.partition("-")
    pool, dash, unique = rest.rpartition("-")
    return pool if prefix == "worker" and dash and pool and unique else None


class Phase(enum.Enum):
    """Where a member of the pool is in its life."""

    CREATING = "creating"  # there may be a machine, or not yet
    RECLAIMING = "reclaiming"  # an earlier instance left it; being wiped, whatever it was doing
    IDLE = "idle"  # stopped, confirmed; costs nothing, starts when wanted
    STARTING = "starting"  # on its way to a request, or to stand by
    READY = "ready"  # started and answering, no request yet
    SUSPENDED = "suspended"  # the same, but frozen, or about to be
    THAWING = "thawing"  # on its way from there to a request
    BUSY = "busy"  # a request has it
    STOPPING = "stopping"  # used, and not to be used again until it is known to be stopped
    LEAVING = "leaving"  # being destroyed; has its place until that is done


Watch = Callable[[Phase, Phase, float], None]
"""Is told of a phase that a machine has left, of the one that it is in now, and how many seconds it took."""


@dataclass(eq=False)
class Member:
    """
    A place in the pool, and the machine that fills it.

    `since` is when its phase began. `lease_end` is counted from before the lease was asked for. `lost` is
    when an attempt to create it ended whose outcome is not known. `tainted` means that the machine must not
    be used again. `woken` is what its life waits for while it is idle or stands by: True when it is wanted,
    False when it is to end.
    """

    name: str
    clock: IReactorTime
    watch: Watch
    phase: Phase = Phase.CREATING
    known_machine: Machine | None = None
    lease: Lease | None = None
    lease_end: float = 0.0
    lost: float | None = None
    tainted: bool = False
    woken: Deferred[bool] | None = None

    def __post_init__(self) -> None:
        self.since = self.clock.seconds()

    def enter(self, phase: Phase) -> None:
        """Go on to another phase of its life, if it is in another."""
        if phase is not self.phase:
            now = self.clock.seconds()
            self.watch(self.phase, phase, now - self.since)
            self.phase, self.since = phase, now

    @property
    def machine(self) -> Machine:
        """The machine, in a phase in which there is one."""
        assert self.known_machine is not None, self.name  # noqa: S101 - phases after CREATING have one
        return self.known_machine

    @property
    def nonce(self) -> str | None:
        """What proves that the machine is leased to us."""
        return self.lease.nonce if self.lease else None

    def rest(self) -> Deferred[bool]:
        """Wait until somebody wakes it."""
        woken = self.woken = Deferred()
        return woken

    def wake(self, *, wanted: bool) -> None:
        """End its rest, if it rests."""
        if self.woken is not None:
            woken, self.woken = self.woken, None
            woken.callback(wanted)
