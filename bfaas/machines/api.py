"""
The interface between the pool and providers of machines: value types, a protocol, and its errors.

The vocabulary is that of Fly's Machines API (https://fly.io/docs/machines/api/machines-resource/).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.StrEnum):
    """State of a machine, as named by the Machines API. Other names become `UNKNOWN`."""

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
    def _missing_(cls, value: object) -> State:  # noqa: ARG003 - the signature of Enum
        return cls.UNKNOWN


@dataclass(frozen=True)
class MachineConfig:
    """
    Configuration of a machine: image, environment, metadata and size.

    `idle_timeout` is the time in whole seconds after which Fly's proxy closes a silent connection to the
    machine.
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

    `instance_id` changes with every version of the machine's config. `created_at` is in seconds since the
    epoch. `url` is the address of the worker of a local machine. It is None for a Fly machine, which is
    reached through the proxy of its app.
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
    The exclusive right to change a machine. Calls prove it with the nonce.

    `expires_at` is in seconds since the epoch, by the API's clock.
    """

    nonce: str
    expires_at: float
    owner: str = ""
    description: str = ""


_STOPPED = frozenset({State.STOPPED, State.FAILED, State.LAUNCH_FAILED})
_FAILED = frozenset({State.FAILED, State.LAUNCH_FAILED})


def has_ended(state: State, wanted: State) -> bool:
    """Return whether a machine in `state` has stopped or failed on its way to `wanted`."""
    if wanted in (State.STARTED, State.SUSPENDED):
        return state in _STOPPED
    return wanted is State.STOPPED and state in _FAILED


class MachineInventory(Protocol):
    """The part of `MachinesAPI` that shows which machines exist, and destroys some."""

    async def list(self) -> list[Machine]:
        """Return every machine that is not destroyed."""
        ...

    async def get_lease(self, machine_id: str) -> Lease:
        """Return the lease in force. Raises `NotFoundError` if there is none."""
        ...

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy a machine in any state. Raises `NotFoundError` if it does not exist any more."""
        ...


class MachinesAPI(MachineInventory, Protocol):
    """
    Machines of one app, and their leases.

    While a machine is leased, a call that changes it needs the nonce of the lease; otherwise it raises
    `LeaseHeldError`. Durations are in seconds. Every method may raise `MachinesError`.
    """

    async def create(
        self, name: str, region: str, config: MachineConfig, lease_ttl: int
    ) -> tuple[Machine, Lease]:
        """
        Create a machine with a unique name and a lease. It starts without a further call.

        Raises `NameTakenError` if a live machine has that name, `CapacityError` if no host has room.
        """
        ...

    async def list(self) -> list[Machine]:
        """
        Return every machine of the app that is not destroyed. The list may be stale.

        `image` and `metadata`, which come from a machine's configuration, may be empty.
        """
        ...

    async def get(self, machine_id: str) -> Machine:
        """Return one machine. Raises `NotFoundError`."""
        ...

    async def start(self, machine_id: str, nonce: str | None) -> bool:
        """
        Start or resume a machine. Return True if the caller's `Machine` is stale, so that it needs `get`.

        It is stale if the start moved the machine to another host, which changes its `instance_id`, or if an
        earlier call, whose response may be lost, had started the machine already. Raises `NotReadyError`
        while the machine cannot be started, such as immediately after a stop.
        """
        ...

    async def stop(self, machine_id: str, nonce: str | None) -> None:
        """Begin to stop a machine, by SIGKILL without a grace period. Stopped machines are no error."""
        ...

    async def suspend(self, machine_id: str, nonce: str | None) -> None:
        """Begin to suspend a machine with its memory. Raises `NotReadyError` unless it is started."""
        ...

    async def wait(self, machine: Machine, state: State, timeout: float) -> None:
        """
        Wait until a machine reaches the state.

        Raises `WaitTimeoutError` after `timeout`, `EndedError` if the machine stopped or failed on its way to
        the state, `NotFoundError` if it is destroyed (unless `state` is `DESTROYED`).
        """
        ...

    async def destroy(self, machine_id: str, nonce: str | None) -> None:
        """Destroy a machine in any state. Raises `NotFoundError` if it does not exist any more."""
        ...

    async def acquire_lease(self, machine_id: str, ttl: int, description: str) -> Lease:
        """Acquire the lease on a machine. Raises `LeaseHeldError` while the machine is leased."""
        ...

    async def refresh_lease(self, machine_id: str, nonce: str, ttl: int) -> Lease:
        """Extend our lease to `ttl` from now, with the same nonce. Raises `LeaseHeldError` if it is lost."""
        ...

    async def get_lease(self, machine_id: str) -> Lease:
        """Return the lease in force, with its nonce. Raises `NotFoundError` if there is none."""
        ...

    async def release_lease(self, machine_id: str, nonce: str) -> None:
        """Release our lease."""
        ...


@dataclass(frozen=True)
class Call:
    """The HTTP call that caused an error. `status` is None if no response was read."""

    method: str
    path: str
    status: int | None = None
    excerpt: str = ""
    request_id: str | None = None


class MachinesError(Exception):
    """A call of the Machines API failed."""

    def __init__(self, message: str, call: Call | None = None) -> None:
        super().__init__(message)
        self.call = call


class NotFoundError(MachinesError):
    """The machine does not exist, or is not leased."""


class LeaseHeldError(MachinesError):
    """The lease has another owner, or ours has expired."""


class NotReadyError(MachinesError):
    """The state of the machine does not allow the call now. It may soon."""


class WaitTimeoutError(MachinesError):
    """The machine did not reach the state in time."""


class EndedError(MachinesError):
    """The machine stopped or failed, so that it will not reach the expected state without another call."""


class CapacityError(MachinesError):
    """The region has no capacity for another machine."""


class RejectedError(MachinesError):
    """The request is invalid or not authorized. A retry does not help."""


class UnavailableError(MachinesError):
    """The API sent no usable response. The call may or may not have taken effect."""


class RateLimitedError(UnavailableError):
    """The API received too many calls, and ignored this one."""


class NameTakenError(MachinesError):
    """A live machine has this name already. `machine_id` is its id, if the API reported it."""

    def __init__(self, message: str, machine_id: str | None, call: Call | None = None) -> None:
        super().__init__(message, call)
        self.machine_id = machine_id
