"""
The steps of one machine's life in a pool, each within a limit of its own.

What the steps are taken for, and in which order, is the pool's business.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.machines.api import (
    EndedError,
    Lease,
    LeaseHeldError,
    Machine,
    MachinesAPI,
    MachinesError,
    NameTakenError,
    NotFoundError,
    NotReadyError,
    RateLimitedError,
    State,
    UnavailableError,
    WaitTimeoutError,
)
from bfaas.pooling.slot import Phase, Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from twisted.internet.interfaces import IReactorTime

    from bfaas.pooling.backoff import JitteredBackoff
    from bfaas.pooling.config import PoolConfig

    Probe = Callable[[Machine], Coroutine[Deferred[Any], Any, None]]

T = TypeVar("T")

API_SETTLE_TIME = 60.0
"""Seconds after which whatever was asked of the API is done, or never will be, and its lists show it."""

_PAST_STARTING = (State.DESTROYING, State.DESTROYED, State.FAILED, State.LAUNCH_FAILED)
_HAS_STARTED = (State.STARTING, State.STARTED)


class WorkerUnresponsiveError(MachinesError):
    """The machine has started, but its worker takes no requests."""


class DestroyTimeoutError(MachinesError):
    """The machine cannot be destroyed now, and the pool has no more time."""


class LeaseLostError(MachinesError):
    """Another holds the lease that was ours: the machine is its to use, and to destroy."""


class MachineLifecycle:
    """
    The steps of a machine's life, taken with the Machines API.

    After `close`, pauses between attempts are short, and nothing is attempted for ever.
    """

    _log = Logger()
    _START_PAUSE = 0.25  # some 0.4 s after a stop it can be started; the API takes three calls in a burst
    _PROMPT_ANSWER = 0.5  # most workers answer within it, so that most starts need no second wait

    def __init__(
        self,
        api: MachinesAPI,
        probe: Probe,
        clock: IReactorTime,
        backoff: JitteredBackoff,
        settings: PoolConfig,
    ) -> None:
        self._api = api
        self._probe = probe
        self._clock = clock
        self._backoff = backoff
        self._settings = settings
        self._timeouts = settings.timeouts
        self._readiness_waits: dict[Deferred[None], None] = {}
        self._closing = False

    def close(self) -> None:
        """Hurry: nobody is to use a machine any more."""
        self._closing = True
        self._backoff.expedite()
        for hope in list(self._readiness_waits):
            hope.cancel()

    async def create(self, slot: Slot) -> None:
        """
        Make the machine.

        When the answer is lost, ask again: since no two machines have the same name, there is one at
        most. Until that is known, the slot keeps its place. Raises what speaks against a machine once
        it is known that there is none.
        """
        for failures in count():
            asked = self._clock.seconds()
            try:
                await self._try_to_create(slot)
                break
            except (UnavailableError, DeadlineExceededError) as error:
                refused = isinstance(error, RateLimitedError) and slot.create_unknown_since is None
                if self._closing or refused:
                    raise
                slot.create_unknown_since = self._clock.seconds()
                self._log.warn("is {name} created? {error}", name=slot.name, error=error)
            except MachinesError:
                if (
                    slot.known_machine is not None
                    or slot.create_unknown_since is None
                    or asked > slot.create_unknown_since + API_SETTLE_TIME
                ):
                    raise
            await self._backoff.sleep(self._backoff.delay(failures))
        self._log.info("created {name}, {id}", name=slot.name, id=slot.machine.id)

    async def _try_to_create(self, slot: Slot) -> None:
        settings, asked = self._settings, self._clock.seconds()
        create = self._api.create(slot.name, settings.region, settings.machine_config, settings.lease_ttl)
        try:
            slot.known_machine, lease = await self._within(self._timeouts.create, create)
            self._record_lease(slot, lease, asked)
        except NameTakenError as taken:
            slot.create_unknown_since = asked  # an attempt before this one was done
            found = await self._find(slot) if taken.machine_id is None else None
            machine_id = found.id if found else taken.machine_id
            if machine_id is None:
                raise UnavailableError(f"{slot.name} exists, but nobody says where") from taken
            await self._take_over(slot, machine_id)
        except UnavailableError:
            raise
        except MachinesError:
            # This attempt is refused; but one before it, whose answer was lost, may have been done.
            found = await self._find(slot) if slot.create_unknown_since is not None else None
            if found is None:
                raise
            await self._take_over(slot, found.id)

    async def _find(self, slot: Slot) -> Machine | None:
        """Look for it in the list. Raises `UnavailableError` where there is no telling."""
        try:
            machines = await self._within(self._timeouts.lease, self._api.list())
        except (MachinesError, DeadlineExceededError) as error:
            raise UnavailableError(f"cannot look for {slot.name}: {error}") from error
        return next((machine for machine in machines if machine.name == slot.name), None)

    async def _take_over(self, slot: Slot, machine_id: str) -> None:
        """Go on with the machine that an earlier attempt made."""
        try:
            slot.known_machine = await self._within(self._timeouts.lease, self._api.get(machine_id))
        except NotFoundError as error:
            raise UnavailableError(str(error)) from error  # too new to be found, or gone again
        slot.lease = await self._within(self._timeouts.lease, self._api.get_lease(machine_id))
        await self._extend(machine_id, slot)

    async def adopt(self, slot: Slot) -> None:
        """
        Take over the lease of a machine of ours that an earlier instance left, under a new nonce.

        So whatever that instance still does to the machine is refused. Raises `NotFoundError` when the
        lease, or the machine, is gone.
        """
        machine_id = slot.machine.id
        old = await self._within(self._timeouts.lease, self._api.get_lease(machine_id))
        await self._within(self._timeouts.lease, self._api.release_lease(machine_id, old.nonce))
        asked = self._clock.seconds()
        acquire = self._api.acquire_lease(machine_id, self._settings.lease_ttl, self._settings.pool_id)
        self._record_lease(slot, await self._within(self._timeouts.lease, acquire), asked)
        self._log.info("reclaimed {name}, {id}", name=slot.name, id=machine_id)

    async def start(self, slot: Slot) -> None:
        """Start a stopped machine, with a lease that covers a request."""
        await self._renew(slot)
        await self._within(self._timeouts.start, self._call_start(slot))

    async def wait_until_ready(self, slot: Slot) -> None:
        """Wait until the machine has started, and its worker takes requests; or until the pool closes."""
        if self._closing:
            return
        hope = Deferred.fromCoroutine(self._wait_until_ready(slot))
        self._readiness_waits[hope] = None
        try:
            await hope
        except CancelledError:
            if not self._closing:
                raise  # nobody cancels a life; whoever would is heard
        finally:
            del self._readiness_waits[hope]

    async def _wait_until_ready(self, slot: Slot) -> None:
        limit = self._timeouts.create if slot.phase is Phase.CREATING else self._timeouts.start
        await self._within(limit + 1, self._api.wait(slot.machine, State.STARTED, limit))
        await self._wait_for_worker(slot)

    async def _wait_for_worker(self, slot: Slot) -> None:
        """
        Wait until the worker takes requests.

        Raises `WorkerUnresponsiveError` where it does not in time, and `EndedError` as soon as its machine
        has ended.
        """
        probing = Deferred.fromCoroutine(self._within(self._timeouts.ready, self._probe(slot.machine)))
        watching = Deferred.fromCoroutine(self._watch_start(slot))
        ended: list[str] = []

        def give_up(reason: str | None) -> None:
            if reason is not None:
                ended.append(reason)
                probing.cancel()

        def stop_watching(result: T) -> T:
            watching.cancel()
            return result

        watching.addCallback(give_up)
        watching.addErrback(lambda failure: failure.trap(CancelledError) and None)
        watching.addErrback(lambda failure: self._log.failure("in {name}", failure, name=slot.name))
        probing.addBoth(stop_watching)
        try:
            await probing
        except DeadlineExceededError as error:
            raise WorkerUnresponsiveError(f"its worker does not answer: {error}") from error
        except CancelledError:
            if not ended:
                raise
            raise EndedError(f"its worker has ended: {ended[0]}") from None

    async def _watch_start(self, slot: Slot) -> str | None:
        """Return how a machine ended whose worker has not answered yet; None where it goes on."""
        await deferLater(self._clock, self._PROMPT_ANSWER)
        try:
            has_stopped = await self._stops_within(slot, self._timeouts.ready)
        except MachinesError as error:
            return str(error)
        return "its machine has stopped" if has_stopped else None

    async def suspend(self, slot: Slot) -> bool:
        """
        Freeze a machine that is ready; never one that has run a script, since that wipes nothing.

        False when it may not be frozen, since not every machine can be; a stop helps.
        """
        limit = self._timeouts.stop
        try:
            # A worker answers its first probe before it has loaded what it needs, a second one after that.
            await self._wait_for_worker(slot)
            await self._within(limit, self._api.suspend(slot.machine.id, slot.nonce))
            await self._within(limit + 1, self._api.wait(slot.machine, State.SUSPENDED, limit))
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("{name} is not suspended: {error}", name=slot.name, error=error)
            return False
        return True

    async def resume(self, slot: Slot) -> None:
        """Thaw a frozen machine, until it is ready as before."""
        await self._within(self._timeouts.start, self._call_start(slot))
        await self.wait_until_ready(slot)

    async def monitor(self, slot: Slot) -> None:
        """Keep a machine that stands by under its lease; returns when it is no good any more."""
        try:
            while not await self._stops_within(slot, self._until_renewal(slot)):
                await self._renew(slot)
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("{name} stands by no more: {error}", name=slot.name, error=error)
        else:
            self._log.warn("{name} has stopped by itself", name=slot.name)

    def _until_renewal(self, slot: Slot) -> float:
        """Choose the seconds until a lease is renewed, sooner where the last attempts were in vain."""
        return min(self._settings.lease_ttl / 3, (slot.lease_end - self._clock.seconds()) / 2)

    async def _stops_within(self, slot: Slot, seconds: float) -> bool:
        deadline = Deadline(self._clock, seconds)
        for failures in count():
            if not deadline.remaining:
                break
            try:
                await deadline.run(self._api.wait(slot.machine, State.STOPPED, deadline.remaining))
            except (UnavailableError, WaitTimeoutError, DeadlineExceededError):
                await self._backoff.sleep(min(deadline.remaining, self._backoff.delay(failures)))
            else:
                return True
        return False

    async def stop(self, slot: Slot) -> None:
        """Wipe the machine: only a stop that is confirmed makes it fit for another request."""
        limit = self._timeouts.stop
        await self._within(limit, self._api.stop(slot.machine.id, slot.nonce))
        await self._within(limit + 1, self._api.wait(slot.machine, State.STOPPED, limit))

    async def destroy(self, slot: Slot) -> None:
        """
        Destroy the machine, trying for as long as it takes.

        An attempt to create it whose answer was lost may be done only now, under the name that is free
        again; or it was since, if the machine had vanished by itself: then that one is destroyed too.
        Raises `LeaseLostError` when the machine is another's now; and `DestroyTimeoutError` when the pool
        is closing and it is not done within the limit.
        """
        await self._destroy(slot)
        for failures in count():
            if self._closing or slot.create_unknown_since is None:
                break
            await self._backoff.sleep(
                max(
                    slot.create_unknown_since + API_SETTLE_TIME - self._clock.seconds(),
                    self._backoff.delay(failures),
                )
            )
            try:
                found = await self._find(slot)
                if found is None:
                    break
                slot.known_machine, slot.lease = found, None
                await self._destroy(slot)
            except (MachinesError, DeadlineExceededError) as error:
                self._log.warn("is there another {name}? {error}", name=slot.name, error=error)

    async def _destroy(self, slot: Slot) -> None:
        deadline = Deadline(self._clock, self._timeouts.destroy)
        nonce = slot.nonce
        for failures in count():
            try:
                await self._within(self._timeouts.destroy, self._api.destroy(slot.machine.id, nonce))
                break
            except NotFoundError:
                break
            except (MachinesError, DeadlineExceededError) as error:
                if self._closing and not deadline.remaining:
                    raise DestroyTimeoutError(f"cannot destroy {slot.name}: {error}") from error
                self._log.warn("{name} is not destroyed: {error}", name=slot.name, error=error)
                if isinstance(error, LeaseHeldError):
                    nonce = await self._other_nonce(slot, nonce)
            await self._backoff.sleep(self._backoff.delay(failures))
        self._log.info("destroyed {name}, {id}", name=slot.name, id=slot.machine.id)

    async def _other_nonce(self, slot: Slot, refused: str | None) -> str | None:
        """
        Choose what to try after a nonce was refused.

        First none, since our lease may just have run out; then, if the machine never was under a lease of
        ours, that of whoever left it.
        """
        if refused is not None:
            return None
        if slot.lease is not None:
            raise LeaseLostError(f"{slot.name} is another's now")
        try:
            return (await self._within(self._timeouts.lease, self._api.get_lease(slot.machine.id))).nonce
        except (MachinesError, DeadlineExceededError):
            return None

    async def _call_start(self, slot: Slot) -> None:
        """
        Start the machine, trying again until its last stop is over.

        A machine that is found to start, after a call whose answer was lost, has been started.
        """
        for failures in count():
            try:
                if await self._api.start(slot.machine.id, slot.nonce):
                    slot.known_machine = await self._api.get(slot.machine.id)
            except NotReadyError:
                machine = await self._api.get(slot.machine.id)
                if machine.state in _PAST_STARTING:
                    raise
                if machine.state in _HAS_STARTED:
                    slot.known_machine = machine
                    return
            except RateLimitedError:
                pass  # the last stop was checked too often
            else:
                return
            await self._backoff.sleep(max(self._START_PAUSE, self._backoff.delay(failures + 2)))

    async def _renew(self, slot: Slot) -> None:
        """Extend the lease; do without as long as what is left covers a start and two requests."""
        try:
            await self._extend(slot.machine.id, slot)
        except (UnavailableError, DeadlineExceededError):
            starting = self._timeouts.start + self._timeouts.ready
            if slot.lease_end - self._clock.seconds() < starting + 2 * self._settings.max_req_time:
                raise

    async def _extend(self, machine_id: str, slot: Slot) -> None:
        asked, ttl = self._clock.seconds(), self._settings.lease_ttl
        refresh = self._api.refresh_lease(machine_id, slot.nonce or "", ttl)
        self._record_lease(slot, await self._within(self._timeouts.lease, refresh), asked)

    def _record_lease(self, slot: Slot, lease: Lease, asked: float) -> None:
        """Note a lease; it lasts from when it was asked for at the least."""
        slot.lease = lease
        slot.lease_end = asked + self._settings.safe_lease_ttl

    def _within(self, seconds: float, work: Coroutine[Deferred[Any], Any, T]) -> Coroutine[Any, Any, T]:
        return Deadline(self._clock, seconds).run(work)
