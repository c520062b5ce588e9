"""
Reconciliation: compares the pool with the machines that exist, and destroys machines that no pool uses.

A list of machines may be stale. No machine is therefore destroyed because of a list alone: it is inspected
first, and destroyed without a nonce, which the API refuses while the machine is leased.

A hundred coordinators may share an app, with ten thousand machines, so the reconciler does not request the
lease of each. All leases of a pool expire when its coordinator is gone: the reconciler checks a small random
sample of each pool's machines, and the others only if a machine of the sample has no lease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, DeferredSemaphore, FirstError, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError, ignore_cancellation
from bfaas.machines.api import (
    LeaseHeldError,
    MachinesError,
    NotFoundError,
    RateLimitedError,
    State,
    UnavailableError,
)
from bfaas.pooling.config import pool_of
from bfaas.pooling.scheduler import Inspected

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Machine, MachineInventory, MachinesAPI
    from bfaas.pooling.backoff import JitteredBackoff
    from bfaas.pooling.config import PoolConfig
    from bfaas.pooling.scheduler import Scheduler

T = TypeVar("T")

_log = Logger()

_GONE = (State.DESTROYING, State.DESTROYED)


class Reconciler:
    """
    Periodically goes through all machines of the app.

    Reports this pool's machines to the scheduler, and destroys machines of other pools that have no lease.
    """

    _DESTROY_INTERVAL = 1.0  # seconds between two attempts to destroy all machines of this pool
    _RECHECK_FACTOR = 1.5  # of the timeout of a lease call; an adopted machine has no lease between two calls
    _SAMPLE_SIZE = 3  # machines
    _CONCURRENCY = 10  # machines
    _MAX_PER_PASS = 300  # machines to destroy, approximately; with more, the next pass follows at once

    def __init__(
        self,
        api: MachinesAPI,
        clock: IReactorTime,
        random: Random,
        config: PoolConfig,
        backoff: JitteredBackoff,
        scheduler: Scheduler,
    ) -> None:
        self._api = api
        self._clock = clock
        self._random = random
        self._config = config
        self._backoff = backoff
        self._scheduler = scheduler
        self._loop: Deferred[None] | None = None
        self._wakeup: Deferred[None] | None = None
        self._check_requested = False
        self.api_reachable = True
        """Whether the API responded to the reconciler's last call."""

    def start(self) -> None:
        """Reconcile now, and periodically after that."""
        self._loop = Deferred.fromCoroutine(self._run())
        self._loop.addErrback(ignore_cancellation)
        self._loop.addErrback(lambda failure: _log.failure("in the reconciler", failure))

    def check_soon(self) -> None:
        """Check soon whether the API responds: a call of the pool got no response."""
        self._check_requested = True
        if self._wakeup is not None:
            wakeup, self._wakeup = self._wakeup, None
            wakeup.callback(None)

    def close(self) -> None:
        """Stop, and cancel the pass that is under way."""
        if self._loop is not None:
            self._loop.cancel()

    async def _run(self) -> None:
        """Reconcile when it is due. In between, list the machines while the API may be unreachable."""
        clock, interval = self._clock, self._config.reconcile_interval
        failures, checks, due = 0, 0, clock.seconds()
        while True:
            is_due = clock.seconds() >= due
            try:
                if not is_due:
                    await self._list()
                elif await Deadline(clock, interval).run(self.reconcile_once()):
                    due = clock.seconds() + interval * self._random.uniform(0.8, 1.2)
                    checks = 0
            except (MachinesError, DeadlineExceededError) as error:
                _log.warn("reconciliation failed: {error}", error=error)
                self.api_reachable = False  # whatever the error
                await deferLater(clock, self._backoff.delay(failures))
                failures += 1
            else:
                failures = 0
                if await self._needs_check(due - clock.seconds()):
                    await deferLater(clock, self._backoff.delay(checks))
                    checks += 1

    async def _needs_check(self, timeout: float) -> bool:
        """Wait for `timeout` seconds, or until the API may be unreachable. Return whether it may be."""
        if self.api_reachable and not self._check_requested:
            self._wakeup = Deferred()
            try:
                await Deadline(self._clock, timeout).run(self._wakeup)
            except DeadlineExceededError:
                self._wakeup = None
                return False
        self._check_requested = False
        return True

    async def reconcile_once(self) -> bool:
        """
        Go through all machines once. Return False if machines without a lease may be left.

        A machine of another pool is destroyed if it has no lease at two checks in a row: one check may fall
        between the two leases of an adoption.
        """
        machines = await self._list()
        own = [machine for machine in machines if self._config.owns(machine)]
        inspected = await self._gather_limited(self._inspect, own)
        self._scheduler.reconcile([found for found in inspected if found is not None])
        unleased: list[Machine] = []
        for others in self._other_pools(machines):
            if len(unleased) >= self._MAX_PER_PASS:
                break
            unleased += await self._find_unleased(others)
        if unleased:
            await deferLater(self._clock, self._RECHECK_FACTOR * self._config.timeouts.lease)
        await self._gather_limited(
            lambda machine: self._log_failures(self._destroy_unleased(machine), machine), unleased
        )
        return len(unleased) < self._MAX_PER_PASS

    async def _inspect(self, listed: Machine) -> Inspected | None:
        """Get a listed machine with its metadata; return None if it is gone."""
        try:
            details = await self._within(self._api.get(listed.id))
        except NotFoundError:
            return None
        except (MachinesError, DeadlineExceededError) as error:
            _log.warn("cannot inspect {name}: {error}", name=listed.name, error=error)
            return Inspected(listed, None)
        return None if details.state in _GONE else Inspected(listed, details)

    def _other_pools(self, machines: list[Machine]) -> list[list[Machine]]:
        """
        Group the machines of other pools by pool, pools and machines in random order.

        Every pool is thus reached eventually, even if no pass reaches all of them.
        """
        pools: dict[str, list[Machine]] = {}
        for machine in machines:
            name = pool_of(machine.name)
            if name is not None and name != self._config.name:
                pools.setdefault(name, []).append(machine)
        others = [self._random.sample(pool, len(pool)) for pool in pools.values()]
        self._random.shuffle(others)
        return others

    async def _find_unleased(self, machines: list[Machine]) -> list[Machine]:
        """Return the machines of one pool that have no lease; none if all of a sample are leased."""
        unleased: list[Machine] = []
        for batch in (machines[: self._SAMPLE_SIZE], machines[self._SAMPLE_SIZE :]):
            found = await self._gather_limited(
                lambda machine: self._log_failures(self._is_unleased(machine), machine), batch
            )
            unleased += [machine for machine, is_unleased in zip(batch, found, strict=True) if is_unleased]
            if not unleased:
                break
        return unleased

    async def destroy_all_own(self) -> None:
        """Destroy all machines of this pool. Return when none is left, however long it takes."""
        while True:
            try:
                machines = [machine for machine in await self._list() if self._config.owns(machine)]
                if not machines:
                    return
                for machine in machines:
                    await self._log_failures(destroy_own(self._api, machine), machine)
            except (MachinesError, DeadlineExceededError) as error:
                _log.warn("cannot list the machines to destroy: {error}", error=error)
            await deferLater(self._clock, self._DESTROY_INTERVAL)

    async def _log_failures(self, work: Coroutine[Deferred[Any], Any, T], machine: Machine) -> T | None:
        """Return the result of work on one machine; log its failure, so that the pass continues."""
        try:
            return await self._within(work)
        except (MachinesError, DeadlineExceededError) as error:
            _log.warn("skipping {name} for now: {error}", name=machine.name, error=error)
            return None

    async def _list(self) -> list[Machine]:
        return [machine for machine in await self._within(self._api.list()) if machine.state not in _GONE]

    async def _within(self, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Do work within its timeout, and record whether the API responds, even with an error."""
        try:
            result = await Deadline(self._clock, self._config.timeouts.inspect).run(work)
        except (MachinesError, DeadlineExceededError) as error:
            no_response = isinstance(error, (UnavailableError, DeadlineExceededError))
            self.api_reachable = isinstance(error, RateLimitedError) or not no_response
            raise
        self.api_reachable = True
        return result

    async def _gather_limited(
        self, work: Callable[[Machine], Coroutine[Deferred[Any], Any, T]], machines: Iterable[Machine]
    ) -> list[T]:
        """Do the same work on all machines, a few at a time. The first failure cancels the rest."""
        semaphore = DeferredSemaphore(self._CONCURRENCY)
        tasks = [semaphore.run(work, machine) for machine in machines]
        # Cancelled in this order, tasks that wait for the semaphore are cancelled before those that hold it.
        tasks.reverse()
        try:
            results = await gatherResults(tasks, consumeErrors=True)
        except FirstError as error:  # raised for a cancellation too
            for task in tasks:
                task.cancel()
            error.subFailure.raiseException()
        results.reverse()
        return results

    async def _is_unleased(self, machine: Machine) -> bool:
        try:
            await self._api.get_lease(machine.id)
        except NotFoundError:
            return True
        return False

    async def _destroy_unleased(self, machine: Machine) -> None:
        """Destroy a machine of another pool unless it is leased."""
        if not await self._is_unleased(machine) or (await self._api.get(machine.id)).state in _GONE:
            return
        try:
            await self._api.destroy(machine.id, None)
        except LeaseHeldError:
            return
        _log.info("destroyed {name}, whose lease had expired", name=machine.name)


async def destroy_own(api: MachineInventory, machine: Machine) -> None:
    """Destroy a machine of our own, using its lease if it has one. Raises `MachinesError`."""
    try:
        nonce = (await api.get_lease(machine.id)).nonce
    except NotFoundError:
        nonce = None
    try:
        await api.destroy(machine.id, nonce)
    except NotFoundError:
        return
    _log.info("destroyed {name}, {id}", name=machine.name, id=machine.id)
