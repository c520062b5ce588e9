"""
Cleaning: what is done about machines of the app that are nobody's in our pool.

The list that a sweep begins with may be stale, so no machine is destroyed on its word: it is looked at
first, and destroyed without a nonce, which the API refuses while anybody holds a lease on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.logger import Logger

from bfaas.life import owner
from bfaas.machines.api import LeaseHeldError, MachinesError, NotFoundError, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.life import Member, PoolSettings
    from bfaas.machines.api import Machine, MachinesAPI

_log = Logger()

_GONE = (State.DESTROYING, State.DESTROYED)


class Sweep:
    """
    Goes through the machines of the app, whosever they are.

    `known` tells the pool's member of a name. `adopt` takes a machine of ours in that the pool does not
    know, and answers False when it has no place for it.
    """

    def __init__(
        self,
        api: MachinesAPI,
        settings: PoolSettings,
        known: Callable[[str], Member | None],
        adopt: Callable[[Machine], bool],
    ) -> None:
        self._api = api
        self._settings = settings
        self._known = known
        self._adopt = adopt
        self._doomed: set[str] = set()

    def doom(self, member: Member) -> None:
        """Remember a machine of ours that could not be destroyed, to try again."""
        self._doomed.add(member.name)

    async def sweep(self) -> None:
        """Go through all machines once; one that makes trouble is left for the next time."""
        machines = await self._api.list()
        self._doomed &= {machine.name for machine in machines}
        for machine in machines:
            try:
                await self._look_at(machine)
            except MachinesError as error:
                _log.warn("leaves {name} for now: {error}", name=machine.name, error=error)

    async def destroy_all_own(self) -> None:
        """Destroy all machines of this pool."""
        for machine in await self._api.list():
            if self._settings.owns(machine) and machine.state not in _GONE:
                try:
                    await destroy_own(self._api, machine)
                except MachinesError as error:
                    _log.error("cannot destroy {name}: {error}", name=machine.name, error=error)

    async def _look_at(self, machine: Machine) -> None:
        if owner(machine.name) is None or machine.state in _GONE:
            return
        if not self._settings.owns(machine):
            await self._destroy_unleased(machine)
            return
        member = self._known(machine.name)
        if member is not None:
            if not self._settings.recognizes(machine):
                _log.warn("somebody changed the metadata of {name}", name=machine.name)
                member.tainted = True
                member.wake(wanted=False)
            return
        machine = await self._api.get(machine.id)
        if machine.state in _GONE or self._known(machine.name) is not None:
            return
        fit = self._settings.recognizes(machine) and machine.name not in self._doomed
        if not (fit and await self._is_leased(machine) and self._adopt(machine)):
            await destroy_own(self._api, machine)

    async def _destroy_unleased(self, machine: Machine) -> None:
        """Destroy another pool's machine if its lease has run out."""
        if await self._is_leased(machine):
            return
        machine = await self._api.get(machine.id)
        if machine.state in _GONE:
            return
        try:
            await self._api.destroy(machine.id, None)
        except LeaseHeldError:
            return
        _log.info("destroyed {name}, whose lease had run out", name=machine.name)

    async def _is_leased(self, machine: Machine) -> bool:
        try:
            await self._api.get_lease(machine.id)
        except NotFoundError:
            return False
        return True


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
