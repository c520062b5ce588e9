"""
Cleaning: what is done about machines of the app that are nobody's in our pool.

The list that a sweep begins with may be stale, so no machine is destroyed on its word: it is looked at
first, and destroyed without a nonce, which the API refuses while anybody holds a lease on it.

A hundred coordinators may share an app, with ten thousand machines. What a sweep asks grows with the number
of pools, not of machines: the leases of a pool end with its coordinator, so a few of its machines, chosen at
random, speak for all, and only where one has no lease the others are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError, sleep
from bfaas.machines.api import LeaseHeldError, MachinesError, NotFoundError, State
from bfaas.member import owner

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.member import PoolSettings

T = TypeVar("T")

_log = Logger()

_GONE = (State.DESTROYING, State.DESTROYED)


class Sweep:
    """
    Goes through the machines of the app, whosever they are, from time to time.

    `tell_own` is told what there is of this pool's; `pause` chooses the seconds after so many failures.
    """

    _PAUSE = 1.0
    _SECOND_LOOK = 1.5  # times the step of a reclaim in which there is no lease
    _SPEAKERS = 3

    def __init__(
        self,
        api: MachinesAPI,
        clock: IReactorTime,
        random: Random,
        settings: PoolSettings,
        pause: Callable[[int], float],
        tell_own: Callable[[list[Machine]], None],
    ) -> None:
        self._api = api
        self._clock = clock
        self._random = random
        self._settings = settings
        self._pause = pause
        self._tell_own = tell_own
        self._cleaning: Deferred[None] | None = None
        self._resting: Deferred[None] | None = None
        self.sees = True
        """Whether it saw all machines when it last tried, and nobody doubts it since."""

    def start(self) -> None:
        """Sweep now, and then from time to time."""
        self._cleaning = Deferred.fromCoroutine(self._clean())
        self._cleaning.addErrback(lambda failure: failure.trap(CancelledError) and None)
        self._cleaning.addErrback(lambda failure: _log.failure("in cleaning", failure))

    def doubt(self) -> None:
        """Look at once whether the API answers, since somebody else had no answer."""
        self.sees = False
        if self._resting is not None:
            resting, self._resting = self._resting, None
            resting.callback(None)

    def close(self) -> None:
        """Sweep no more."""
        if self._cleaning is not None:
            self._cleaning.cancel()

    async def _clean(self) -> None:
        failures, period = 0, self._settings.cleaning_period
        while True:
            try:
                await Deadline(self._clock, period).run(self.sweep())
            except (MachinesError, DeadlineExceededError) as error:
                _log.warn("cleaning is not done: {error}", error=error)
                self.sees = False
                await sleep(self._clock, self._pause(failures))
                failures += 1
            else:
                failures = 0
                if self.sees:  # as nobody has doubted meanwhile
                    await self._rest(period * self._random.uniform(0.8, 1.2))

    async def _rest(self, seconds: float) -> None:
        """Wait for so long, or until somebody doubts that all is well."""
        self._resting = Deferred()
        try:
            await Deadline(self._clock, seconds).run(self._resting)
        except DeadlineExceededError:
            self._resting = None

    async def sweep(self) -> None:
        """
        Go through all machines once.

        Another pool's machine is destroyed if it has no lease, and still has none a moment later: while it
        is reclaimed, its lease changes hands.
        """
        machines = await self._list()
        self.sees = True
        own = [await self._look(machine) for machine in machines if self._settings.owns(machine)]
        self._tell_own([machine for machine in own if machine is not None])
        unleased = [machine for theirs in self._others(machines) for machine in await self._unleased(theirs)]
        if unleased:
            await sleep(self._clock, self._SECOND_LOOK * self._settings.limits.lease)
        for machine in unleased:
            await self._try(self._destroy_unleased(machine), machine)

    def _others(self, machines: list[Machine]) -> list[list[Machine]]:
        """Tell the machines of the other pools, a list for each; in any order, for who comes last in time."""
        pools: dict[str, list[Machine]] = {}
        for machine in machines:
            name = owner(machine.name)
            if name is not None and name != self._settings.name:
                pools.setdefault(name, []).append(machine)
        others = [self._random.sample(theirs, len(theirs)) for theirs in pools.values()]
        self._random.shuffle(others)
        return others

    async def _unleased(self, theirs: list[Machine]) -> list[Machine]:
        """Tell which of one pool's machines have no lease."""
        unleased: list[Machine] = []
        for looked_at, machine in enumerate(theirs):
            if looked_at == self._SPEAKERS and not unleased:
                break
            if await self._try(self._is_unleased(machine), machine):
                unleased.append(machine)
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
            await sleep(self._clock, self._PAUSE)

    async def _try(self, work: Coroutine[Deferred[Any], Any, T], machine: Machine) -> T | None:
        """Do something about a machine; one that makes trouble is left for the next time."""
        try:
            return await self._within(work)
        except (MachinesError, DeadlineExceededError) as error:
            _log.warn("leaves {name} for now: {error}", name=machine.name, error=error)
            return None

    async def _list(self) -> list[Machine]:
        return [machine for machine in await self._within(self._api.list()) if machine.state not in _GONE]

    def _within(self, work: Coroutine[Deferred[Any], Any, T]) -> Coroutine[Any, Any, T]:
        return Deadline(self._clock, self._settings.limits.look).run(work)

    async def _look(self, machine: Machine) -> Machine | None:
        """Look at a machine whole, since its metadata may not be in the list; None if it is gone by now."""
        try:
            return await self._within(self._api.get(machine.id))
        except NotFoundError:
            return None

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
