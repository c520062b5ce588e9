"""
The Machines API's rules on a clock: states, leases, limits; machines without bodies.

A body, where there is one, is given by whoever implements `MachineBackend`. Everything here happens in the
order in which it was asked for, without a socket or a process.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError
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

    from twisted.internet.interfaces import IReactorTime


_OWNER = "local@tokens.fly.io"  # Fly has a UUID in place of "local", or a user's address


@dataclass(frozen=True)
class Timing:
    """
    How long things take, in seconds.

    `rest` is the time after a stop in which a start is refused. `memory` is how long a destroyed machine
    can still be looked at.
    """

    boot: float = 0.0
    stop: float = 0.0
    stop_cooldown: float = 0.0
    tombstone_ttl: float = 60.0


@dataclass(eq=False)
class _Entry:
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

    `clock` drives what takes time, `wall` tells the time that leases end by, in seconds since the epoch.
    `random` makes ids and nonces.
    With `rate_limited`, calls are refused as Fly refuses them: beyond one a second and three at once for
    each action on each machine (on the app, for creations and lists), five and ten for looks at a machine.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        wall: Callable[[], float],
        backend: MachineBackend | None = None,
        timing: Timing | None = None,
        random: Random | None = None,
        *,
        rate_limited: bool = False,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._backend: MachineBackend = backend or NullBackend()
        self._timing = timing or Timing()
        self._random = random or SystemRandom()
        self._limits = RateLimiter(clock) if rate_limited else Unlimited()
        self._entries: dict[str, _Entry] = {}
        self._tasks: set[Deferred[None]] = set()

    # The protocol.

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """Make a machine under a unique name; it boots by itself."""
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
            created_at=self._wall(),
            url=self._backend.allocate_url(),
        )
        entry = self._entries[machine.id] = _Entry(machine, config)
        lease = Lease(self._hex(12), self._wall() + lease_ttl, _OWNER)
        entry.lease = lease if lease_ttl > 0 else None
        self._run_in_background(self._boot(entry))
        return machine, lease

    async def list(self) -> list[Machine]:
        """Tell every machine that is not destroyed."""
        self._limits.acquire("list")
        return [entry.machine for entry in self._entries.values() if not _is_gone(entry)]

    async def get(self, machine_id: str) -> Machine:
        """Look at one machine."""
        self._limits.acquire("get", machine_id)
        return self._entry(machine_id).machine

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        """Boot a stopped machine, thaw a suspended one."""
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
        """End a machine's body, in whatever state it is."""
        entry = self._require_lease("stop", machine_id, nonce)
        if entry.machine.state not in (State.STOPPED, State.STOPPING):
            self._run_in_background(self._stop(entry))

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Freeze a machine that runs."""
        entry = self._require_lease("suspend", machine_id, nonce)
        if entry.machine.state is not State.STARTED:
            raise NotReadyError(f"unable to suspend machine from current state: '{entry.machine.state}'")
        self._run_in_background(self._suspend(entry))

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """Wait for a state of the version that `machine` names; that of another is not seen."""
        deadline = Deadline(self._clock, timeout)
        entry = self._entries.get(machine.id)
        while entry is not None and not self._has_reached(entry, machine, state) and not _is_gone(entry):
            if state is State.STARTED and has_ended(entry.machine.state, state):
                raise EndedError(f"{state}, currently {entry.machine.state}")
            change: Deferred[None] = Deferred(entry.watchers.remove)
            entry.watchers.append(change)
            try:
                await deadline.run(change)
            except DeadlineExceededError:
                told = f"{state}, currently {entry.machine.state}"
                raise WaitTimeoutError(told) from None
        if state is not State.DESTROYED and (entry is None or _is_gone(entry)):
            raise NotFoundError("machine not found")

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """End a machine for good, in whatever state it is."""
        entry = self._require_lease("destroy", machine_id, nonce)
        self._run_in_background(self._destroy(entry))

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """Take a free lease."""
        entry = self._require_lease("lease", machine_id, None)
        entry.lease = Lease(self._hex(12), self._wall() + ttl, _OWNER, description)
        return entry.lease

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Make our lease last longer."""
        entry = self._require_lease("lease", machine_id, nonce)
        if self._current_lease(entry) is None or entry.lease is None:
            raise LeaseHeldError(f"machine ID {machine_id} has no lease with this nonce")
        entry.lease = replace(entry.lease, expires_at=self._wall() + ttl)
        return entry.lease

    async def get_lease(self, machine_id: str) -> Lease:
        """Tell the lease in force."""
        self._limits.acquire("get-lease", machine_id)
        lease = self._current_lease(self._entry(machine_id))
        if lease is None:
            raise NotFoundError("lease not found")
        return lease

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Give a lease back."""
        self._require_lease("lease", machine_id, nonce).lease = None

    # What a host of machines can do besides.

    def config_of(self, machine_id: str) -> MachineConfig:
        """Tell what a machine was made from."""
        return self._entry(machine_id).config

    def set_metadata(self, machine_id: str, key: str, value: str | None) -> None:
        """Change one key of a machine's metadata, as the machine itself can; None removes it."""
        entry = self._entry(machine_id)
        metadata = {**entry.machine.metadata, key: value}
        kept = {key: value for key, value in metadata.items() if value is not None}
        entry.machine = replace(entry.machine, metadata=kept)

    def migrate_at_start(self, machine_id: str) -> None:
        """Have the machine's next start move it to another host: it is another version from then on."""
        self._entry(machine_id).migrates_at_start = True

    async def shutdown(self) -> None:
        """End all bodies and everything that is under way; the machines are forgotten."""
        for deferred in list(self._tasks):
            deferred.cancel()
        for machine_id in list(self._entries):
            await self._backend.kill(machine_id)
        self._entries.clear()

    # Rules.

    def _entry(self, machine_id: str) -> _Entry:
        entry = self._entries.get(machine_id)
        if entry is None:
            raise NotFoundError("machine not found")
        return entry

    def _current_lease(self, entry: _Entry) -> Lease | None:
        """Tell the lease in force; one that has run out is none."""
        return entry.lease if entry.lease and entry.lease.expires_at > self._wall() else None

    def _has_reached(self, entry: _Entry, known: Machine, state: State) -> bool:
        return entry.machine.state is state and known.instance_id in ("", entry.machine.instance_id)

    def _require_lease(self, action: str, machine_id: str, nonce: str | None) -> _Entry:
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

    # What takes time.

    def _run_in_background(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        deferred = Deferred.fromCoroutine(work)
        self._tasks.add(deferred)
        deferred.addErrback(lambda failure: failure.trap(CancelledError) and None)
        deferred.addErrback(lambda failure: self._log.failure("in a machine's life", failure))
        deferred.addCallback(lambda _: self._tasks.discard(deferred))

    def _set_state(self, entry: _Entry, state: State) -> None:
        entry.machine = replace(entry.machine, state=state)
        watchers, entry.watchers = entry.watchers, []
        for watcher in watchers:
            watcher.callback(None)

    async def _boot(self, entry: _Entry) -> None:
        """Bring a machine up; a stop, a destruction or another boot in the meantime voids this one."""
        entry.generation += 1
        number = entry.generation

        def exited() -> None:
            if entry.generation == number:
                self._run_in_background(self._stop(entry))

        if entry.machine.state is not State.CREATED:
            self._set_state(entry, State.STARTING)  # at once, so that a stop finds something to stop
        for state in (State.STARTING, State.STARTED):
            if self._timing.boot:
                await deferLater(self._clock, self._timing.boot / 2)
            if state is State.STARTED and entry.generation == number:
                state = await self._start_backend(entry, exited)  # noqa: PLW2901 - or what came of it
            if entry.generation != number:
                return
            self._set_state(entry, state)

    async def _start_backend(self, entry: _Entry, exited: Callable[[], None]) -> State:
        try:
            await self._backend.start(entry.machine, entry.config, exited)
        except OSError as error:
            self._log.error("{name} does not boot: {error}", name=entry.machine.name, error=error)
            return State.FAILED
        return State.STARTED

    async def _stop(self, entry: _Entry) -> None:
        entry.generation += 1  # a boot that is under way is void
        self._set_state(entry, State.STOPPING)
        await self._backend.kill(entry.machine.id)
        if self._timing.stop:
            await deferLater(self._clock, self._timing.stop)
        entry.cooldown_until = self._clock.seconds() + self._timing.stop_cooldown
        if entry.machine.state is State.STOPPING:
            self._set_state(entry, State.STOPPED)

    async def _suspend(self, entry: _Entry) -> None:
        self._set_state(entry, State.SUSPENDING)
        await self._backend.pause(entry.machine.id)
        if entry.machine.state is State.SUSPENDING:
            self._set_state(entry, State.SUSPENDED)

    async def _resume(self, entry: _Entry) -> None:
        """Bring a machine back as it was, or, where that fails, by a cold boot."""
        self._set_state(entry, State.STARTING)
        number = entry.generation
        try:
            await self._backend.resume(entry.machine.id)
        except OSError as error:
            self._log.warn("{name} does not resume: {error}", name=entry.machine.name, error=error)
            entry.generation = number = number + 1  # the end of its body is not that of the machine
            await self._backend.kill(entry.machine.id)
            if entry.generation == number:
                await self._boot(entry)
            return
        if entry.machine.state is State.STARTING:
            self._set_state(entry, State.STARTED)

    async def _destroy(self, entry: _Entry) -> None:
        entry.generation += 1
        self._set_state(entry, State.DESTROYING)
        await self._backend.kill(entry.machine.id)
        self._set_state(entry, State.DESTROYED)
        await deferLater(self._clock, self._timing.tombstone_ttl)
        del self._entries[entry.machine.id]


def _is_gone(entry: _Entry) -> bool:
    return entry.machine.state in (State.DESTROYING, State.DESTROYED)
