"""The twistd commands. Each names its module as a string, so that nothing is imported until it is chosen."""

from typing import Any

from twisted.application.service import ServiceMaker


class _Role(ServiceMaker):
    """A command of ours."""

    @property
    def options(self) -> Any:
        """Prepare the process, as the command was chosen, and load the command."""
        from bfaas.system.startup import prepare_role  # noqa: PLC0415 - see above

        prepare_role(self.tapname)
        return super().options


coord = _Role(
    "bfaas coordinator", "bfaas.coord", "Take scripts from anyone and run them on workers.", "bfaas-coord"
)
basher = _Role("bfaas worker", "bfaas.basher", "Run one authenticated bash script, then end.", "bfaas-basher")
machines = _Role(
    "bfaas machines", "bfaas.machines.emulator.service", "Stand in for Fly on this host.", "bfaas-machines"
)
