"""A coordinator whose local machines take BOOT more seconds to boot. Run as a program."""

from __future__ import annotations

import os
from typing import Any

from bfaas import coord
from bfaas.machines.emulator.state import Timing
from bfaas.machines.local.processes import LocalMachines
from bfaas.system.runtime import run_service


class _SlowMachines(LocalMachines):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timing = Timing(boot=float(os.environ["BOOT"]))


if __name__ == "__main__":
    coord.LocalMachines = _SlowMachines  # type: ignore[attr-defined]  # replaces what coord composes
    run_service(coord.Options(), coord.makeService)
