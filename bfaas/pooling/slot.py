"""What a pool is told, and what it knows of each of its machines."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from bfaas.machines.api import Lease, Machine


class Phase(enum.Enum):
    """Where a slot of the pool is in its life."""

    CREATING = "creating"  # there may be a machine, or not yet
    ADOPTING = "adopting"  # an earlier instance left it; being wiped, whatever it was doing
    STOPPED = "stopped"  # stopped, confirmed; costs nothing, starts when wanted
    STARTING = "starting"  # on its way to a request, or to stand by
    READY = "ready"  # started and answering, no request yet
    SUSPENDED = "suspended"  # the same, but frozen, or about to be
    RESUMING = "resuming"  # on its way from there to a request
    RUNNING = "running"  # a request has it
    STOPPING = "stopping"  # used, and not to be used again until it is known to be stopped
    DESTROYING = "destroying"  # being destroyed; has its place until that is done


PhaseObserver = Callable[[Phase, Phase, float], None]
"""Is told of a phase that a machine has left, of the one that it is in now, and how many seconds it took."""


@dataclass(eq=False)
class Slot:
    """
    A place in the pool, and the machine that fills it.

    `phase_since` is when its phase began. `lease_end` is counted from before the lease was asked for.
    `create_unknown_since` is
    when an attempt to create it ended whose outcome is not known. `unusable` means that the machine must not
    be used again. `wakeup` is what its life waits for while it is idle or stands by: True when it is wanted,
    False when it is to end.
    """

    name: str
    clock: IReactorTime
    watch: PhaseObserver
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
        """Go on to another phase of its life, if it is in another."""
        if phase is not self.phase:
            now = self.clock.seconds()
            self.watch(self.phase, phase, now - self.phase_since)
            self.phase, self.phase_since = phase, now

    @property
    def machine(self) -> Machine:
        """The machine, in a phase in which there is one."""
        assert self.known_machine is not None, self.name  # noqa: S101 - phases after CREATING have one
        return self.known_machine

    @property
    def nonce(self) -> str | None:
        """What proves that the machine is leased to us."""
        return self.lease.nonce if self.lease else None

    def park(self) -> Deferred[bool]:
        """Wait until somebody wakes it."""
        woken = self.wakeup = Deferred()
        return woken

    def wake(self, *, wanted: bool) -> None:
        """End its rest, if it rests."""
        if self.wakeup is not None:
            woken, self.wakeup = self.wakeup, None
            woken.callback(wanted)
