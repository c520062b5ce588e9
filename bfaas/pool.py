"""
The pool: machines on demand, each for one request at a time, wiped in between.

Requests wait in line for machines, their clients taking turns; only the pool creates, starts, stops and
destroys them, so that a request which is cancelled strands nothing. Each machine's life is one coroutine,
`_live`, from its creation to its end. What a request gets is an `Allocation`, which ends exactly once.

A machine belongs to the pool that its name says, since a name cannot be changed from inside a machine. Its
metadata says so too, for whoever reads it, but proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

from bfaas.backoff import Backoff, Pauses
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.life import Life, StuckError, TakenOverError
from bfaas.line import Line
from bfaas.machines.api import Machine, MachinesAPI, MachinesError, RateLimitedError, UnavailableError
from bfaas.member import Member, Phase, PoolSettings, Watch, machine_name
from bfaas.standby import Call, Standby
from bfaas.sweep import Sweep

if TYPE_CHECKING:
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.life import Probe
    from bfaas.sweep import Seen


_TAKEN = (Phase.BUSY, Phase.STOPPING, Phase.LEAVING)
"""Phases of machines that have to come free before they can serve a request."""


class PoolClosedError(Exception):
    """The pool gives out no machines any more."""


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


class Pool:
    """
    Up to `size` machines, shared by the requests of one coordinator.

    `probe` waits until the worker on a machine that has started takes requests. `watch` is told what phases
    its machines go through.
    """

    _log = Logger()

    def __init__(
        self,
        api: MachinesAPI,
        probe: Probe,
        clock: IReactorTime,
        random: Random,
        settings: PoolSettings,
        watch: Watch = lambda _left, _entered, _seconds: None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._random = random
        self._watch = watch
        pauses = Pauses(clock, random)
        self._life = Life(api, probe, clock, pauses, settings)
        self._sweep = Sweep(api, clock, random, settings, pauses.after, self._know)
        self._members: dict[Member, Deferred[None]] = {}
        self._line: Line[Allocation] = Line()
        self._turn, self._turns = 0.0, 0
        self._reclaimed = False
        self._limited = False
        self._creating = Backoff(clock, pauses.after, self._balance)
        self._standing = Backoff(clock, pauses.after, self._balance)
        self._standby = Standby(self._life, self._standing, self._call, suspends=settings.suspends)
        self._closing = False
        self._destroys = False

    def start(self) -> None:
        """Reclaim the machines of this pool's earlier instances, then clean from time to time."""
        self._sweep.start()

    # What requests see.

    @property
    def next_in_line(self) -> int:
        """How many machines have to come free before one more request is served; 0 where none has to."""
        return max(0, len(self._line) + 1 - (self._settings.size - len(self._in(*_TAKEN))))

    @property
    def expected_wait(self) -> float:
        """
        Estimate the seconds until so many machines have come free; 0 as long as nothing is known.

        A machine's turn begins with a start and ends with a confirmed stop. It is taken to last as long as
        the latest did: a mean, in which each new one counts for a fifth, and the first few for more. A turn
        under way that has taken longer already counts with its age, so that a pool which has never finished
        one does not guess. None counts for more than a request of full length and a stop.
        """
        taken = self._in(*_TAKEN)
        now = self._clock.seconds()
        turns = [max(self._turn, min(now - member.since, self._longest_turn)) for member in taken]
        turn = sum(turns) / len(turns) if turns else self._turn
        return turn * self.next_in_line / self._settings.size

    @property
    def waiting(self) -> int:
        """How many requests wait for a machine."""
        return len(self._line)

    @property
    def trouble(self) -> str | None:
        """What speaks against a machine for a request that comes now; None where nothing is known to."""
        if self._in(Phase.READY):
            return None
        if not self._reclaimed:
            return "it is not known yet which machines there are"
        if not self._sweep.sees:
            return "the Machines API fails"
        if self._in(Phase.IDLE, Phase.SUSPENDED):
            return None
        # A creation whose answer was lost has its place until it is known, what has failed until it is gone.
        lost = any(member.lost is not None for member in self._in(Phase.CREATING))
        overdue = self._clock.seconds() - self._settings.limits.look
        stuck = sum(member.since < overdue for member in self._in(Phase.LEAVING)) >= self._settings.size
        return "machines cannot be started" if self._creating.pauses or lost or stuck else None

    def count(self, phase: Phase) -> int:
        """How many members are in a phase."""
        return len(self._in(phase))

    def allocate(self, client: str) -> Deferred[Allocation]:
        """
        Wait in line for a machine, taking turns with other clients. Cancelling it leaves the line.

        Fails with `PoolClosedError` when the pool closes first.
        """
        place = self._line.join(client)
        self._balance()
        return place

    async def close(self) -> None:
        """Stop every machine, and leave it for the pool's next instance; waits for those in use."""
        self._closing = True
        self._life.close()
        self._sweep.close()
        self._creating.close()
        self._standing.close()
        self._line.close(PoolClosedError)
        for member in list(self._members):
            member.wake(wanted=False)
        await DeferredList(list(self._members.values()), consumeErrors=True)

    async def destroy(self) -> None:
        """
        Destroy every machine of this pool, those included that it has lost sight of, instead of stopping it.

        Waits for those in use. Ends after `max_req_time` and `limits.exit` in any case.
        """
        self._destroys = True
        limits = self._settings.limits
        longest = self._settings.max_req_time + limits.exit - limits.destroy
        await Deadline(self._clock, longest).run(self.close())  # cancelled, it waits no longer
        for member in self._members:
            self._log.error("{name} is not destroyed in time", name=member.name)
        try:
            await Deadline(self._clock, limits.destroy).run(self._sweep.destroy_all_own())
        except (MachinesError, DeadlineExceededError) as error:
            self._log.error("cannot tell whether a machine is left: {error}", error=error)

    # The line, and what it takes to serve it.

    def _balance(self) -> None:
        """Set machines on their way, as many as requests are short of."""
        if self._closing:
            return
        for member in self._in(Phase.READY)[: len(self._line)]:
            member.wake(wanted=True)
        asleep = sorted(self._in(Phase.SUSPENDED), key=lambda member: member.woken is None)
        for member in asleep[: max(0, len(self._line) - self.count(Phase.THAWING))]:
            member.wake(wanted=True)
        others = self._in(Phase.IDLE, Phase.BUSY, Phase.STOPPING, Phase.LEAVING)
        ready = len(self._members) - len(others)  # or on their way
        holds_back = self._creating.pauses or self._standing.pauses
        short = len(self._line) + (0 if holds_back else self._settings.standby) - ready
        for member in sorted(self._in(Phase.IDLE), key=lambda member: -member.lease_end)[: max(0, short)]:
            member.wake(wanted=True)
            short -= 1
        while short > 0 and len(self._members) < self._settings.size and self._may_create():
            self._add(Member(machine_name(self._settings.name, self._random), self._clock, self._watch))
            short -= 1
        self._limited = self._limited and short > 0

    def _in(self, *phases: Phase) -> list[Member]:
        return [member for member in self._members if member.phase in phases]

    def _may_create(self) -> bool:
        """
        Not before we know what is there already, and not in the pause after a failure.

        And one at a time while the app is at its limit, of one a second, which all its coordinators share.
        """
        asked = [member for member in self._in(Phase.CREATING) if member.known_machine is None]
        if self._limited and any(member.lost is None for member in asked):
            return False
        return self._reclaimed and not self._creating.pauses

    def _add(self, *members: Member) -> None:
        """Give each a place, and only then let them begin to live."""
        self._members |= (places := {member: Deferred[None]() for member in members})
        for member, gone in places.items():
            self._begin(member, gone)

    def _begin(self, member: Member, gone: Deferred[None]) -> None:
        def leave(_: object) -> None:
            del self._members[member]
            gone.callback(None)
            self._balance()

        life = Deferred.fromCoroutine(self._live(member))
        life.addErrback(lambda failure: self._log.failure("in the life of {name}", failure, name=member.name))
        life.addCallback(leave)

    # A machine's life.

    async def _live(self, member: Member) -> None:
        """Get a machine, let it serve as long as it is good for it, and see it off."""
        try:
            if member.phase is Phase.CREATING:
                await self._life.create(member)
                if self._limited:
                    self._balance()
                await self._serve(member)
            elif not member.tainted:
                await self._life.adopt(member)
                await self._life.stop(member)
            while await self._rest(member):
                await self._life.start(member)
                await self._serve(member)
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("gives up {name}: {error}", name=member.name, error=error)
            self._creating.failed()
            if isinstance(error, RateLimitedError):
                self._limited = True
            elif isinstance(error, (UnavailableError, DeadlineExceededError)):
                self._sweep.doubt()
        else:
            if self._closing and not self._destroys and not member.tainted:
                return
        await self._see_off(member)

    async def _serve(self, member: Member) -> None:
        """Give the machine to the request that is next, until it is released; then wipe it."""
        began = self._clock.seconds()
        await self._life.become_ready(member)
        self._creating.succeeded()
        ready_at = self._clock.seconds()
        wanted = await self._standby.hold(member)
        began += self._clock.seconds() - ready_at  # standing by is part of nobody's turn
        is_leased = self._is_leased(member, self._settings.max_req_time)
        if serves := wanted and is_leased and len(self._line) > 0:
            member.enter(Phase.BUSY)
            released: Deferred[None] = Deferred()
            self._line.serve(Allocation(member.machine, released))
            await released
        if self._destroys:
            return
        member.enter(Phase.STOPPING)
        self._balance()
        await self._life.stop(member)
        if serves:
            self._took_turn(self._clock.seconds() - began)

    def _call(self, member: Member) -> Call:
        """Say what a machine that is ready is to do."""
        if self._closing or member.tainted:
            return Call.END
        others = [other for other in self._in(Phase.READY, Phase.SUSPENDED) if other is not member]
        if len(self._line) > 0 or len(others) >= self._settings.standby:
            return Call.COME
        return Call.STAND_BY

    def _took_turn(self, seconds: float) -> None:
        self._turns += 1
        self._turn += (min(seconds, self._longest_turn) - self._turn) / min(self._turns, 5)

    @property
    def _longest_turn(self) -> float:
        return self._settings.max_req_time + self._settings.limits.stop

    def _is_leased(self, member: Member, seconds: float) -> bool:
        """Tell whether its lease lasts so long. A process that stood still wakes up with leases long over."""
        return member.lease_end - self._clock.seconds() >= seconds

    async def _rest(self, member: Member) -> bool:
        """Wait until a request wants the machine. False when it is to end: its lease does, or the pool."""
        left = member.lease_end - self._clock.seconds() - 2 * self._settings.max_req_time
        if self._closing or member.tainted or left <= 0:
            return False
        member.enter(Phase.IDLE)
        woken = member.rest()
        timer = self._clock.callLater(left, lambda: member.wake(wanted=False))
        self._balance()
        try:
            wanted = await woken
        finally:
            if timer.active():
                timer.cancel()
        if wanted:
            member.enter(Phase.STARTING)
        return wanted

    async def _see_off(self, member: Member) -> None:
        """Destroy the machine. Until that is done it has its place: it is there."""
        member.enter(Phase.LEAVING)
        self._balance()
        if member.known_machine is None:
            return
        try:
            await self._life.destroy(member)
        except TakenOverError as error:
            self._log.warn("{error}", error=error)
        except StuckError as error:
            self._log.error("{error}", error=error)

    # What cleaning finds.

    def _know(self, machines: list[Seen]) -> None:
        """
        Take note of all machines of this pool.

        One that we did not know has a place from now on, since it is there; if it is not to be used, or
        one too many, until it is gone. Not to be used is also one that could not be looked at.
        """
        known = {member.name: member for member in self._members}
        strangers: list[Member] = []
        fit = {listed.name: seen is not None and self._settings.recognizes(seen) for listed, seen in machines}
        for listed, seen in sorted(machines, key=lambda pair: not fit[pair[0].name]):
            member = known.get(listed.name)
            if member is None:
                too_many = len(known) + len(strangers) >= self._settings.size
                place = Member(listed.name, self._clock, self._watch, Phase.RECLAIMING, seen or listed)
                place.tainted = too_many or not fit[listed.name]
                strangers.append(place)
            elif seen is not None and not fit[listed.name]:
                self._log.warn("somebody changed the metadata of {name}", name=listed.name)
                member.tainted = True
                member.wake(wanted=False)
        self._add(*strangers)
        self._reclaimed = True
        self._balance()
