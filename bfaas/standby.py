"""
Standing by: how a machine that is ready before anybody asks for it spends its time.

Which machines stand by, and how many, is the pool's business.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from bfaas.member import Member, Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.backoff import Backoff
    from bfaas.life import Life


class Call(enum.Enum):
    """What a machine that is ready is to do."""

    STAND_BY = "stand by"
    COME = "come"  # for a request, if there is one; if not, enough others stand by
    END = "end"  # it is no good any more, or the pool closes


class Standby:
    """
    Has machines stand by until their pool calls them.

    `call` says what a machine is to do now; who changes that wakes it. `backoff` is told how it goes.
    """

    _log = Logger()

    def __init__(
        self, life: Life, backoff: Backoff, call: Callable[[Member], Call], *, suspends: bool
    ) -> None:
        self._life = life
        self._backoff = backoff
        self._call = call
        self._suspends = suspends

    async def hold(self, member: Member) -> bool:
        """Keep a machine that is ready for as long as it is to stand by; False when it is not to serve."""
        member.enter(Phase.READY)
        while (call := self._call(member)) is Call.STAND_BY:
            if not await self._stand_by(member):
                if self._call(member) is not Call.END:
                    self._backoff.failed()
                return False
            self._backoff.succeeded()
            member.enter(Phase.READY)
        return call is Call.COME

    async def _stand_by(self, member: Member) -> bool:
        if not self._suspends:
            return await self._rest(member)
        member.enter(Phase.SUSPENDED)
        if not await self._life.suspend(member):
            return False
        call = self._call(member)  # since its suspension began, that may have changed
        if call is Call.END or (call is Call.STAND_BY and not await self._rest(member)):
            return False
        member.enter(Phase.THAWING)
        await self._life.resume(member)
        return True

    async def _rest(self, member: Member) -> bool:
        """Wait to be woken, and look after its lease meanwhile."""
        keeping = Deferred.fromCoroutine(self._life.keep(member))
        keeping.addErrback(lambda failure: failure.trap(CancelledError) and None)
        keeping.addErrback(lambda failure: self._log.failure("in keeping {name}", failure, name=member.name))
        woken = member.rest()
        keeping.addCallback(lambda _: member.wake(wanted=False))
        try:
            return await woken
        finally:
            keeping.cancel()
