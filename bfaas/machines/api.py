"""
The boundary between the pool and whoever provides machines: values, a protocol and its errors, no logic.

The vocabulary is that of Fly's Machines API (https://fly.io/docs/machines/api/machines-resource/).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.StrEnum):
    """A machine's state, in the Machines API's words; one that we do not know reads as `UNKNOWN`."""

    CREATED = "created"
    STARTING = "starting"
    STARTED = "started"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    DESTROYING = "destroying"
    DESTROYED = "destroyed"
    FAILED = "failed"
    LAUNCH_FAILED = "launch_failed"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> State:  # noqa: ARG003 - the enum's own signature
        return cls.UNKNOWN


@dataclass(frozen=True)
class MachineConfig:
    """
    What a machine is made from: its image, its environment, its labels and its size.

    `idle_timeout` is how long Fly's proxy keeps a silent connection to the machine, in whole seconds.
    """

    image: str
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    cpus: int = 1
    memory_mb: int = 256
    idle_timeout: int = 60


@dataclass(frozen=True)
class Machine:
    """
    A machine as the API last described it.

    `instance_id` changes with every version of its config. `created_at` is in seconds since the epoch.
    `url` is where its worker listens when that is known to the provider (local machines); a Fly
    machine is reached through the proxy of its app instead, and has none.
    """

    id: str
    name: str
    state: State
    region: str
    image: str
    metadata: Mapping[str, str]
    instance_id: str
    created_at: float
    url: str | None = None


@dataclass(frozen=True)
class Lease:
    """
    The right to change a machine, held by whoever knows the nonce.

    `expires_at` is in seconds since the epoch, by the API's clock.
    """

    nonce: str
    expires_at: float
    owner: str = ""
    description: str = ""


_STOPPED = frozenset({State.STOPPED, State.FAILED, State.LAUNCH_FAILED})
_FAILED = frozenset({State.FAILED, State.LAUNCH_FAILED})


def has_ended(state: State, wanted: State) -> bool:
    """Return whether a machine in a state, once told to reach another, has ended before it did."""
    if wanted in (State.STARTED, State.SUSPENDED):
        return state in _STOPPED
    return wanted is State.STOPPED and state in _FAILED


class MachinesAPI(Protocol):
    """
    Machines of one app, and their leases.

    A call that changes a machine needs the nonce of its lease while one is held, and fails with
    `LeaseHeldError` otherwise. Durations are seconds. Every method may raise `MachinesError`.
    """

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """
        Make a machine under a unique name, leased at once; it starts by itself.

        Raises `NameTakenError` when a live machine has that name, `CapacityError` when there is no room.
        """
        ...

    async def list(self) -> list[Machine]:
        """
        Tell every machine of the app that is not destroyed; the answer may be stale.

        What comes from a machine's configuration, its image and metadata, may be left out.
        """
        ...

    async def get(self, machine_id: str) -> Machine:
        """Look at one machine. Raises `NotFoundError`."""
        ...

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        """
        Start it. Return True if what is known of the machine is stale and `get` is needed.

        That is so when the start moved it to another host, which gives it another `instance_id`, or when an
        earlier call, whose answer may be lost, had started it. Raises `NotReadyError` while the machine
        cannot be started, as in the moment after a stop.
        """
        ...

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        """Ask for its end by SIGKILL, without grace; right also when it is stopped already."""
        ...

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Ask to freeze it, memory and all; `start` thaws it. Raises `NotReadyError` unless it runs."""
        ...

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """
        Return when it has reached the state.

        Raises `WaitTimeoutError` after `timeout`, and before that `EndedError` when it is in a state that
        does not lead there, `NotFoundError` when it is destroyed.
        """
        ...

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy it in whatever state it is. Raises `NotFoundError` when it is gone already."""
        ...

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """Take a free lease. Raises `LeaseHeldError` when another holds it."""
        ...

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Let our lease last `ttl` from now; the nonce stays. Raises `LeaseHeldError` if it is not ours."""
        ...

    async def get_lease(self, machine_id: str) -> Lease:
        """Tell the lease in force, nonce included. Raises `NotFoundError` when there is none."""
        ...

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Give our lease back."""
        ...


@dataclass(frozen=True)
class Call:
    """The HTTP call that an error came of; `status` is None when there was no answer to read."""

    method: str
    path: str
    status: int | None = None
    excerpt: str = ""
    request_id: str | None = None


class MachinesError(Exception):
    """Something that was asked of a machine, or of the API as a whole, did not happen."""

    def __init__(self, message: str, call: Call | None = None) -> None:
        super().__init__(message)
        self.call = call


class NotFoundError(MachinesError):
    """There is no such machine, or no lease on it."""


class LeaseHeldError(MachinesError):
    """Another holds the lease, or ours has run out."""


class NotReadyError(MachinesError):
    """The machine's state does not allow it now; it may in a moment."""


class WaitTimeoutError(MachinesError):
    """The machine did not reach the state in time."""


class EndedError(MachinesError):
    """The machine has stopped or failed: by itself, it does not reach the state that was waited for."""


class CapacityError(MachinesError):
    """There is no room for a machine, where it was asked for."""


class RefusedError(MachinesError):
    """The request is wrong, or we are not allowed it; asking again does not help."""


class UnavailableError(MachinesError):
    """The API gave no usable answer. Whether it did what was asked is not known."""


class RateLimitedError(UnavailableError):
    """The API was asked too often. It did not do what was asked."""


class NameTakenError(MachinesError):
    """A live machine has this name already; `machine_id` says which one, where the API told."""

    def __init__(self, message: str, machine_id: str | None, call: Call | None = None) -> None:
        super().__init__(message, call)
        self.machine_id = machine_id
