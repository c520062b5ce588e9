"""
The state of the emulated Machines API: machines with their states, leases and rate limits, on a clock.

A `MachineBackend` runs the machines. Nothing here opens a socket or starts a process.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError, ignore_cancellation
from bfaas.machines.api import (
    EndedError,
    Lease,
    LeaseHeldError,
    Machine,
    MachineConfig,
    MachinesAPI,
    NameTakenError,
    NotFoundError,
    NotReadyError,
    State,
    WaitTimeoutError,
    has_ended,
)
from bfaas.machines.emulator.backend import MachineBackend, NullBackend
from bfaas.machines.emulator.rate_limits import RateLimiter, Unlimited

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from twisted.internet.interfaces import IDelayedCall, IReactorTime


_GONE = (State.DESTROYING, State.DESTROYED)
_OWNER = "local@tokens.fly.io"  # on Fly, a UUID in place of "local", or the address of a user


@dataclass(frozen=True)
class Timing:
    """
    Durations of the emulator, in seconds.

    `boot` and `stop` are how long these take. Within `stop_cooldown` after a stop, a start is rejected.
    Within `tombstone_ttl` after its destruction, a machine can still be read.
    """

    boot: float = 0.0
    stop: float = 0.0
    stop_cooldown: float = 0.0
    tombstone_ttl: float = 60.0


@dataclass(eq=False)
class _Entry:
    """
    A machine with its hidden state.

    Everything that cancels a boot or resume in progress increases `generation`. `watchers` fire at the next
    change of the state.
    """

    machine: Machine
    config: MachineConfig
    lease: Lease | None = None
    cooldown_until: float = 0.0
    generation: int = 0
    migrates_at_start: bool = False
    watchers: list[Deferred[None]] = field(default_factory=list)


class EmulatedMachines(MachinesAPI):
    """
    Machines of one app, in memory.

    `clock` schedules what takes time. `wall_clock` returns the time for leases, in seconds since the epoch.
    `random` generates ids and nonces. With `rate_limited`, calls have Fly's rate limits.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        wall_clock: Callable[[], float],
        backend: MachineBackend | None = None,
        timing: Timing | None = None,
        random: Random | None = None,
        *,
        rate_limited: bool = False,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._backend: MachineBackend = backend or NullBackend()
        self._timing = timing or Timing()
        self._random = random or SystemRandom()
        self._limits = RateLimiter(clock) if rate_limited else Unlimited()
        self._entries: dict[str, _Entry] = {}
        self._tasks: set[Deferred[None]] = set()
        self._tombstones: dict[str, IDelayedCall] = {}

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """Create a machine with a unique name, and begin to boot it."""
        self._limits.acquire("create")
        for entry in self._entries.values():
            if entry.machine.name == name and not _is_gone(entry):
                machine_id = entry.machine.id
                raise NameTakenError(
                    f"unique machine name violation, machine ID {machine_id} already exists with name "
                    f'"{name}"',
                    machine_id,
                )
        machine = Machine(
            id=self._hex(14),
            name=name,
            state=State.CREATED,
            region=region,
            image=config.image,
            metadata=dict(config.metadata),
            instance_id=self._ulid(),
            created_at=self._wall_clock(),
            url=self._backend.allocate_url(),
        )
        entry = self._entries[machine.id] = _Entry(machine, config)
        lease = Lease(self._hex(12), self._wall_clock() + lease_ttl, _OWNER)
        entry.lease = lease if lease_ttl > 0 else None
        self._run_in_background(self._boot(entry))
        return machine, lease

    async def list(self) -> list[Machine]:
        """Return every machine that is not destroyed."""
        self._limits.acquire("list")
        return [entry.machine for entry in self._entries.values() if not _is_gone(entry)]

    async def get(self, machine_id: str) -> Machine:
        """Return one machine. A destroyed machine is still found for a while."""
        self._limits.acquire("get", machine_id)
        return self.look_up(machine_id)

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        """Begin to boot a stopped machine, or to resume a suspended one."""
        entry = self._require_lease("start", machine_id, nonce)
        state = entry.machine.state
        if state is State.SUSPENDED:
            self._run_in_background(self._resume(entry))
        elif state is State.STARTED:
            return True
        elif state not in (State.STOPPED, State.FAILED):
            raise NotReadyError(f"unable to start machine from current state: '{state}'")
        elif self._clock.seconds() < entry.cooldown_until:
            raise NotReadyError("machine still active, refusing to start")
        else:
            if migrates := entry.migrates_at_start:
                entry.machine = replace(entry.machine, instance_id=self._ulid())
                entry.migrates_at_start = False
            self._run_in_background(self._boot(entry))
            return migrates
        return False

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        """Begin to stop a machine, in any state."""
        entry = self._require_lease("stop", machine_id, nonce)
        if entry.machine.state not in (State.STOPPED, State.STOPPING):
            self._run_in_background(self._stop(entry))

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Begin to suspend a started machine."""
        entry = self._require_lease("suspend", machine_id, nonce)
        if entry.machine.state is not State.STARTED:
            raise NotReadyError(f"unable to suspend machine from current state: '{entry.machine.state}'")
        self._run_in_background(self._suspend(entry))

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """
        Wait for a state of the version that `machine` names; states of other versions do not count.

        Only a wait for `STARTED` raises `EndedError`; the others time out.
        """
        deadline = Deadline(self._clock, timeout)
        entry = self._entries.get(machine.id)
        last = (State.DESTROYED,) if state is State.DESTROYED else _GONE
        while entry is not None and not (
            self._has_reached(entry, machine, state) or entry.machine.state in last
        ):
            if state is State.STARTED and has_ended(entry.machine.state, state):
                raise EndedError(f"{state}, currently {entry.machine.state}")
            change: Deferred[None] = Deferred(entry.watchers.remove)
            entry.watchers.append(change)
            try:
                await deadline.run(change)
            except DeadlineExceededError:
                raise WaitTimeoutError(f"{state}, currently {entry.machine.state}") from None
        if state is not State.DESTROYED and (entry is None or _is_gone(entry)):
            raise NotFoundError("machine not found")

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Begin to destroy a machine, in any state."""
        entry = self._require_lease("destroy", machine_id, nonce)
        self._run_in_background(self._destroy(entry))

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """Acquire the lease on a machine."""
        entry = self._require_lease("lease", machine_id, None)
        entry.lease = Lease(self._hex(12), self._wall_clock() + ttl, _OWNER, description)
        return entry.lease

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Extend a lease."""
        entry = self._require_lease("lease", machine_id, nonce)
        lease = self._current_lease(entry)
        if lease is None:
            raise LeaseHeldError(f"machine ID {machine_id} has no lease with this nonce")
        entry.lease = replace(lease, expires_at=self._wall_clock() + ttl)
        return entry.lease

    async def get_lease(self, machine_id: str) -> Lease:
        """Return the lease in force."""
        self._limits.acquire("get-lease", machine_id)
        lease = self._current_lease(self._entry(machine_id))
        if lease is None:
            raise NotFoundError("lease not found")
        return lease

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Release a lease."""
        self._require_lease("lease", machine_id, nonce).lease = None

    # Beyond the protocol `MachinesAPI`.

    def look_up(self, machine_id: str) -> Machine:
        """Return one machine, as `get` does, but without a rate limit. Raises `NotFoundError`."""
        return self._entry(machine_id).machine

    def config_of(self, machine_id: str) -> MachineConfig:
        """Return the configuration that a machine was created with."""
        return self._entry(machine_id).config

    def set_metadata(self, machine_id: str, key: str, value: str | None) -> None:
        """Set one key of a machine's metadata, without the lease; None removes it."""
        entry = self._entry(machine_id)
        metadata = {**entry.machine.metadata, key: value}
        remaining = {key: value for key, value in metadata.items() if value is not None}
        entry.machine = replace(entry.machine, metadata=remaining)

    def migrate_at_start(self, machine_id: str) -> None:
        """Schedule a migration for the next start of a machine, which changes its version."""
        self._entry(machine_id).migrates_at_start = True

    async def shutdown(self) -> None:
        """Cancel everything in progress, kill all machines and forget them."""
        for deferred in list(self._tasks):
            deferred.cancel()
        for tombstone in self._tombstones.values():
            tombstone.cancel()
        self._tombstones.clear()
        kills = [Deferred.fromCoroutine(self._backend.kill(machine_id)) for machine_id in self._entries]
        await gatherResults(kills)
        self._entries.clear()

    def _entry(self, machine_id: str) -> _Entry:
        entry = self._entries.get(machine_id)
        if entry is None:
            raise NotFoundError("machine not found")
        return entry

    def _current_lease(self, entry: _Entry) -> Lease | None:
        """Return the lease in force; None if there is none or it has expired."""
        return entry.lease if entry.lease and entry.lease.expires_at > self._wall_clock() else None

    def _has_reached(self, entry: _Entry, known: Machine, state: State) -> bool:
        return entry.machine.state is state and known.instance_id in ("", entry.machine.instance_id)

    def _require_lease(self, action: str, machine_id: str, nonce: str | None) -> _Entry:
        """
        Check that an action is allowed: by its rate limit, and by the nonce if the machine is leased.

        Raises `RateLimitedError`, `NotFoundError` or `LeaseHeldError`.
        """
        self._limits.acquire(action, machine_id)
        entry = self._entry(machine_id)
        if _is_gone(entry):
            raise NotFoundError("machine not found")
        lease = self._current_lease(entry)
        if lease is not None and lease.nonce != nonce:
            raise LeaseHeldError(
                f"machine ID {machine_id} lease currently held by {lease.owner}, "
                f"expires at {datetime.fromtimestamp(lease.expires_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
            )
        return entry

    def _hex(self, digits: int) -> str:
        return f"{self._random.getrandbits(4 * digits):0{digits}x}"

    def _ulid(self) -> str:
        return "01" + "".join(self._random.choices("0123456789ABCDEFGHJKMNPQRSTVWXYZ", k=24))

    # Coroutines that take time, and run in the background.

    def _run_in_background(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        deferred = Deferred.fromCoroutine(work)
        self._tasks.add(deferred)
        deferred.addErrback(ignore_cancellation)
        deferred.addErrback(
            lambda failure: self._log.failure("while changing the state of a machine", failure)
        )
        deferred.addCallback(lambda _: self._tasks.discard(deferred))

    def _set_state(self, entry: _Entry, state: State) -> None:
        entry.machine = replace(entry.machine, state=state)
        watchers, entry.watchers = entry.watchers, []
        for watcher in watchers:
            watcher.callback(None)

    async def _boot(self, entry: _Entry) -> None:
        """Boot a machine. A stop, a destruction or another boot that begins meanwhile cancels it."""
        entry.generation += 1
        generation = entry.generation

        def exited() -> None:
            if entry.generation == generation:
                self._run_in_background(self._stop(entry))

        if entry.machine.state is not State.CREATED:
            self._set_state(entry, State.STARTING)  # immediately, because a stop ignores stopped machines
        if self._timing.boot:
            await deferLater(self._clock, self._timing.boot / 2)
        if entry.generation != generation:
            return
        self._set_state(entry, State.STARTING)
        if self._timing.boot:
            await deferLater(self._clock, self._timing.boot / 2)
        if entry.generation != generation:
            return
        state = await self._start_backend(entry, exited)
        if entry.generation == generation:
            self._set_state(entry, state)

    async def _start_backend(self, entry: _Entry, exited: Callable[[], None]) -> State:
        """Start the process of a machine. Return the resulting state."""
        try:
            await self._backend.start(entry.machine, entry.config, exited)
        except OSError as error:
            self._log.error("cannot start {name}: {error}", name=entry.machine.name, error=error)
            return State.FAILED
        return State.STARTED

    async def _stop(self, entry: _Entry) -> None:
        entry.generation += 1
        self._set_state(entry, State.STOPPING)
        await self._backend.kill(entry.machine.id)
        if self._timing.stop:
            await deferLater(self._clock, self._timing.stop)
        entry.cooldown_until = self._clock.seconds() + self._timing.stop_cooldown
        if entry.machine.state is State.STOPPING:
            self._set_state(entry, State.STOPPED)

    async def _suspend(self, entry: _Entry) -> None:
        self._set_state(entry, State.SUSPENDING)
        state = State.SUSPENDED
        try:
            await self._backend.pause(entry.machine.id)
        except OSError as error:
            self._log.warn("cannot suspend {name}: {error}", name=entry.machine.name, error=error)
            state = State.STARTED
        if entry.machine.state is State.SUSPENDING:
            self._set_state(entry, state)

    async def _resume(self, entry: _Entry) -> None:
        """Resume a suspended machine, or boot it if that fails. A stop or a destruction cancels this."""
        self._set_state(entry, State.STARTING)
        generation = entry.generation
        try:
            await self._backend.resume(entry.machine.id)
        except OSError as error:
            if entry.generation != generation:
                return
            self._log.warn("cannot resume {name}, booting it: {error}", name=entry.machine.name, error=error)
            # So that the exit of the killed process does not count as a stop of the machine.
            entry.generation = generation = generation + 1
            await self._backend.kill(entry.machine.id)
            if entry.generation == generation:
                await self._boot(entry)
            return
        if entry.generation == generation:
            self._set_state(entry, State.STARTED)

    async def _destroy(self, entry: _Entry) -> None:
        entry.generation += 1
        self._set_state(entry, State.DESTROYING)
        await self._backend.kill(entry.machine.id)
        # Before the change, because that may resume a caller which shuts everything down.
        self._tombstones[entry.machine.id] = self._clock.callLater(
            self._timing.tombstone_ttl, self._forget, entry.machine.id
        )
        self._set_state(entry, State.DESTROYED)

    def _forget(self, machine_id: str) -> None:
        del self._entries[machine_id], self._tombstones[machine_id]


def _is_gone(entry: _Entry) -> bool:
    return entry.machine.state in _GONE
