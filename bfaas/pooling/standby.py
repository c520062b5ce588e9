"""
Warm standby: keeps ready machines, started or suspended, until requests need them.

The pool decides which machines remain in standby, and how many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from bfaas.deadline import ignore_cancellation
from bfaas.pooling.scheduler import StandbyAction
from bfaas.pooling.slot import Phase, Slot

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from bfaas.pooling.backoff import Backoff
    from bfaas.pooling.lifecycle import MachineLifecycle
    from bfaas.pooling.scheduler import Scheduler


AFTER_REQUEST = 0.01
"""
Seconds after a request arrives in which work that can wait is postponed, so that the request is sent first.

Cancelling a call to the API takes longer than all that a request needs before it is sent to its worker.
"""


class Standby:
    """
    Keeps ready machines in standby, started or suspended, until the scheduler decides otherwise.

    `backoff` pauses the start of standby machines after failures.
    """

    _log = Logger()

    def __init__(
        self,
        lifecycle: MachineLifecycle,
        backoff: Backoff,
        scheduler: Scheduler,
        *,
        suspend_standby: bool,
    ) -> None:
        self._lifecycle = lifecycle
        self._backoff = backoff
        self._scheduler = scheduler
        self._suspend_standby = suspend_standby

    async def wait_for_work(self, slot: Slot) -> bool:
        """Keep a ready machine in standby for as long as required. Return whether it may serve a request."""
        slot.transition_to(Phase.READY)
        while (action := self._scheduler.next_action(slot)) is StandbyAction.WAIT:
            if not await self._stand_by(slot):
                if self._scheduler.next_action(slot) is not StandbyAction.RETIRE:
                    self._backoff.failed()
                return False
            self._backoff.succeeded()
            slot.transition_to(Phase.READY)
        return action is StandbyAction.SERVE

    async def _stand_by(self, slot: Slot) -> bool:
        """Wait until the machine is wanted. Return False if it failed, or is to be retired."""
        if not self._suspend_standby:
            return await self._wait_for_wakeup(slot)
        slot.transition_to(Phase.SUSPENDED)
        if not await self._lifecycle.suspend(slot):
            return False
        action = self._scheduler.next_action(slot)  # may have changed during the suspension
        if action is StandbyAction.RETIRE:
            return False
        if action is StandbyAction.WAIT and not await self._wait_for_wakeup(slot):
            return False
        slot.transition_to(Phase.RESUMING)
        await self._lifecycle.resume(slot)
        return True

    async def _wait_for_wakeup(self, slot: Slot) -> bool:
        """Park the slot while its machine is monitored. Return whether the machine is wanted."""
        monitoring: Deferred[Any] = self._lifecycle.monitor(slot)
        monitoring.addErrback(ignore_cancellation)
        monitoring.addErrback(
            lambda failure: self._log.failure("while monitoring {name}", failure, name=slot.name)
        )
        wakeup = slot.park()

        def ended(reason: str | None) -> None:
            if slot.wakeup is wakeup:
                if reason is not None:
                    self._log.warn("standby machine {name} ended: {reason}", name=slot.name, reason=reason)
                slot.wake(wanted=False)

        monitoring.addCallback(ended)
        wanted = False
        try:
            wanted = await wakeup
        finally:
            if wanted:
                slot.clock.callLater(AFTER_REQUEST, monitoring.cancel)
            else:
                monitoring.cancel()
        return wanted
