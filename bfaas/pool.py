"""
The pool: machines on demand. Each serves one request at a time, and is wiped by a stop after it.

Requests wait for machines in a fair queue. Only the pool creates, starts, stops and destroys machines, so
that a cancelled request leaves none behind. Each slot has one coroutine, `_run_lifecycle`, which manages its
machine from creation to destruction. A request gets an `Allocation`, and releases it exactly once.

A machine's name contains the name of its pool, and alone decides which pool it belongs to: it cannot be
changed from inside the machine. The metadata names the pool too, for people, but can be changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.machines.api import Machine, MachinesAPI, MachinesError, RateLimitedError, UnavailableError
from bfaas.pooling.backoff import Backoff, JitteredBackoff
from bfaas.pooling.config import PoolConfig, machine_name
from bfaas.pooling.fair_queue import FairQueue
from bfaas.pooling.lifecycle import DestroyTimeoutError, LeaseLostError, MachineLifecycle
from bfaas.pooling.plan import Constraints, Create, SlotState, Wake, plan
from bfaas.pooling.reconciler import Reconciler
from bfaas.pooling.scheduler import Scheduler, StandbyAction
from bfaas.pooling.slot import NullPhaseObserver, Phase, PhaseObserver, Slot
from bfaas.pooling.standby import AFTER_REQUEST, Standby

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from bfaas.pooling.lifecycle import ReadinessProbe
    from bfaas.pooling.scheduler import Inspected


_OCCUPIED = (Phase.RUNNING, Phase.STOPPING, Phase.DESTROYING)
"""Phases of slots that cannot serve a request before their present use is over."""

_TURNAROUND_WINDOW = 5
"""The weight of the latest turnaround in the mean is 1/5, or more while there are fewer than five."""


class PoolClosedError(Exception):
    """The pool is closed, and allocates no machines."""


class Allocation:
    """A machine that is started, ready and unused, for one request. `release` returns it to the pool."""

    def __init__(self, machine: Machine, released: Deferred[None]) -> None:
        self.machine = machine
        self._released: Deferred[None] | None = released

    def release(self) -> None:
        """Return the machine; the pool wipes it in the background. Raises `RuntimeError` the second time."""
        if self._released is None:
            raise RuntimeError(f"machine {self.machine.id} was released before")
        released, self._released = self._released, None
        released.callback(None)


class Pool(Scheduler):
    """Up to `config.size` machines, shared by the requests of one coordinator."""

    _log = Logger()

    def __init__(
        self,
        api: MachinesAPI,
        probe: ReadinessProbe,
        clock: IReactorTime,
        random: Random,
        config: PoolConfig,
        observer: PhaseObserver | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._random = random
        self._observer = observer or NullPhaseObserver()
        self._slots: dict[Slot, Deferred[None]] = {}
        self._queue: FairQueue[Allocation] = FairQueue()
        self._mean_turnaround = 0.0
        self._turnarounds = 0
        self._machines_known = False
        self._create_rate_limited = False
        self._rebalancing = False
        self._rebalance_again = False
        self._closing = False
        self._destroying = False
        delays = JitteredBackoff(clock, random)
        self._standby_timer: IDelayedCall | None = None
        self._create_backoff = Backoff(clock, delays, self.rebalance)
        self._standby_backoff = Backoff(clock, delays, self.rebalance)
        self._lifecycle = MachineLifecycle(api, probe, clock, delays, config)
        self._reconciler = Reconciler(api, clock, random, config, delays, self)
        self._standby = Standby(
            self._lifecycle, self._standby_backoff, self, suspend_standby=config.suspend_standby
        )

    def start(self) -> None:
        """Adopt the machines of this pool's earlier instances, and reconcile periodically."""
        self._reconciler.start()

    # The interface for requests.

    @property
    def queue_depth_ahead(self) -> int:
        """How many machines have to become free before a new request is served; 0 if none has to."""
        return max(0, len(self._queue) + 1 - (self._config.size - len(self._in_phase(*_OCCUPIED))))

    @property
    def expected_wait(self) -> float:
        """
        The estimated seconds until `queue_depth_ahead` machines are free; 0 while there is no estimate.

        A turnaround is the time from the start of a machine to the confirmed stop after its run, without the
        time in standby. The estimate is a moving average. For a machine that has been in its present phase
        for longer than that, this longer time is used, so that there is an estimate before the first
        turnaround. The upper bound of a turnaround is a run of full length and a stop.
        """
        occupied = self._in_phase(*_OCCUPIED)
        now = self._clock.seconds()
        estimates = [
            max(self._mean_turnaround, min(now - slot.phase_since, self._max_turnaround)) for slot in occupied
        ]
        turnaround = sum(estimates) / len(estimates) if estimates else self._mean_turnaround
        return turnaround * self.queue_depth_ahead / self._config.size

    @property
    def waiting(self) -> int:
        """How many requests are in the queue."""
        return len(self._queue)

    def queue_position(self, client: str, entry: Deferred[Allocation]) -> int:
        """Return the place, from 1, of what `allocate` returned. It must still be in the queue."""
        return self._queue.position(client, entry)

    @property
    def not_ready_reason(self) -> str | None:
        """The reason why a new request could not get a machine, as far as is known; None if it could."""
        if self._in_phase(Phase.READY):
            return None
        if not self._machines_known:
            return "the pool has not listed its machines yet"
        if not self._reconciler.api_reachable:
            return "the Machines API is failing"
        if self._in_phase(Phase.STOPPED, Phase.SUSPENDED):
            return None
        # A slot is kept while a creation's outcome is unknown, and until a failed machine is destroyed.
        uncertain = any(slot.create_unknown_since is not None for slot in self._in_phase(Phase.CREATING))
        now = self._clock.seconds()
        timeout = self._config.timeouts.inspect
        stuck = sum(now - slot.phase_since > timeout for slot in self._in_phase(Phase.DESTROYING))
        if self._create_backoff.active or uncertain or stuck >= self._config.size:
            return "machines cannot be started"
        return None

    def count(self, phase: Phase) -> int:
        """Return how many slots are in a phase."""
        return len(self._in_phase(phase))

    def allocate(self, client: str) -> Deferred[Allocation]:
        """
        Wait in the queue for a machine. Cancellation leaves the queue.

        Fails with `PoolClosedError` when the pool closes first.
        """
        entry = self._queue.enqueue(client)
        if self._config.standby and self._standby_timer is None:
            self._standby_timer = self._clock.callLater(AFTER_REQUEST, self._replace_standby)
        self.rebalance()
        return entry

    def _replace_standby(self) -> None:
        self._standby_timer = None
        self.rebalance()

    async def close(self) -> None:
        """Stop every machine, for the pool's next instance to adopt. Waits for running requests."""
        self._closing = True
        self._lifecycle.close()
        self._reconciler.close()
        self._create_backoff.close()
        self._standby_backoff.close()
        if self._standby_timer is not None:
            self._standby_timer.cancel()
        self._queue.close(PoolClosedError)
        for slot in list(self._slots):
            slot.wake(wanted=False)
        await DeferredList(list(self._slots.values()), consumeErrors=True)

    async def destroy(self) -> None:
        """
        Close the pool, and destroy every machine of it instead of stopping it, unknown ones included.

        Waits for running requests, but returns after `max_req_time` and `timeouts.exit` in any case.
        """
        self._destroying = True
        timeouts = self._config.timeouts
        close_timeout = self._config.max_req_time + timeouts.exit - timeouts.destroy
        # When the timeout cancels `close`, the slots' coroutines continue.
        await Deadline(self._clock, close_timeout).run(self.close())
        for slot in self._slots:
            self._log.error("{name} was not destroyed in time", name=slot.name)
        try:
            await Deadline(self._clock, timeouts.destroy).run(self._reconciler.destroy_all_own())
        except (MachinesError, DeadlineExceededError) as error:
            self._log.error("cannot check that all machines are destroyed: {error}", error=error)

    # The interface for the pool's parts.

    def next_action(self, slot: Slot) -> StandbyAction:
        """Return what a ready machine does next."""
        if self._closing or slot.unusable:
            return StandbyAction.RETIRE
        others = [other for other in self._in_phase(Phase.READY, Phase.SUSPENDED) if other is not slot]
        if len(self._queue) > 0 or len(others) >= self._config.standby:
            return StandbyAction.SERVE
        return StandbyAction.WAIT

    def reconcile(self, machines: Sequence[Inspected]) -> None:
        """
        Compare the slots with all machines of this pool that exist.

        Unknown machines get a slot. Machines that are unusable or could not be inspected, and surplus
        machines, keep theirs only until they are destroyed.
        """
        known = {slot.name: slot for slot in self._slots}
        unknown: list[Slot] = []
        usable = {
            listed.name: details is not None and self._config.metadata_matches(details)
            for listed, details in machines
        }
        # Usable machines come first: they take the free slots.
        for listed, details in sorted(machines, key=lambda machine: not usable[machine.listed.name]):
            slot = known.get(listed.name)
            if slot is None:
                surplus = len(known) + len(unknown) >= self._config.size
                slot = Slot(listed.name, self._clock, self._observer, Phase.ADOPTING, details or listed)
                slot.unusable = surplus or not usable[listed.name]
                unknown.append(slot)
            elif details is not None and not usable[listed.name]:
                self._log.warn("the metadata of {name} was changed", name=listed.name)
                slot.unusable = True
                slot.wake(wanted=False)
        self._add(*unknown)
        self._machines_known = True
        self.rebalance()

    def rebalance(self) -> None:
        """
        Wake and create machines for the queue, according to `plan`.

        A nested call, which an action may cause, takes effect after the present plan is carried out.
        """
        self._rebalance_again = True
        if self._rebalancing:
            return
        self._rebalancing = True
        try:
            while self._rebalance_again and not self._closing:
                self._rebalance_again = False
                self._carry_out_plan()
        finally:
            self._rebalancing = False

    def _carry_out_plan(self) -> None:
        slots = {slot.name: slot for slot in self._slots}
        constraints = Constraints(
            machines_known=self._machines_known,
            create_backoff=self._create_backoff.active,
            standby_backoff=self._standby_backoff.active or self._standby_timer is not None,
            rate_limited=self._create_rate_limited,
        )
        states = [_state(slot) for slot in self._slots]
        actions, shortage = plan(states, len(self._queue), self._config, constraints)
        if not shortage:
            self._create_rate_limited = False
        for action in actions:
            match action:
                case Wake(name):
                    slots[name].wake(wanted=True)
                case Create():
                    name = machine_name(self._config.name, self._random)
                    self._add(Slot(name, self._clock, self._observer))

    def _in_phase(self, *phases: Phase) -> list[Slot]:
        return [slot for slot in self._slots if slot.phase in phases]

    # The lifecycle of a slot.

    def _add(self, *slots: Slot) -> None:
        """Add all slots before the lifecycle of the first one begins, so that it sees them."""
        added = {slot: Deferred[None]() for slot in slots}
        self._slots |= added
        for slot, removed in added.items():
            self._begin(slot, removed)

    def _begin(self, slot: Slot, removed: Deferred[None]) -> None:
        def remove(_: object) -> None:
            del self._slots[slot]
            removed.callback(None)
            self.rebalance()

        lifecycle = Deferred.fromCoroutine(self._run_lifecycle(slot))
        lifecycle.addErrback(
            lambda failure: self._log.failure("in the lifecycle of {name}", failure, name=slot.name)
        )
        lifecycle.addCallback(remove)

    async def _run_lifecycle(self, slot: Slot) -> None:
        """Create or adopt the machine, use it until it is no longer usable, and destroy it."""
        try:
            if slot.phase is Phase.CREATING:
                await self._lifecycle.create(slot)
                if self._create_rate_limited:
                    self.rebalance()
                await self._serve(slot)
            elif not slot.unusable:
                await self._lifecycle.adopt(slot)
                await self._lifecycle.stop(slot)
            while await self._wait_until_wanted(slot):
                await self._lifecycle.start(slot)
                await self._serve(slot)
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("giving up on {name}: {error}", name=slot.name, error=error)
            self._create_backoff.failed()
            if isinstance(error, RateLimitedError):
                self._create_rate_limited = True
            elif isinstance(error, (UnavailableError, DeadlineExceededError)):
                self._reconciler.check_soon()
        else:
            if self._closing and not self._destroying and not slot.unusable:
                return
        await self._retire(slot)

    async def _serve(self, slot: Slot) -> None:
        """Wait until the machine is ready, allocate it to the next request until its release, and stop it."""
        started_at = self._clock.seconds()
        await self._lifecycle.wait_until_ready(slot)
        self._create_backoff.succeeded()
        ready_at = self._clock.seconds()
        wanted = await self._standby.wait_for_work(slot)
        standby_time = self._clock.seconds() - ready_at
        is_leased = self._is_leased(slot, self._config.max_req_time)
        serves = wanted and is_leased and len(self._queue) > 0
        if serves:
            slot.transition_to(Phase.RUNNING)
            released: Deferred[None] = Deferred()
            self._queue.assign(Allocation(slot.machine, released))
            await released
        if self._destroying:
            return
        slot.transition_to(Phase.STOPPING)
        self.rebalance()
        await self._lifecycle.stop(slot)
        if serves:
            self._record_turnaround(self._clock.seconds() - started_at - standby_time)

    def _record_turnaround(self, seconds: float) -> None:
        self._turnarounds += 1
        change = min(seconds, self._max_turnaround) - self._mean_turnaround
        self._mean_turnaround += change / min(self._turnarounds, _TURNAROUND_WINDOW)

    @property
    def _max_turnaround(self) -> float:
        return self._config.max_req_time + self._config.timeouts.stop

    def _is_leased(self, slot: Slot, seconds: float) -> bool:
        """Return whether the lease lasts for `seconds`. It may have expired while the process was stopped."""
        return slot.lease_end - self._clock.seconds() >= seconds

    async def _wait_until_wanted(self, slot: Slot) -> bool:
        """
        Keep the machine stopped until a request needs it, and return True.

        Return False if the machine is to be retired: it is unusable, its lease ends, or the pool closes.
        """
        timeout = slot.lease_end - self._clock.seconds() - 2 * self._config.max_req_time
        if self._closing or slot.unusable or timeout <= 0:
            return False
        slot.transition_to(Phase.STOPPED)
        wakeup = slot.park()
        timer = self._clock.callLater(timeout, lambda: slot.wake(wanted=False))
        self.rebalance()
        try:
            wanted = await wakeup
        finally:
            if timer.active():
                timer.cancel()
        if wanted:
            slot.transition_to(Phase.STARTING)
        return wanted

    async def _retire(self, slot: Slot) -> None:
        """Destroy the machine, which keeps its slot until then."""
        slot.transition_to(Phase.DESTROYING)
        self.rebalance()
        if slot.known_machine is None:
            return
        try:
            await self._lifecycle.destroy(slot)
        except LeaseLostError as error:
            self._log.warn("{error}", error=error)
        except DestroyTimeoutError as error:
            self._log.error("{error}", error=error)


def _state(slot: Slot) -> SlotState:
    # Positional arguments are faster, and this is called for every slot several times per request.
    return SlotState(
        slot.name,
        slot.phase,
        slot.lease_end,
        slot.wakeup is not None,
        slot.known_machine is None and slot.create_unknown_since is None,
    )
