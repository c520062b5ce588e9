"""Faults that are injected into processes at random moments."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


class Fault(enum.Enum):
    """One kind of fault. To stop a process is to send SIGSTOP."""

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


def deal(rng: random.Random) -> Iterator[Fault]:
    """Yield faults in random order, each kind once before any is repeated."""
    while True:
        yield from rng.sample(list(Fault), k=len(Fault))
