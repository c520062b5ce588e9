"""What gives machines bodies, and the one that gives none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from bfaas.machines.api import Machine, MachineConfig


class MachineBackend(Protocol):
    """Gives machines bodies."""

    def allocate_url(self) -> str | None:
        """Choose the URL that a new machine will have; None for none."""
        ...

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start a body; call `exited` if it ends by itself. Raises `OSError`."""
        ...

    async def kill(self, machine_id: str) -> None:
        """End the body at once, with all that it left; right also where there is none."""
        ...

    async def pause(self, machine_id: str) -> None:
        """Let the body stand still, where it is."""
        ...

    async def resume(self, machine_id: str) -> None:
        """Let the body go on."""
        ...


class NullBackend(MachineBackend):
    """Machines that are only told of."""

    def allocate_url(self) -> None:
        """Be nowhere."""

    async def start(self, machine: Machine, config: MachineConfig, exited: Callable[[], None]) -> None:
        """Start nothing."""

    async def kill(self, machine_id: str) -> None:
        """End nothing."""

    async def pause(self, machine_id: str) -> None:
        """Do nothing."""

    async def resume(self, machine_id: str) -> None:
        """Do nothing."""
