"""
Cleaning: what is done about machines of the app that are nobody's in our pool.

The list that a sweep begins with may be stale, so no machine is destroyed on its word: it is looked at
first, and destroyed without a nonce, which the API refuses while anybody holds a lease on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError, sleep
from bfaas.machines.api import LeaseHeldError, MachinesError, NotFoundError, State
from bfaas.member import owner

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Machine, MachinesAPI
    from bfaas.member import PoolSettings

T = TypeVar("T")

_log = Logger()

_GONE = (State.DESTROYING, State.DESTROYED)


class Sweep:
    """
    Goes through the machines of the app, whosever they are.

    `tell_own` is told what there is of this pool's.
    """

    _PAUSE = 1.0
    _SECOND_LOOK = 1.5  # times the step of a reclaim in which there is no lease

    def __init__(
        self,
        api: MachinesAPI,
        clock: IReactorTime,
        settings: PoolSettings,
        tell_own: Callable[[list[Machine]], None],
    ) -> None:
        self._api = api
        self._clock = clock
        self._settings = settings
        self._tell_own = tell_own

    async def sweep(self) -> None:
        """
        Go through all machines once.

        Another pool's machine is destroyed if it has no lease, and still has none a moment later: while it
        is reclaimed, its lease changes hands.
        """
        machines = await self._list()
        self._tell_own([machine for machine in machines if self._settings.owns(machine)])
        unleased = [
            machine
            for machine in machines
            if owner(machine.name) is not None
            and not self._settings.owns(machine)
            and await self._try(self._is_unleased(machine), machine)
        ]
        if unleased:
            await sleep(self._clock, self._SECOND_LOOK * self._settings.limits.lease)
        for machine in unleased:
            await self._try(self._destroy_unleased(machine), machine)

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
