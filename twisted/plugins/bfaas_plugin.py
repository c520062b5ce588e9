"""The twistd commands. Each names its module in a string, which twistd imports when the command is chosen."""

from typing import Any

from twisted.application.service import ServiceMaker


class _Role(ServiceMaker):
    """The twistd command of a role."""

    @property
    def options(self) -> Any:
        """Prepare the process and import the role's module: twistd reads this for the chosen command only."""
        from bfaas.system.startup import prepare_role  # noqa: PLC0415 - only for the chosen command

        prepare_role(self.tapname)
        return super().options


coord = _Role(
    "bfaas coordinator",
    "bfaas.coord",
    "Accept scripts over HTTP and run them on worker machines.",
    "bfaas-coord",
)
basher = _Role(
    "bfaas worker",
    "bfaas.basher",
    "Run one authenticated bash script, then exit.",
    "bfaas-basher",
)
machines = _Role(
    "bfaas machines",
    "bfaas.machines.emulator.service",
    "Emulate the Fly Machines API on this host.",
    "bfaas-machines",
)
