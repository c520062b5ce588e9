"""
The pool: machines on demand, each for one request at a time, wiped in between.

Requests wait in line for machines, first come first served; only the pool creates, starts, stops and
destroys them, so that a request which is cancelled strands nothing. Each machine's life is one coroutine,
`_live`, from its creation to its end. What a request gets is an `Allocation`, which ends exactly once.

A machine belongs to the pool that its name says, since a name cannot be changed from inside a machine. Its
metadata says so too, for whoever reads it, but proves nothing.
"""

from __future__ import annotations

import enum
import secrets
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError, sleep
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
    from collections.abc import Awaitable, Callable, Coroutine
    from random import Random

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

T = TypeVar("T")


class PoolClosedError(Exception):
    """The pool gives out no machines any more."""


@dataclass(frozen=True)
class Limits:
    """Seconds that each step of a machine's life may take before the machine is given up."""

    create: float = 90.0
    start: float = 60.0
    ready: float = 30.0
    stop: float = 30.0
    destroy: float = 30.0


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


def lease_ttl(max_req_time: float) -> int:
    """Choose how long leases last, in seconds: five minutes, and at least four requests of full length."""
    return max(300, int(4 * max_req_time) + 1)


def machine_name(pool: str) -> str:
    """Make a name that nobody has used before."""
    return f"worker-{pool}-{secrets.token_hex(8)}"


def owner(name: str) -> str | None:
    """Tell the pool that a machine's name says, dashes and all; None if the name is no pool's."""
    pool, dash, unique = name.removeprefix("worker-").rpartition("-")
    return pool if name.startswith("worker-") and dash and unique else None


class Allocation:
    """A machine in use: started, ready, wiped before. `release` gives it back, exactly once, at once."""

    def __init__(self, machine: Machine, released: Deferred[None]) -> None:
        self.machine = machine
        self._released: Deferred[None] | None = released

    def release(self) -> None:
        """Give the machine back; the pool wipes it in the background."""
        if self._released is None:
            raise RuntimeError(f"machine {self.machine.id} was released before")
        released, self._released = self._released, None
        released.callback(None)


class Phase(enum.Enum):
    """Where a member of the pool is in its life."""

    CREATING = "creating"  # there may be a machine, or not yet
    IDLE = "idle"  # stopped, confirmed; costs nothing, starts when wanted
    STARTING = "starting"  # on its way to a request
    READY = "ready"  # started and answering, no request yet
    BUSY = "busy"  # a request has it
    STOPPING = "stopping"  # used, and not to be used again until it is known to be stopped
    LEAVING = "leaving"  # being destroyed; has its place until that is done


@dataclass(eq=False)
class _Member:
    """
    A place in the pool, and the machine that fills it.

    `woken` is what its life waits for while it is idle: True when a request wants it, False when
    it is to end. `lease_end` is by the pool's clock, counted from before the lease was asked for.
    """

    name: str
    phase: Phase = Phase.CREATING
    machine: Machine | None = None
    lease: Lease | None = None
    lease_end: float = 0.0
    woken: Deferred[bool] | None = None

    def wake(self, wanted: bool) -> None:
        if self.woken is not None:
            woken, self.woken = self.woken, None
            woken.callback(wanted)

    @property
    def nonce(self) -> str | None:
        return self.lease.nonce if self.lease else None


