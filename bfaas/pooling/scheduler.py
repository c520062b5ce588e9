"""The interface that the pool provides to its parts: reports to the pool, and decisions of the pool."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bfaas.machines.api import Machine
    from bfaas.pooling.slot import Slot


class StandbyAction(enum.Enum):
    """What a machine that is ready does next."""

    WAIT = "wait"  # remain in warm standby
    SERVE = "serve"  # take the next request; stop if there is none
    RETIRE = "retire"  # stop: it is unusable, or the pool closes


class Inspected(NamedTuple):
    """
    A machine of this pool, found by the reconciler.

    `listed` is from the list, which may lack its metadata; `details` is from an inspection of this machine,
    None if that failed.
    """

    listed: Machine
    details: Machine | None


class Scheduler(Protocol):
    """Decides what slots are for. The pool implements it."""

    def next_action(self, slot: Slot) -> StandbyAction:
        """Return what a ready machine does next. The scheduler wakes the slot when that changes."""
        ...

    def reconcile(self, machines: Sequence[Inspected]) -> None:
        """Compare the slots with all machines of this pool that exist."""
        ...

    def rebalance(self) -> None:
        """Wake and create machines for the queue."""
        ...
