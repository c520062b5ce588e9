"""
The decision which machines a pool wakes and creates for the requests in its queue.

`plan` is a pure function of a snapshot of the pool. The pool carries out the actions that it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bfaas.pooling.slot import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bfaas.pooling.config import PoolConfig

_NOT_AVAILABLE = (Phase.STOPPED, Phase.RUNNING, Phase.STOPPING, Phase.DESTROYING)
"""Phases of slots that are neither ready nor about to become ready."""


class SlotState(NamedTuple):
    """
    The properties of a slot that a plan depends on.

    `parked` is False while a `SUSPENDED` slot is still being suspended. `create_pending` matters while a slot
    is `CREATING`: the first attempt to create its machine has not returned.
    """

    name: str
    phase: Phase
    lease_end: float = 0.0
    parked: bool = True
    create_pending: bool = False


class Constraints(NamedTuple):
    """
    Reasons for a pool not to create or start machines now.

    `machines_known` is False until the machines of the pool's earlier instances are known. `create_backoff`
    and `standby_backoff` are True during the pauses after failures. `rate_limited` means that the app reached
    the API's limit, one creation a second, which all its coordinators share.
    """

    machines_known: bool = True
    create_backoff: bool = False
    standby_backoff: bool = False
    rate_limited: bool = False


class Wake(NamedTuple):
    """Wake the slot: its machine serves a request, or is started."""

    slot: str


class Create(NamedTuple):
    """Create a machine in a new slot."""


Action = Wake | Create


class Plan(NamedTuple):
    """Actions to carry out in order; `shortage` is how many more machines are needed, but not created now."""

    actions: tuple[Action, ...]
    shortage: int


def plan(slots: Sequence[SlotState], queue_length: int, config: PoolConfig, constraints: Constraints) -> Plan:
    """
    Return what to do so that every queued request gets a machine, and `config.standby` more are ready.

    Ready machines serve queued requests at once. If more are needed, suspended machines are resumed first,
    then stopped machines are started, then new ones are created, as far as the pool's size and constraints
    allow. Machines that are about to be ready count as ready. After a failed creation or standby, no machine
    is started for standby until the pause is over.
    """
    ready = _in_phase(slots, Phase.READY)[:queue_length]
    unserved = queue_length - len(ready)

    # Suspension takes some seconds; a slot that is still being suspended resumes by itself after that.
    suspended = sorted(_in_phase(slots, Phase.SUSPENDED), key=lambda slot: not slot.parked)
    resumed = suspended[: max(0, unserved - len(_in_phase(slots, Phase.RESUMING)))]

    paused = constraints.create_backoff or constraints.standby_backoff
    available = sum(slot.phase not in _NOT_AVAILABLE for slot in slots)
    shortage = max(0, queue_length + (0 if paused else config.standby) - available)

    # The longest lease first. The other leases then expire, and the pool shrinks when it is less busy.
    stopped = sorted(_in_phase(slots, Phase.STOPPED), key=lambda slot: -slot.lease_end)
    started = stopped[:shortage]
    shortage -= len(started)

    created = min(shortage, _max_creations(slots, config, constraints))
    return Plan(
        (*_wake(ready), *_wake(resumed), *_wake(started), *[Create()] * created),
        shortage - created,
    )


def _max_creations(slots: Sequence[SlotState], config: PoolConfig, constraints: Constraints) -> int:
    """Return how many machines may be created now: none before the existing ones are known."""
    if not constraints.machines_known or constraints.create_backoff:
        return 0
    free = max(0, config.size - len(slots))
    if constraints.rate_limited:
        pending = any(slot.create_pending for slot in _in_phase(slots, Phase.CREATING))
        return 0 if pending else min(free, 1)
    return free


def _in_phase(slots: Sequence[SlotState], phase: Phase) -> list[SlotState]:
    return [slot for slot in slots if slot.phase is phase]


def _wake(slots: Iterable[SlotState]) -> list[Action]:
    return [Wake(slot.name) for slot in slots]