class Pool:
    """
    Up to `size` machines, shared by the requests of one coordinator.

    `probe` waits until the worker on a machine that has started takes requests.
    """

    _log = Logger()
    _PAUSES = (0.05, 30.0)

    def __init__(
        self,
        api: MachinesAPI,
        probe: Callable[[Machine], Awaitable[None]],
        clock: IReactorTime,
        random: Random,
        settings: PoolSettings,
    ) -> None:
        metadata = {**settings.config.metadata, "pool_id": settings.pool_id}
        self._config = replace(settings.config, metadata=metadata)
        self._settings = settings
        self._api = api
        self._probe = probe
        self._clock = clock
        self._random = random
        self._members: dict[_Member, Deferred[None]] = {}
        self._line: deque[Deferred[Allocation]] = deque()
        self._failures = 0
        self._patience: IDelayedCall | None = None
        self._closing = False
        self._destroying = False

    # What requests see.

    @property
    def next_in_line(self) -> int:
        """How many machines have to come free before one more request is served; 0 where none has to."""
        taken = sum(member.phase in (Phase.BUSY, Phase.STOPPING, Phase.LEAVING) for member in self._members)
        return max(0, len(self._line) + 1 - (self._settings.size - taken))

    def count(self, phase: Phase) -> int:
        """How many members are in a phase."""
        return sum(member.phase is phase for member in self._members)

    def allocate(self) -> Deferred[Allocation]:
        """
        Wait in line for a machine. Cancelling it leaves the line.

        Fails with `PoolClosedError` when the pool closes first.
        """
        if self._closing:
            return fail(PoolClosedError())
        place: Deferred[Allocation] = Deferred(self._leave_line)
        self._line.append(place)
        self._balance()
        return place

    async def close(self) -> None:
        """Stop every machine, and leave it for the pool's next instance; waits for those in use."""
        self._closing = True
        if self._patience is not None and self._patience.active():
            self._patience.cancel()
        while self._line:
            self._line.popleft().errback(PoolClosedError())
        for member in list(self._members):
            member.wake(wanted=False)
        await DeferredList(list(self._members.values()))

    async def destroy(self) -> None:
        """Close, and destroy every machine."""
        self._destroying = True
        await self.close()

    # The line, and what it takes to serve it.

    def _leave_line(self, place: Deferred[Allocation]) -> None:
        self._line.remove(place)

    def _balance(self) -> None:
        """Set machines on their way, as many as requests are short of."""
        if self._closing:
            return
        short = len(self._line) - sum(
            member.phase in (Phase.CREATING, Phase.STARTING, Phase.READY) for member in self._members
        )
        idle = [member for member in self._members if member.phase is Phase.IDLE]
        for member in sorted(idle, key=lambda member: -member.lease_end)[: max(0, short)]:
            member.wake(wanted=True)
            short -= 1
        while short > 0 and len(self._members) < self._settings.size and not self._is_waiting_to_retry():
            self._add(_Member(machine_name(self._settings.name)))
            short -= 1

    def _is_waiting_to_retry(self) -> bool:
        return self._patience is not None and self._patience.active()

    def _add(self, member: _Member) -> None:
        life: Deferred[None] = Deferred()
        self._members[member] = life
        running = Deferred.fromCoroutine(self._live(member))
        running.addErrback(lambda failure: self._log.failure("the life of {name}", failure, name=member.name))
        running.addCallback(lambda _: self._gone(member, life))

    def _gone(self, member: _Member, life: Deferred[None]) -> None:
        del self._members[member]
        life.callback(None)
        self._balance()

    def _failed(self) -> None:
        """Wait longer before the next machine is made, the more often in a row it went wrong."""
        pause = self._pause(self._failures)
        self._failures += 1
        if not self._closing and not self._is_waiting_to_retry():
            self._patience = self._clock.callLater(pause, self._balance)

    def _pause(self, failures: int) -> float:
        """Choose the seconds to wait after so many failures, jittered so that pools do not march in step."""
        shortest, longest = self._PAUSES
        return min(longest, shortest * 2.0 ** min(failures, 30)) * self._random.uniform(0.5, 1.0)

    # A machine's life.

    async def _live(self, member: _Member) -> None:
        """Create a machine, let it serve as long as it is good for it, and see it off."""
        try:
            await self._create(member)
            wanted = True
            while wanted:
                await self._start(member)
                self._failures = 0
                await self._serve(member)
                await self._stop(member)
                wanted = await self._rest(member)
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("gives up {name}: {error}", name=member.name, error=error)
            self._failed()
        else:
            if self._closing and not self._destroying:
                return
        member.phase = Phase.LEAVING
        self._balance()
        await self._destroy(member)

    async def _create(self, member: _Member) -> None:
        """
        Make the machine.

        When the answer is lost, ask again: since no two machines have the same name, there is one at
        most. Until it is known, the member has its place.
        """
        settings = self._settings
        for failures in count():
            asked = self._clock.seconds()
            try:
                create = self._api.create(member.name, settings.region, self._config, settings.lease_ttl)
                member.machine, member.lease = await self._within(settings.limits.create, create)
                member.lease_end = asked + settings.lease_ttl
                break
            except NameTakenError as taken:
                await self._find(member, taken.machine_id)
                break
            except (UnavailableError, DeadlineExceededError) as error:
                if self._closing:
                    raise
                self._log.warn("is {name} created? {error}", name=member.name, error=error)
                await sleep(self._clock, self._pause(failures))
        self._log.info("created {name}", name=member.name)

    async def _find(self, member: _Member, machine_id: str | None) -> None:
        """Take over the machine that an earlier attempt made."""
        if machine_id is None:
            raise NotFoundError(f"{member.name} exists, but nobody says where")
        limit = self._settings.limits.create
        member.machine = await self._within(limit, self._api.get(machine_id))
        member.lease = await self._within(limit, self._api.get_lease(machine_id))
        await self._renew(member)

    async def _start(self, member: _Member) -> None:
        """Bring the machine up, with a lease that covers the request, until its worker answers."""
        assert member.machine is not None  # noqa: S101 - it was created
        if member.phase is not Phase.CREATING:
            member.phase = Phase.STARTING
            await self._renew(member)
            await self._within(self._settings.limits.start, self._call_start(member))
        limits = self._settings.limits
        await self._within(limits.start + 1, self._api.wait(member.machine, State.STARTED, limits.start))
        await self._within(limits.ready, _awaited(self._probe(member.machine)))

    async def _call_start(self, member: _Member) -> None:
        """Ask for the start, again for as long as the last stop is not over."""
        assert member.machine is not None  # noqa: S101 - it was created
        for failures in count():
            try:
                await self._api.start(member.machine.id, member.nonce)
            except NotReadyError:
                await sleep(self._clock, self._pause(failures))
            else:
                return

    async def _renew(self, member: _Member) -> None:
        """Extend the lease; do without as long as what is left of it covers two requests."""
        assert member.machine is not None  # noqa: S101 - it was created
        assert member.lease is not None  # noqa: S101 - it was leased
        asked = self._clock.seconds()
        ttl = self._settings.lease_ttl
        try:
            refresh = self._api.refresh_lease(member.machine.id, member.lease.nonce, ttl)
            member.lease = await self._within(self._settings.limits.start, refresh)
            member.lease_end = asked + ttl
        except (UnavailableError, DeadlineExceededError):
            if member.lease_end - self._clock.seconds() < 2 * self._settings.max_req_time:
                raise

    async def _serve(self, member: _Member) -> None:
        """Give the machine to the request that is next, and wait until it is released."""
        assert member.machine is not None  # noqa: S101 - it was created
        member.phase = Phase.READY
        if self._line:
            member.phase = Phase.BUSY
            released: Deferred[None] = Deferred()
            self._line.popleft().callback(Allocation(member.machine, released))
            await released

    async def _stop(self, member: _Member) -> None:
        """Wipe the machine: only a stop that is confirmed makes it fit for another request."""
        assert member.machine is not None  # noqa: S101 - it was created
        member.phase = Phase.STOPPING
        limit = self._settings.limits.stop
        await self._within(limit, self._api.stop(member.machine.id, member.nonce))
        await self._within(limit + 1, self._api.wait(member.machine, State.STOPPED, limit))

    async def _rest(self, member: _Member) -> bool:
        """Wait until a request wants the machine; False when the lease runs out first, or the pool closes."""
        member.phase = Phase.IDLE
        if self._closing:
            return False
        member.woken = Deferred()
        woken = member.woken
        self._balance()
        left = member.lease_end - self._clock.seconds() - 2 * self._settings.max_req_time
        timer = self._clock.callLater(max(0.0, left), member.wake, False)
        try:
            return await woken
        finally:
            if timer.active():
                timer.cancel()

    async def _destroy(self, member: _Member) -> None:
        """Destroy the machine, trying again until the API has taken it."""
        if member.machine is None:
            return
        deadline = Deadline(self._clock, self._settings.limits.destroy)
        for failures in count():
            try:
                await deadline.run(self._api.destroy(member.machine.id, member.nonce))
                break
            except NotFoundError:
                break
            except LeaseHeldError as error:
                self._log.warn("{name} is another's: {error}", name=member.name, error=error)
                return
            except (MachinesError, DeadlineExceededError) as error:
                if not deadline.remaining:
                    self._log.error("cannot destroy {name}: {error}", name=member.name, error=error)
                    return
                await sleep(self._clock, self._pause(failures))
        self._log.info("destroyed {name}", name=member.name)

    def _within(self, seconds: float, work: Coroutine[Deferred[Any], Any, T]) -> Coroutine[Any, Any, T]:
        return Deadline(self._clock, seconds).run(work)


async def _awaited(work: Awaitable[T]) -> T:
    return await work
