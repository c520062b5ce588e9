"""
Cleaning: what is done about machines of the app that are nobody's in our pool.

The list that a sweep begins with may be stale, so no machine is destroyed on its word: it is looked at
first, and destroyed without a nonce, which the API refuses while anybody holds a lease on it.

A hundred coordinators may share an app, with ten thousand machines. So a sweep does not ask about each: the
leases of a pool end with its coordinator, so a few of its machines, chosen at random, speak for all, and only
where one has no lease the others are looked at.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, FirstError, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.machines.api import LeaseHeldError, MachinesError, NotFoundError, State, UnavailableError
from bfaas.pooling.config import pool_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.pooling.backoff import JitteredBackoff
    from bfaas.pooling.config import PoolConfig

    Inspected = tuple[Machine, Machine | None]

T = TypeVar("T")

_log = Logger()

_GONE = (State.DESTROYING, State.DESTROYED)


class Reconciler:
    """
    Goes through the machines of the app, whosever they are, from time to time.

    `on_own_machines` is told what there is of this pool's: each machine as it is listed, which may leave its
    metadata out, and as a look at it shows it, or None where the API did not tell. `pause` chooses the
    seconds after so many failures.
    """

    _PAUSE = 1.0
    _SECOND_LOOK = 1.5  # times the step of a reclaim in which there is no lease
    _SAMPLE_SIZE = 3
    _CONCURRENCY = 10  # machines
    _MAX_PER_SWEEP = 300  # about so many are destroyed; where more are left, the next sweep comes at once

    def __init__(
        self,
        api: MachinesAPI,
        clock: IReactorTime,
        random: Random,
        settings: PoolConfig,
        backoff: JitteredBackoff,
        on_own_machines: Callable[[list[Inspected]], None],
    ) -> None:
        self._api = api
        self._clock = clock
        self._random = random
        self._settings = settings
        self._backoff = backoff
        self._on_own_machines = on_own_machines
        self._cleaning: Deferred[None] | None = None
        self._resting: Deferred[None] | None = None
        self._doubted = False
        self.api_reachable = True
        """Whether the API had an answer when it was last asked for one."""

    def start(self) -> None:
        """Sweep now, and then from time to time."""
        self._cleaning = Deferred.fromCoroutine(self._clean())
        self._cleaning.addErrback(lambda failure: failure.trap(CancelledError) and None)
        self._cleaning.addErrback(lambda failure: _log.failure("in cleaning", failure))

    def check_soon(self) -> None:
        """Find out soon whether the API answers, since somebody else had no answer."""
        self._doubted = True
        if self._resting is not None:
            resting, self._resting = self._resting, None
            resting.callback(None)

    def close(self) -> None:
        """Sweep no more."""
        if self._cleaning is not None:
            self._cleaning.cancel()

    async def _clean(self) -> None:
        """Sweep when it is time to; in between, list the machines when somebody doubts that one can."""
        clock, period = self._clock, self._settings.reconcile_interval
        failures, doubts, due = 0, 0, clock.seconds()
        while True:
            is_due = clock.seconds() >= due
            try:
                if not is_due:
                    await self._list()
                elif await Deadline(clock, period).run(self.sweep()):
                    due = clock.seconds() + period * self._random.uniform(0.8, 1.2)
                    doubts = 0
            except (MachinesError, DeadlineExceededError) as error:
                _log.warn("cleaning is not done: {error}", error=error)
                self.api_reachable = False  # whatever it was
                await deferLater(clock, self._backoff.delay(failures))
                failures += 1
            else:
                failures = 0
                if await self._is_doubted(due - clock.seconds()):
                    await deferLater(clock, self._backoff.delay(doubts))
                    doubts += 1

    async def _is_doubted(self, seconds: float) -> bool:
        """Wait for so long; True, and at once, when there is reason to doubt that the API answers."""
        if self.api_reachable and not self._doubted:
            self._resting = Deferred()
            try:
                await Deadline(self._clock, seconds).run(self._resting)
            except DeadlineExceededError:
                self._resting = None
                return False
        self._doubted = False
        return True

    async def sweep(self) -> bool:
        """
        Go through all machines once; False when some are left that are nobody's.

        Another pool's machine is destroyed if it has no lease, and still has none a moment later: while it
        is reclaimed, its lease changes hands.
        """
        machines = await self._list()
        own = filter(self._settings.owns, machines)
        looks = await self._gather_limited(self._look(machine) for machine in own)
        self._on_own_machines([look for look in looks if look is not None])
        unleased: list[Machine] = []
        for theirs in self._others(machines):
            if len(unleased) >= self._MAX_PER_SWEEP:
                break
            unleased += await self._unleased(theirs)
        if unleased:
            await deferLater(self._clock, self._SECOND_LOOK * self._settings.timeouts.lease)
        await self._gather_limited(
            self._try(self._destroy_unleased(machine), machine) for machine in unleased
        )
        return len(unleased) < self._MAX_PER_SWEEP

    async def _look(self, listed: Machine) -> Inspected | None:
        """Look at a machine whole; None if it is gone by now."""
        try:
            seen = await self._within(self._api.get(listed.id))
        except NotFoundError:
            return None
        except (MachinesError, DeadlineExceededError) as error:
            _log.warn("cannot look at {name}: {error}", name=listed.name, error=error)
            return listed, None
        return None if seen.state in _GONE else (listed, seen)

    def _others(self, machines: list[Machine]) -> list[list[Machine]]:
        """Tell the machines of the other pools, a list for each; in any order, for who comes last in time."""
        pools: dict[str, list[Machine]] = {}
        for machine in machines:
            name = pool_of(machine.name)
            if name is not None and name != self._settings.name:
                pools.setdefault(name, []).append(machine)
        others = [self._random.sample(theirs, len(theirs)) for theirs in pools.values()]
        self._random.shuffle(others)
        return others

    async def _unleased(self, theirs: list[Machine]) -> list[Machine]:
        """Tell which of one pool's machines have no lease."""
        unleased: list[Machine] = []
        for some in (theirs[: self._SAMPLE_SIZE], theirs[self._SAMPLE_SIZE :]):
            found = await self._gather_limited(
                self._try(self._is_unleased(machine), machine) for machine in some
            )
            unleased += [machine for machine, is_unleased in zip(some, found, strict=True) if is_unleased]
            if not unleased:
                break
        return unleased

    async def destroy_all_own(self) -> None:
        """Destroy all machines of this pool, for as long as it takes until there is none."""
        while True:
            try:
                machines = [machine for machine in await self._list() if self._settings.owns(machine)]
                if not machines:
                    return
                for machine in machines:
                    await self._try(destroy_own(self._api, machine), machine)
            except (MachinesError, DeadlineExceededError) as error:
                _log.warn("is a machine left? {error}", error=error)
            await deferLater(self._clock, self._PAUSE)

    async def _try(self, work: Coroutine[Deferred[Any], Any, T], machine: Machine) -> T | None:
        """Do something about a machine; one that makes trouble is left for the next time."""
        try:
            return await self._within(work)
        except (MachinesError, DeadlineExceededError) as error:
            _log.warn("leaves {name} for now: {error}", name=machine.name, error=error)
            return None

    async def _list(self) -> list[Machine]:
        return [machine for machine in await self._within(self._api.list()) if machine.state not in _GONE]

    async def _within(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Make a call, and note whether there is an answer, whatever it is."""
        try:
            answer = await Deadline(self._clock, self._settings.timeouts.inspect).run(work)
        except (MachinesError, DeadlineExceededError) as error:
            self.api_reachable = not isinstance(error, (UnavailableError, DeadlineExceededError))
            raise
        self.api_reachable = True
        return answer

    async def _gather_limited(self, works: Iterator[Coroutine[Deferred[Any], Any, T]]) -> list[T]:
        """Do all, a few at a time."""
        results: list[T] = []
        while some := [Deferred.fromCoroutine(work) for work in islice(works, self._CONCURRENCY)]:
            try:
                results += await gatherResults(some, consumeErrors=True)
            except FirstError as error:  # also how it is cancelled
                error.subFailure.raiseException()
        return results

    async def _is_unleased(self, machine: Machine) -> bool:
        try:
            await self._api.get_lease(machine.id)
        except NotFoundError:
            return True
        return False

    async def _destroy_unleased(self, machine: Machine) -> None:
        """Destroy another pool's machine if its lease has run out."""
        if not await self._is_unleased(machine) or (await self._api.get(machine.id)).state in _GONE:
            return
        try:
            await self._api.destroy(machine.id, None)
        except LeaseHeldError:
            return
        _log.info("destroyed {name}, whose lease had run out", name=machine.name)


async def destroy_own(api: MachinesAPI, machine: Machine) -> None:
    """Destroy a machine of our own, with whatever lease it has."""
    try:
        nonce = (await api.get_lease(machine.id)).nonce
    except NotFoundError:
        nonce = None
    try:
        await api.destroy(machine.id, nonce)
    except NotFoundError:
        return
    _log.info("destroyed {name}, {id}, which is not to be used", name=machine.name, id=machine.id)
