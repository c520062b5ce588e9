"""
The steps of a machine's lifecycle in a pool, each with its own timeout.

The pool decides which steps a machine takes, and in which order.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError, ignore_cancellation
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

T = TypeVar("T")

API_SETTLE_TIME = 60.0
"""Seconds after which a call to the API has taken effect or never will, and its lists show the effect."""

_CANNOT_START = (State.DESTROYING, State.DESTROYED, State.FAILED, State.LAUNCH_FAILED)
_START_REQUESTED = (State.STARTING, State.STARTED)


class WorkerUnresponsiveError(MachinesError):
    """The machine has started, but its worker does not accept requests."""


class DestroyTimeoutError(MachinesError):
    """The machine could not be destroyed before the timeout of a closing pool."""


class LeaseLostError(MachinesError):
    """Another client holds the lease, and may use and destroy the machine; this pool must not."""


class ReadinessProbe(Protocol):
    """Checks whether workers are ready."""

    async def wait_until_ready(self, machine: Machine) -> None:
        """Wait until the worker on a started machine accepts requests. Only cancellation ends the wait."""
        ...


class MachineLifecycle:
    """
    The steps of a machine's lifecycle, as calls to the Machines API.

    Steps raise `MachinesError` or `DeadlineExceededError`. After `close`, delays between attempts are short,
    and no step is attempted forever.
    """

    _log = Logger()
    _MIN_START_DELAY = 0.25  # seconds; a start succeeds some 0.4 s after a stop; the API allows bursts of 3
    # Seconds; most workers are ready earlier, and on a busy coordinator most standby machines are in use
    # earlier. This saves most runs two API calls.
    _WATCH_DELAY = 0.5
    # Part of a lease that is enough for another request: busy machines extend theirs about once per minute.
    # By `lease_ttl`, it is more than a start and two requests.
    _FRESH_LEASE = 0.8

    def __init__(
        self,
        api: MachinesAPI,
        probe: ReadinessProbe,
        clock: IReactorTime,
        backoff: JitteredBackoff,
        config: PoolConfig,
    ) -> None:
        self._api = api
        self._probe = probe
        self._clock = clock
        self._backoff = backoff
        self._config = config
        self._timeouts = config.timeouts
        self._readiness_waits: dict[Deferred[None], None] = {}
        self._closing = False

    def close(self) -> None:
        """Shorten delays, and end waits for readiness: the pool uses no further machine."""
        self._closing = True
        self._backoff.expedite()
        for wait in list(self._readiness_waits):
            wait.cancel()

    async def create(self, slot: Slot) -> None:
        """
        Create the machine; retry while the outcome of an attempt is unknown.

        Names are unique, so that at most one machine results. Re-raise the API's error once the machine is
        known not to exist.
        """
        for failures in count():
            requested_at = self._clock.seconds()
            try:
                await self._try_to_create(slot)
                break
            except (UnavailableError, DeadlineExceededError) as error:
                not_created = isinstance(error, RateLimitedError) and slot.create_unknown_since is None
                if self._closing or not_created:
                    raise
                slot.create_unknown_since = self._clock.seconds()
                self._log.warn("cannot tell whether {name} was created: {error}", name=slot.name, error=error)
            except MachinesError:
                if (
                    slot.known_machine is not None
                    or slot.create_unknown_since is None
                    or requested_at > slot.create_unknown_since + API_SETTLE_TIME
                ):
                    raise
            await self._backoff.sleep(self._backoff.delay(failures))
        self._log.info("created {name}, {id}", name=slot.name, id=slot.machine.id)

    async def _try_to_create(self, slot: Slot) -> None:
        config = self._config
        requested_at = self._clock.seconds()
        create = self._api.create(slot.name, config.region, config.machine_config, config.lease_ttl)
        try:
            slot.known_machine, lease = await self._within(self._timeouts.create, create)
            self._record_lease(slot, lease, requested_at)
        except NameTakenError as taken:
            slot.create_unknown_since = requested_at  # an earlier attempt succeeded
            found = await self._find(slot) if taken.machine_id is None else None
            machine_id = found.id if found else taken.machine_id
            if machine_id is None:
                raise UnavailableError(f"{slot.name} exists, but its id is unknown") from taken
            await self._take_over(slot, machine_id)
        except UnavailableError:
            raise
        except MachinesError:
            # This attempt was rejected, but an earlier one with an unknown outcome may have succeeded.
            found = await self._find(slot) if slot.create_unknown_since is not None else None
            if found is None:
                raise
            await self._take_over(slot, found.id)

    async def _find(self, slot: Slot) -> Machine | None:
        """Return the slot's machine from the list, or None. Raises `UnavailableError` if the list fails."""
        try:
            machines = await self._within(self._timeouts.lease, self._api.list())
        except (MachinesError, DeadlineExceededError) as error:
            raise UnavailableError(f"cannot search for {slot.name}: {error}") from error
        return next((machine for machine in machines if machine.name == slot.name), None)

    async def _take_over(self, slot: Slot, machine_id: str) -> None:
        """Use the machine that an earlier attempt created."""
        try:
            slot.known_machine = await self._within(self._timeouts.lease, self._api.get(machine_id))
        except NotFoundError as error:
            raise UnavailableError(str(error)) from error  # not visible yet, or gone
        slot.lease = await self._within(self._timeouts.lease, self._api.get_lease(machine_id))
        await self._extend(machine_id, slot)

    async def adopt(self, slot: Slot) -> None:
        """
        Replace the lease of a machine that an earlier instance of this pool left, with a new nonce.

        The API then refuses late calls of that instance. Raises `NotFoundError` if the lease or the machine
        is gone.
        """
        machine_id = slot.machine.id
        old = await self._within(self._timeouts.lease, self._api.get_lease(machine_id))
        await self._within(self._timeouts.lease, self._api.release_lease(machine_id, old.nonce))
        requested_at = self._clock.seconds()
        acquire = self._api.acquire_lease(machine_id, self._config.lease_ttl, self._config.pool_id)
        self._record_lease(slot, await self._within(self._timeouts.lease, acquire), requested_at)
        self._log.info("adopted {name}, {id}", name=slot.name, id=machine_id)

    async def start(self, slot: Slot) -> None:
        """Start a stopped machine. Extend its lease before that, unless most of it is left."""
        if slot.lease_end - self._clock.seconds() < self._FRESH_LEASE * self._config.safe_lease_ttl:
            await self._renew(slot)
        await self._within(self._timeouts.start, self._call_start(slot))

    async def wait_until_ready(self, slot: Slot) -> None:
        """Wait until the machine has started and its worker accepts requests, or until the pool closes."""
        if self._closing:
            return
        wait = Deferred.fromCoroutine(self._wait_until_ready(slot))
        self._readiness_waits[wait] = None
        try:
            await wait
        except CancelledError:
            if not self._closing:
                raise
        finally:
            del self._readiness_waits[wait]

    async def _wait_until_ready(self, slot: Slot) -> None:
        timeout = self._timeouts.create if slot.phase is Phase.CREATING else self._timeouts.start
        await self._wait_for(slot, State.STARTED, timeout)
        await self._wait_for_worker(slot)

    async def _wait_for_worker(self, slot: Slot) -> None:
        """
        Wait until the worker accepts requests.

        Raises `WorkerUnresponsiveError` after a timeout, and `EndedError` as soon as its machine has ended.
        """
        probe = self._probe.wait_until_ready(slot.machine)
        probing = Deferred.fromCoroutine(self._within(self._timeouts.ready, probe))
        watching = self._after_watch_delay(lambda: self._watch_start(slot))
        ended: list[str] = []

        def give_up(reason: str | None) -> None:
            if reason is not None:
                ended.append(reason)
                probing.cancel()

        def stop_watching(result: T) -> T:
            watching.cancel()
            return result

        watching.addCallback(give_up)
        watching.addErrback(ignore_cancellation)
        watching.addErrback(lambda failure: self._log.failure("while {name} starts", failure, name=slot.name))
        probing.addBoth(stop_watching)
        try:
            await probing
        except DeadlineExceededError as error:
            raise WorkerUnresponsiveError(f"its worker does not respond: {error}") from error
        except CancelledError:
            if not ended:
                raise
            raise EndedError(f"its worker has ended: {ended[0]}") from None

    async def _watch_start(self, slot: Slot) -> str | None:
        """Return why the machine ended before its worker was ready; None if it did not end."""
        try:
            has_stopped = await self._stops_within(slot, self._timeouts.ready)
        except MachinesError as error:
            return str(error)
        return "its machine has stopped" if has_stopped else None

    async def suspend(self, slot: Slot) -> bool:
        """
        Suspend a machine that is ready. Return False if that fails: not every machine can be suspended.

        A machine that has run a script must not be suspended, because suspension keeps its memory and files.
        """
        timeout = self._timeouts.stop
        try:
            # A worker may answer its first probe before all of its code is loaded, but not the second one.
            await self._wait_for_worker(slot)
            await self._within(timeout, self._api.suspend(slot.machine.id, slot.nonce))
            await self._wait_for(slot, State.SUSPENDED, timeout)
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("cannot suspend {name}: {error}", name=slot.name, error=error)
            return False
        return True

    async def resume(self, slot: Slot) -> None:
        """Resume a suspended machine, and wait until it is ready."""
        await self._within(self._timeouts.start, self._call_start(slot))
        await self.wait_until_ready(slot)

    def monitor(self, slot: Slot) -> Deferred[str]:
        """
        Extend the lease of a standby machine until it stops or fails; return the reason.

        A started one is probed as often, since its worker exits after a silence as long as the lease.
        """
        return self._after_watch_delay(lambda: self._monitor(slot))

    async def _monitor(self, slot: Slot) -> str:
        try:
            while not await self._stops_within(slot, self._until_renewal(slot)):
                await self._renew(slot)
                if slot.phase is Phase.READY:
                    await self._within(self._timeouts.ready, self._probe.wait_until_ready(slot.machine))
        except (MachinesError, DeadlineExceededError) as error:
            return str(error)
        return "stopped by itself"

    def _after_watch_delay(self, work: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> Deferred[T]:
        # Most are cancelled before that: a coroutine that has not begun needs no exception to end.
        delay: Deferred[None] = deferLater(self._clock, self._WATCH_DELAY)
        return delay.addCallback(lambda _: Deferred.fromCoroutine(work()))

    def _until_renewal(self, slot: Slot) -> float:
        """Return the seconds until the lease is renewed: a third of the TTL, less after failures."""
        return min(self._config.lease_ttl / 3, (slot.lease_end - self._clock.seconds()) / 2)

    async def _stops_within(self, slot: Slot, seconds: float) -> bool:
        """Return True as soon as the machine stops, and False if it does not stop within `seconds`."""
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
        """Stop the machine, which wipes it, and wait for the confirmation: only then may it be reused."""
        timeout = self._timeouts.stop
        await self._within(timeout, self._api.stop(slot.machine.id, slot.nonce))
        await self._wait_for(slot, State.STOPPED, timeout)

    async def destroy(self, slot: Slot) -> None:
        """
        Destroy the machine, with as many attempts as it takes.

        A creation with an unknown outcome may take effect late, even after this machine is gone and its name
        is free again. Such a duplicate is destroyed too. Raises `LeaseLostError` if another client holds the
        lease, and `DestroyTimeoutError` if the pool is closing and the timeout has passed.
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
                self._log.warn("cannot check for a duplicate of {name}: {error}", name=slot.name, error=error)

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
                self._log.warn("cannot destroy {name} yet: {error}", name=slot.name, error=error)
                if isinstance(error, LeaseHeldError):
                    nonce = await self._other_nonce(slot, nonce)
            await self._backoff.sleep(self._backoff.delay(failures))
        self._log.info("destroyed {name}, {id}", name=slot.name, id=slot.machine.id)

    async def _other_nonce(self, slot: Slot, rejected: str | None) -> str | None:
        """
        Return the nonce to try after the API rejected one.

        After the slot's own nonce, try none, because the slot's lease may have expired. A slot without a
        lease has a machine of an earlier instance: try that instance's nonce.
        """
        if rejected is not None:
            return None
        if slot.lease is not None:
            raise LeaseLostError(f"another client holds the lease of {slot.name}")
        try:
            return (await self._within(self._timeouts.lease, self._api.get_lease(slot.machine.id))).nonce
        except (MachinesError, DeadlineExceededError):
            return None

    async def _call_start(self, slot: Slot) -> None:
        """
        Start the machine; retry while it cannot be started yet after its last stop.

        A machine that is starting already was started by an earlier call whose response was lost.
        """
        for failures in count():
            try:
                if await self._api.start(slot.machine.id, slot.nonce):
                    slot.known_machine = await self._api.get(slot.machine.id)
            except NotReadyError:
                machine = await self._api.get(slot.machine.id)
                if machine.state in _CANNOT_START:
                    raise
                if machine.state in _START_REQUESTED:
                    slot.known_machine = machine
                    return
            except RateLimitedError:
                pass  # earlier attempts used up the limit
            else:
                return
            await self._backoff.sleep(max(self._MIN_START_DELAY, self._backoff.delay(failures + 2)))

    async def _renew(self, slot: Slot) -> None:
        """Extend the lease. Ignore a failure if the rest of the lease covers a start and two requests."""
        try:
            await self._extend(slot.machine.id, slot)
        except (UnavailableError, DeadlineExceededError):
            starting = self._timeouts.start + self._timeouts.ready
            if slot.lease_end - self._clock.seconds() < starting + 2 * self._config.max_req_time:
                raise

    async def _extend(self, machine_id: str, slot: Slot) -> None:
        requested_at = self._clock.seconds()
        refresh = self._api.refresh_lease(machine_id, slot.nonce or "", self._config.lease_ttl)
        self._record_lease(slot, await self._within(self._timeouts.lease, refresh), requested_at)

    def _record_lease(self, slot: Slot, lease: Lease, requested_at: float) -> None:
        """Record a lease, which began after it was requested. Its end is computed from the request."""
        slot.lease = lease
        slot.lease_end = requested_at + self._config.safe_lease_ttl

    async def _wait_for(self, slot: Slot, state: State, timeout: float) -> None:
        # The API enforces the timeout; the deadline is for an API that does not answer.
        await self._within(timeout + 1, self._api.wait(slot.machine, state, timeout))

    def _within(self, seconds: float, work: Coroutine[Deferred[Any], Any, T]) -> Coroutine[Any, Any, T]:
        return Deadline(self._clock, seconds).run(work)
