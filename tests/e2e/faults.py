"""What is done to a process, at a random moment."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


class Fault(enum.Enum):
    """One kind of it. To stop is SIGSTOP."""

    KILL_COORDINATOR = "a coordinator killed"
    PAUSE_COORDINATOR = "a coordinator stopped for a while"
    OUTLAST_LEASE = "a coordinator stopped for longer than its leases"
    KILL_WORKER = "a worker killed in a run"
    PAUSE_WORKER = "a worker stopped for a while in a run"
    FREEZE_WORKER = "a worker stopped for good in a run"
    KILL_API = "the API killed, and its machines with it"
    PAUSE_API = "the API stopped for a while"


COORDINATOR_FAULTS = (Fault.KILL_COORDINATOR, Fault.PAUSE_COORDINATOR, Fault.OUTLAST_LEASE)
WORKER_FAULTS = (Fault.KILL_WORKER, Fault.PAUSE_WORKER, Fault.FREEZE_WORKER)


def deal(chance: random.Random) -> Iterator[Fault]:
    """Deal faults like cards, so that each kind strikes once before any strikes again."""
    while True:
        yield from chance.sample(list(Fault), k=len(Fault))
