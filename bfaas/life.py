"""
The steps of one machine's life in a pool, each within a limit of its own.

What the steps are taken for, and in which order, is the pool's business.
"""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.machines.api import (
    Lease,
    LeaseHeldError,
    Machine,
    MachineConfig,
    MachinesAPI,
    MachinesError,
    NameTakenError,
    NotFoundError,
    NotReadyError,
    State,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from random import Random

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    Probe = Callable[[Machine], Coroutine[Deferred[Any], Any, None]]

T = TypeVar("T")

_PAST_STARTING = (State.DESTROYING, State.DESTROYED, State.FAILED)


@dataclass(frozen=True)
class Limits:
    """
    Seconds that each step of a machine's life may take before the machine is given up.

    `create` bounds one attempt to make it, since while nobody knows whether there is one, attempts go on;
    and its first start, which waits for the image.
    """

    create: float = 90.0
    start: float = 20.0
    ready: float = 15.0
    stop: float = 20.0
    destroy: float = 20.0
    lease: float = 10.0


@dataclass(frozen=True)
class PoolSettings:
    """
    Which machines a pool makes, and how many.

    `max_req_time` and `lease_ttl` are seconds. `config` is given the metadata that says whose it is.
    """

    name: str
    size: int
    region: str
    config: MachineConfig
    max_req_time: float
    lease_ttl: int
    limits: Limits = field(default_factory=Limits)

    @property
    def pool_id(self) -> str:
        """What a machine's metadata says of it, under the key `pool_id`."""
        return f"{self.name}//{self.config.image}"

    def labelled(self) -> MachineConfig:
        """Make the config that machines are created with."""
        return replace(self.config, metadata={**self.config.metadata, "pool_id": self.pool_id})

    def owns(self, machine: Machine) -> bool:
        """Tell whether a machine is this pool's: by its name, which cannot be changed."""
        return owner(machine.name) == self.name

    def recognizes(self, machine: Machine) -> bool:
        """Tell whether its metadata is what we gave it: it is of this image, and nobody meddled with it."""
        return machine.metadata.get("pool_id") == self.pool_id


def lease_ttl(max_req_time: float) -> int:
    """Choose how long leases last, in seconds: five minutes, and at least four requests of full length."""
    return max(300, int(4 * max_req_time) + 1)


def machine_name(pool: str) -> str:
    """Make a name that no machine has had."""
    return f"worker-{pool}-{secrets.token_hex(8)}"


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
    STARTING = "starting"  # on its way to a request
    READY = "ready"  # started and answering, no request yet
    BUSY = "busy"  # a request has it
    STOPPING = "stopping"  # used, and not to be used again until it is known to be stopped
    LEAVING = "leaving"  # being destroyed; has its place until that is done


@dataclass(eq=False)
class Member:
    """
    A place in the pool, and the machine that fills it.

    `lease_end` is by the pool's clock, counted from before the lease was asked for. `tainted` means that
    the machine must not be used again. `woken` is what its life waits for while it is idle: True when a
    request wants it, False when it is to end.
    """

    name: str
    phase: Phase = Phase.CREATING
    known_machine: Machine | None = None
    lease: Lease | None = None
    lease_end: float = 0.0
    tainted: bool = False
    woken: Deferred[bool] | None = None

    @property
    def machine(self) -> Machine:
        """The machine, in a phase in which there is one."""
        assert self.known_machine is not None, self.name  # noqa: S101 - phases after CREATING have one
        return self.known_machine

    @property
    def nonce(self) -> str | None:
        """What proves that the machine is leased to us."""
        return self.lease.nonce if self.lease else None

    def wake(self, *, wanted: bool) -> None:
        """End its rest, if it rests."""
        if self.woken is not None:
            woken, self.woken = self.woken, None
            woken.callback(wanted)


class StuckError(MachinesError):
    """The machine cannot be destroyed now, though the API answers."""


class Life:
    """
    The steps of a machine's life, taken with the Machines API.

    After `close`, pauses between attempts are short, and nothing is attempted for ever.
    """

    _log = Logger()
    _PAUSES = (0.05, 30.0)
    _HURRIED_NAP = 0.5

    def __init__(
        self, api: MachinesAPI, probe: Probe, clock: IReactorTime, random: Random, settings: PoolSettings
    ) -> None:
        self._api = api
        self._probe = probe
        self._clock = clock
        self._random = random
        self._settings = settings
        self._limits = settings.limits
        self._naps: set[IDelayedCall] = set()
        self._closing = False

    def close(self) -> None:
        """Hurry."""
        self._closing = True
        for nap in self._naps:
            nap.reset(0.0)

    def pause(self, failures: int) -> float:
        """Choose the seconds to wait after so many failures, jittered so that pools do not march in step."""
        shortest, longest = self._PAUSES
        return min(longest, shortest * 2.0 ** min(failures, 30)) * self._random.uniform(0.5, 1.0)

    async def create(self, member: Member) -> None:
        """
        Make the machine.

        When the answer is lost, ask again: since no two machines have the same name, there is one at
        most. Until that is known, the member keeps its place.
        """
        settings = self._settings
        for failures in count():
            asked = self._clock.seconds()
            create = self._api.create(member.name, settings.region, settings.labelled(), settings.lease_ttl)
            try:
                member.known_machine, member.lease = await self._within(self._limits.create, create)
                member.lease_end = asked + settings.lease_ttl
                break
            except NameTakenError as taken:
                await self._find(member, taken.machine_id)
                break
            except (UnavailableError, DeadlineExceededError) as error:
                if self._closing:
                    raise
                self._log.warn("is {name} created? {error}", name=member.name, error=error)
                await self._nap(self.pause(failures))
        self._log.info("created {name}, {id}", name=member.name, id=member.machine.id)

    async def _find(self, member: Member, machine_id: str | None) -> None:
        """Take over the machine that an earlier attempt made."""
        if machine_id is None:
            machines = await self._within(self._limits.lease, self._api.list())
            machine_id = next((machine.id for machine in machines if machine.name == member.name), None)
        if machine_id is None:
            raise UnavailableError(f"{member.name} exists, but nobody says where")
        member.known_machine = await self._within(self._limits.lease, self._api.get(machine_id))
        member.lease = await self._within(self._limits.lease, self._api.get_lease(machine_id))
        await self._extend(member)

    async def adopt(self, member: Member) -> None:
        """
        Take over the lease of a machine of ours that an earlier instance left, under a new nonce.

        So whatever that instance still does to the machine is refused. Raises `NotFoundError` when the
        lease, or the machine, is gone.
        """
        machine_id = member.machine.id
        old = await self._within(self._limits.lease, self._api.get_lease(machine_id))
        await self._within(self._limits.lease, self._api.release_lease(machine_id, old.nonce))
        asked = self._clock.seconds()
        acquire = self._api.acquire_lease(machine_id, self._settings.lease_ttl, self._settings.pool_id)
        member.lease = await self._within(self._limits.lease, acquire)
        member.lease_end = asked + self._settings.lease_ttl
        self._log.info("reclaimed {name}, {id}", name=member.name, id=machine_id)

    async def start(self, member: Member) -> None:
        """Start a stopped machine, with a lease that covers a request."""
        await self._renew(member)
        await self._within(self._limits.start, self._call_start(member))

    async def become_ready(self, member: Member) -> None:
        """Wait until the machine has started, and its worker takes requests."""
        limit = self._limits.create if member.phase is Phase.CREATING else self._limits.start
        await self._within(limit + 1, self._api.wait(member.machine, State.STARTED, limit))
        await self._within(self._limits.ready, self._probe(member.machine))

    async def stop(self, member: Member) -> None:
        """Wipe the machine: only a stop that is confirmed makes it fit for another request."""
        limit = self._limits.stop
        await self._within(limit, self._api.stop(member.machine.id, member.nonce))
        await self._within(limit + 1, self._api.wait(member.machine, State.STOPPED, limit))

    async def destroy(self, member: Member) -> None:
        """
        Destroy the machine, trying again for as long as the API does not answer.

        Raises `StuckError` when the API does answer, but has not done it within the limit; and when the
        pool is closing and it did not answer within the limit.
        """
        deadline = Deadline(self._clock, self._limits.destroy)
        for failures in count():
            try:
                await self._within(self._limits.destroy, self._api.destroy(member.machine.id, member.nonce))
            except NotFoundError:
                break
            except (MachinesError, DeadlineExceededError) as error:
                unknown = isinstance(error, UnavailableError | DeadlineExceededError)
                if not deadline.remaining and (self._closing or not unknown):
                    raise StuckError(f"cannot destroy {member.name}: {error}") from error
                self._log.warn("{name} is not destroyed: {error}", name=member.name, error=error)
                if isinstance(error, LeaseHeldError):
                    # Ours has run out or was taken over; without a nonce, a live one still protects it.
                    member.lease = None
                await self._nap(self.pause(failures))
            else:
                break
        self._log.info("destroyed {name}, {id}", name=member.name, id=member.machine.id)

    async def _call_start(self, member: Member) -> None:
        """Ask for the start, again for as long as the last stop is not over."""
        for failures in count():
            try:
                await self._api.start(member.machine.id, member.nonce)
            except NotReadyError:
                machine = await self._api.get(member.machine.id)
                if machine.state in _PAST_STARTING:
                    raise
                await self._nap(self.pause(failures))
            else:
                return

    async def _renew(self, member: Member) -> None:
        """Extend the lease; do without as long as what is left of it covers two requests."""
        try:
            await self._extend(member)
        except (UnavailableError, DeadlineExceededError):
            if member.lease_end - self._clock.seconds() < 2 * self._settings.max_req_time:
                raise

    async def _extend(self, member: Member) -> None:
        asked, ttl = self._clock.seconds(), self._settings.lease_ttl
        refresh = self._api.refresh_lease(member.machine.id, member.nonce or "", ttl)
        member.lease = await self._within(self._limits.lease, refresh)
        member.lease_end = asked + ttl

    def _within(self, seconds: float, work: Coroutine[Deferred[Any], Any, T]) -> Coroutine[Any, Any, T]:
        return Deadline(self._clock, seconds).run(work)

    async def _nap(self, seconds: float) -> None:
        """Sleep; not long, and not on, while the pool is closing."""
        done: Deferred[None] = Deferred()
        longest = self._HURRIED_NAP if self._closing else seconds
        nap = self._clock.callLater(min(seconds, longest), done.callback, None)
        self._naps.add(nap)
        try:
            await done
        finally:
            self._naps.discard(nap)
            if nap.active():
                nap.cancel()
