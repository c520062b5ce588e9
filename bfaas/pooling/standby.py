"""
Standing by: how a machine that is ready before anybody asks for it spends its time.

Which machines stand by, and how many, is the pool's business.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from bfaas.pooling.slot import Phase, Slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.pooling.backoff import Backoff
    from bfaas.pooling.lifecycle import MachineLifecycle


class StandbyAction(enum.Enum):
    """What a machine that is ready is to do."""

    WAIT = "stand by"
    SERVE = "come"  # for a request, if there is one; if not, enough others stand by
    RETIRE = "end"  # it is no good any more, or the pool closes


class Standby:
    """
    Has machines stand by until their pool calls them.

    `call` says what a machine is to do now; who changes that wakes it. `backoff` is told how it goes.
    """

    _log = Logger()

    def __init__(
        self,
        life: MachineLifecycle,
        backoff: Backoff,
        call: Callable[[Slot], StandbyAction],
        *,
        suspend_standby: bool,
    ) -> None:
        self._lifecycle = life
        self._backoff = backoff
        self._next_action = call
        self._suspend_standby = suspend_standby

    async def wait_for_work(self, slot: Slot) -> bool:
        """Keep a machine that is ready for as long as it is to stand by; False when it is not to serve."""
        slot.transition_to(Phase.READY)
        while (call := self._next_action(slot)) is StandbyAction.WAIT:
            if not await self._stand_by(slot):
                if self._next_action(slot) is not StandbyAction.RETIRE:
                    self._backoff.failed()
                return False
            self._backoff.succeeded()
            slot.transition_to(Phase.READY)
        return call is StandbyAction.SERVE

    async def _stand_by(self, slot: Slot) -> bool:
        if not self._suspend_standby:
            return await self._rest(slot)
        slot.transition_to(Phase.SUSPENDED)
        if not await self._lifecycle.suspend(slot):
            return False
        call = self._next_action(slot)  # since its suspension began, that may have changed
        if call is StandbyAction.RETIRE or (call is StandbyAction.WAIT and not await self._rest(slot)):
            return False
        slot.transition_to(Phase.RESUMING)
        await self._lifecycle.resume(slot)
        return True

    async def _rest(self, slot: Slot) -> bool:
        """Wait to be woken, and look after its lease meanwhile."""
        keeping = Deferred.fromCoroutine(self._lifecycle.monitor(slot))
        keeping.addErrback(lambda failure: failure.trap(CancelledError) and None)
        keeping.addErrback(lambda failure: self._log.failure("in keeping {name}", failure, name=slot.name))
        woken = slot.park()
        keeping.addCallback(lambda _: slot.wake(wanted=False))
        try:
            return await woken
        finally:
            keeping.cancel()
