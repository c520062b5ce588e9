"""A slot of the pool: one machine, its phase and its lease."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Lease, Machine


class Phase(enum.Enum):
    """The phase of a slot's lifecycle."""

    CREATING = "creating"  # the machine may exist or not
    ADOPTING = "adopting"  # left by an earlier instance of this pool; being stopped
    STOPPED = "stopped"  # confirmed; costs nothing, and can be started
    STARTING = "starting"  # for a request, or for warm standby
    READY = "ready"  # started, and its worker accepts requests; unused
    SUSPENDED = "suspended"  # ready, then suspended, or about to be
    RESUMING = "resuming"  # from suspension, for a request
    RUNNING = "running"  # allocated to a request
    STOPPING = "stopping"  # used; not used again before its stop is confirmed
    DESTROYING = "destroying"  # keeps its slot until it is destroyed


class PhaseObserver(Protocol):
    """Receives every phase change of a pool's slots."""

    def observe_phase(self, old: Phase, new: Phase, seconds: float) -> None:
        """Record that a slot went from phase `old`, in which it was for `seconds`, to phase `new`."""


class NullPhaseObserver(PhaseObserver):
    """Ignores phase changes."""

    def observe_phase(self, old: Phase, new: Phase, seconds: float) -> None:
        """Do nothing."""


@dataclass(eq=False)
class Slot:
    """
    One of the pool's `size` slots, and its machine.

    Times are seconds on `clock`. `phase_since` is when the phase began. `lease_end` is the earliest possible
    end of the lease, computed from the time of its request. `create_unknown_since` is when an
    attempt to create the machine ended with an unknown outcome. A machine that is `unusable` must not serve.
    `wakeup` is set while the slot is parked: it fires with True when the machine is wanted, and with False
    when it is to be retired.
    """

    name: str
    clock: IReactorTime
    observer: PhaseObserver
    phase: Phase = Phase.CREATING
    known_machine: Machine | None = None
    lease: Lease | None = None
    lease_end: float = 0.0
    create_unknown_since: float | None = None
    unusable: bool = False
    wakeup: Deferred[bool] | None = None

    def __post_init__(self) -> None:
        self.phase_since = self.clock.seconds()

    def transition_to(self, phase: Phase) -> None:
        """Change the phase, and notify the observer; do nothing if it is the same."""
        if phase is not self.phase:
            now = self.clock.seconds()
            self.observer.observe_phase(self.phase, phase, now - self.phase_since)
            self.phase, self.phase_since = phase, now

    @property
    def machine(self) -> Machine:
        """The machine. Every phase after `CREATING` has one."""
        if self.known_machine is None:
            raise RuntimeError(f"{self.name} has no machine yet")
        return self.known_machine

    @property
    def nonce(self) -> str | None:
        """The nonce of the pool's lease on the machine; None without a lease."""
        return self.lease.nonce if self.lease else None

    def park(self) -> Deferred[bool]:
        """Wait for `wake`; return whether the machine is wanted."""
        self.wakeup = Deferred()
        return self.wakeup

    def wake(self, *, wanted: bool) -> None:
        """End `park`; do nothing if the slot is not parked."""
        if self.wakeup is not None:
            wakeup, self.wakeup = self.wakeup, None
            wakeup.callback(wanted)
