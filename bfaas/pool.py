"""
The pool: machines on demand, each for one request at a time, wiped in between.

Requests wait in line for machines, their clients taking turns; only the pool creates, starts, stops and
destroys them, so that a request which is cancelled strands nothing. Each machine's life is one coroutine,
`_run_lifecycle`, from its creation to its end. What a request gets is an `Allocation`, which ends exactly
once.

A machine belongs to the pool that its name says, since a name cannot be changed from inside a machine. Its
metadata says so too, for whoever reads it, but proves nothing.
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
from bfaas.pooling.reconciler import Reconciler
from bfaas.pooling.slot import Phase, PhaseObserver, Slot
from bfaas.pooling.standby import Standby, StandbyAction

if TYPE_CHECKING:
    from random import Random

    from twisted.internet.interfaces import IReactorTime

    from bfaas.pooling.lifecycle import Probe
    from bfaas.pooling.reconciler import Inspected


_TAKEN = (Phase.RUNNING, Phase.STOPPING, Phase.DESTROYING)
"""Phases of machines that have to come free before they can serve a request."""


class PoolClosedError(Exception):
    """The pool gives out no machines any more."""


class Allocation:
    """A machine in use: started, ready, wiped before. `release` gives it back, exactly once, at once."""

    def __init__(self, machine: Machine, released: Deferred[None]) -> None:
        self.machine = machine
        self._released: Deferred[None] | None = released

    def release(self) -> None:
        """Give the machine back; the pool wipes it in the background."""
        if self._released is None:
            raise RuntimeError(f"machine {self.machine.id} was released before")
        released, self._released = self._released, None
        released.callback(None)


class Pool:
    """
    Up to `size` machines, shared by the requests of one coordinator.

    `probe` waits until the worker on a machine that has started takes requests. `watch` is told what phases
    its machines go through.
    """

    _log = Logger()

    def __init__(
        self,
        api: MachinesAPI,
        probe: Probe,
        clock: IReactorTime,
        random: Random,
        settings: PoolConfig,
        watch: PhaseObserver = lambda _left, _entered, _seconds: None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._random = random
        self._watch = watch
        backoff = JitteredBackoff(clock, random)
        self._lifecycle = MachineLifecycle(api, probe, clock, backoff, settings)
        self._reconciler = Reconciler(api, clock, random, settings, backoff, self._reconcile)
        self._slots: dict[Slot, Deferred[None]] = {}
        self._queue: FairQueue[Allocation] = FairQueue()
        self._mean_turnaround, self._turns = 0.0, 0
        self._reclaimed = False
        self._create_rate_limited = False
        self._create_backoff = Backoff(clock, backoff, self._balance)
        self._standby_backoff = Backoff(clock, backoff, self._balance)
        self._standby = Standby(
            self._lifecycle,
            self._standby_backoff,
            self._next_action,
            suspend_standby=settings.suspend_standby,
        )
        self._closing = False
        self._destroys = False

    def start(self) -> None:
        """Reclaim the machines of this pool's earlier instances, then clean from time to time."""
        self._reconciler.start()

    # What requests see.

    @property
    def queue_depth_ahead(self) -> int:
        """How many machines have to come free before one more request is served; 0 where none has to."""
        return max(0, len(self._queue) + 1 - (self._settings.size - len(self._in_phase(*_TAKEN))))

    @property
    def expected_wait(self) -> float:
        """
        Estimate the seconds until so many machines have come free; 0 as long as nothing is known.

        A machine's turn begins with a start and ends with a confirmed stop. It is taken to last as long as
        the latest did: a mean, in which each new one counts for a fifth, and the first few for more. A turn
        under way that has taken longer already counts with its age, so that a pool which has never finished
        one does not guess. None counts for more than a request of full length and a stop.
        """
        taken = self._in_phase(*_TAKEN)
        now = self._clock.seconds()
        turns = [
            max(self._mean_turnaround, min(now - slot.phase_since, self._longest_turn)) for slot in taken
        ]
        turn = sum(turns) / len(turns) if turns else self._mean_turnaround
        return turn * self.queue_depth_ahead / self._settings.size

    @property
    def waiting(self) -> int:
        """How many requests wait for a machine."""
        return len(self._queue)

    @property
    def not_ready_reason(self) -> str | None:
        """What speaks against a machine for a request that comes now; None where nothing is known to."""
        if self._in_phase(Phase.READY):
            return None
        if not self._reclaimed:
            return "the pool has not listed its machines yet"
        if not self._reconciler.api_reachable:
            return "the Machines API is failing"
        if self._in_phase(Phase.STOPPED, Phase.SUSPENDED):
            return None
        # A creation whose answer was lost has its place until it is known, what has failed until it is gone.
        lost = any(slot.create_unknown_since is not None for slot in self._in_phase(Phase.CREATING))
        overdue = self._clock.seconds() - self._settings.timeouts.inspect
        stuck = (
            sum(slot.phase_since < overdue for slot in self._in_phase(Phase.DESTROYING))
            >= self._settings.size
        )
        return "machines cannot be started" if self._create_backoff.active or lost or stuck else None

    def count(self, phase: Phase) -> int:
        """How many slots are in a phase."""
        return len(self._in_phase(phase))

    def allocate(self, client: str) -> Deferred[Allocation]:
        """
        Wait in line for a machine, taking turns with other clients. Cancelling it leaves the line.

        Fails with `PoolClosedError` when the pool closes first.
        """
        place = self._queue.enqueue(client)
        self._balance()
        return place

    async def close(self) -> None:
        """Stop every machine, and leave it for the pool's next instance; waits for those in use."""
        self._closing = True
        self._lifecycle.close()
        self._reconciler.close()
        self._create_backoff.close()
        self._standby_backoff.close()
        self._queue.close(PoolClosedError)
        for slot in list(self._slots):
            slot.wake(wanted=False)
        await DeferredList(list(self._slots.values()), consumeErrors=True)

    async def destroy(self) -> None:
        """
        Destroy every machine of this pool, those included that it has lost sight of, instead of stopping it.

        Waits for those in use. Ends after `max_req_time` and `limits.exit` in any case.
        """
        self._destroys = True
        limits = self._settings.timeouts
        longest = self._settings.max_req_time + limits.exit - limits.destroy
        await Deadline(self._clock, longest).run(self.close())  # cancelled, it waits no longer
        for slot in self._slots:
            self._log.error("{name} is not destroyed in time", name=slot.name)
        try:
            await Deadline(self._clock, limits.destroy).run(self._reconciler.destroy_all_own())
        except (MachinesError, DeadlineExceededError) as error:
            self._log.error("cannot tell whether a machine is left: {error}", error=error)

    # The line, and what it takes to serve it.

    def _balance(self) -> None:
        """Set machines on their way, as many as requests are short of."""
        if self._closing:
            return
        for slot in self._in_phase(Phase.READY)[: len(self._queue)]:
            slot.wake(wanted=True)
        asleep = sorted(self._in_phase(Phase.SUSPENDED), key=lambda slot: slot.wakeup is None)
        for slot in asleep[: max(0, len(self._queue) - self.count(Phase.RESUMING))]:
            slot.wake(wanted=True)
        others = self._in_phase(Phase.STOPPED, Phase.RUNNING, Phase.STOPPING, Phase.DESTROYING)
        ready = len(self._slots) - len(others)  # or on their way
        holds_back = self._create_backoff.active or self._standby_backoff.active
        short = len(self._queue) + (0 if holds_back else self._settings.standby) - ready
        for slot in sorted(self._in_phase(Phase.STOPPED), key=lambda slot: -slot.lease_end)[: max(0, short)]:
            slot.wake(wanted=True)
            short -= 1
        while short > 0 and len(self._slots) < self._settings.size and self._may_create():
            self._add(Slot(machine_name(self._settings.name, self._random), self._clock, self._watch))
            short -= 1
        self._create_rate_limited = self._create_rate_limited and short > 0

    def _in_phase(self, *phases: Phase) -> list[Slot]:
        return [slot for slot in self._slots if slot.phase in phases]

    def _may_create(self) -> bool:
        """
        Not before we know what is there already, and not in the pause after a failure.

        And one at a time while the app is at its limit, of one a second, which all its coordinators share.
        """
        asked = [slot for slot in self._in_phase(Phase.CREATING) if slot.known_machine is None]
        if self._create_rate_limited and any(slot.create_unknown_since is None for slot in asked):
            return False
        return self._reclaimed and not self._create_backoff.active

    def _add(self, *slots: Slot) -> None:
        """Give each a place, and only then let them begin to live."""
        self._slots |= (places := {slot: Deferred[None]() for slot in slots})
        for slot, gone in places.items():
            self._begin(slot, gone)

    def _begin(self, slot: Slot, gone: Deferred[None]) -> None:
        def leave(_: object) -> None:
            del self._slots[slot]
            gone.callback(None)
            self._balance()

        life = Deferred.fromCoroutine(self._run_lifecycle(slot))
        life.addErrback(lambda failure: self._log.failure("in the life of {name}", failure, name=slot.name))
        life.addCallback(leave)

    # A machine's life.

    async def _run_lifecycle(self, slot: Slot) -> None:
        """Get a machine, let it serve as long as it is good for it, and see it off."""
        try:
            if slot.phase is Phase.CREATING:
                await self._lifecycle.create(slot)
                if self._create_rate_limited:
                    self._balance()
                await self._serve(slot)
            elif not slot.unusable:
                await self._lifecycle.adopt(slot)
                await self._lifecycle.stop(slot)
            while await self._rest(slot):
                await self._lifecycle.start(slot)
                await self._serve(slot)
        except (MachinesError, DeadlineExceededError) as error:
            self._log.warn("gives up {name}: {error}", name=slot.name, error=error)
            self._create_backoff.failed()
            if isinstance(error, RateLimitedError):
                self._create_rate_limited = True
            elif isinstance(error, (UnavailableError, DeadlineExceededError)):
                self._reconciler.check_soon()
        else:
            if self._closing and not self._destroys and not slot.unusable:
                return
        await self._retire(slot)

    async def _serve(self, slot: Slot) -> None:
        """Give the machine to the request that is next, until it is released; then wipe it."""
        began = self._clock.seconds()
        await self._lifecycle.wait_until_ready(slot)
        self._create_backoff.succeeded()
        ready_at = self._clock.seconds()
        wanted = await self._standby.wait_for_work(slot)
        began += self._clock.seconds() - ready_at  # standing by is part of nobody's turn
        is_leased = self._is_leased(slot, self._settings.max_req_time)
        if serves := wanted and is_leased and len(self._queue) > 0:
            slot.transition_to(Phase.RUNNING)
            released: Deferred[None] = Deferred()
            self._queue.assign(Allocation(slot.machine, released))
            await released
        if self._destroys:
            return
        slot.transition_to(Phase.STOPPING)
        self._balance()
        await self._lifecycle.stop(slot)
        if serves:
            self._record_turnaround(self._clock.seconds() - began)

    def _next_action(self, slot: Slot) -> StandbyAction:
        """Say what a machine that is ready is to do."""
        if self._closing or slot.unusable:
            return StandbyAction.RETIRE
        others = [other for other in self._in_phase(Phase.READY, Phase.SUSPENDED) if other is not slot]
        if len(self._queue) > 0 or len(others) >= self._settings.standby:
            return StandbyAction.SERVE
        return StandbyAction.WAIT

    def _record_turnaround(self, seconds: float) -> None:
        self._turns += 1
        self._mean_turnaround += (min(seconds, self._longest_turn) - self._mean_turnaround) / min(
            self._turns, 5
        )

    @property
    def _longest_turn(self) -> float:
        return self._settings.max_req_time + self._settings.timeouts.stop

    def _is_leased(self, slot: Slot, seconds: float) -> bool:
        """Tell whether its lease lasts so long. A process that stood still wakes up with leases long over."""
        return slot.lease_end - self._clock.seconds() >= seconds

    async def _rest(self, slot: Slot) -> bool:
        """Wait until a request wants the machine. False when it is to end: its lease does, or the pool."""
        left = slot.lease_end - self._clock.seconds() - 2 * self._settings.max_req_time
        if self._closing or slot.unusable or left <= 0:
            return False
        slot.transition_to(Phase.STOPPED)
        woken = slot.park()
        timer = self._clock.callLater(left, lambda: slot.wake(wanted=False))
        self._balance()
        try:
            wanted = await woken
        finally:
            if timer.active():
                timer.cancel()
        if wanted:
            slot.transition_to(Phase.STARTING)
        return wanted

    async def _retire(self, slot: Slot) -> None:
        """Destroy the machine. Until that is done it has its place: it is there."""
        slot.transition_to(Phase.DESTROYING)
        self._balance()
        if slot.known_machine is None:
            return
        try:
            await self._lifecycle.destroy(slot)
        except LeaseLostError as error:
            self._log.warn("{error}", error=error)
        except DestroyTimeoutError as error:
            self._log.error("{error}", error=error)

    # What cleaning finds.

    def _reconcile(self, machines: list[Inspected]) -> None:
        """
        Take note of all machines of this pool.

        One that we did not know has a place from now on, since it is there; if it is not to be used, or
        one too many, until it is gone. Not to be used is also one that could not be looked at.
        """
        known = {slot.name: slot for slot in self._slots}
        unknown: list[Slot] = []
        fit = {
            listed.name: seen is not None and self._settings.metadata_matches(seen)
            for listed, seen in machines
        }
        for listed, seen in sorted(machines, key=lambda pair: not fit[pair[0].name]):
            slot = known.get(listed.name)
            if slot is None:
                too_many = len(known) + len(unknown) >= self._settings.size
                place = Slot(listed.name, self._clock, self._watch, Phase.ADOPTING, seen or listed)
                place.unusable = too_many or not fit[listed.name]
                unknown.append(place)
            elif seen is not None and not fit[listed.name]:
                self._log.warn("somebody changed the metadata of {name}", name=listed.name)
                slot.unusable = True
                slot.wake(wanted=False)
        self._add(*unknown)
        self._reclaimed = True
        self._balance()
