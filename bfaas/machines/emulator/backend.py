"""Backends, which run the machines of the emulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.machines.api import Machine, MachineConfig


class MachineBackend(Protocol):
    """Runs the main processes of machines."""

    def allocate_url(self) -> str | None:
        """Return the URL at which a new machine will listen; None if it will not listen."""
        ...

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start the process of a machine, and call `exited` when it ends. Raises `OSError`."""
        ...

    async def kill(self, machine_id: str) -> None:
        """Kill the process of a machine, with its descendants. Do nothing if none runs."""
        ...

    async def pause(self, machine_id: str) -> None:
        """Pause a running process. Raises `OSError`."""
        ...

    async def resume(self, machine_id: str) -> None:
        """Resume a paused process. Raises `OSError` if its state was lost."""
        ...


class NullBackend(MachineBackend):
    """Runs no processes: machines have states only."""

    def allocate_url(self) -> str | None:
        """Return no URL."""
        return None

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Do nothing."""

    async def kill(self, machine_id: str) -> None:
        """Do nothing."""

    async def pause(self, machine_id: str) -> None:
        """Do nothing."""

    async def resume(self, machine_id: str) -> None:
        """Do nothing."""
