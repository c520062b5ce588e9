"""
A coordinator like any other, but for its time: whatever of LEASE and RECONCILE_INTERVAL (seconds) is set, and
with UNTIMED its workers are not told of `MAXREQTIME`.

Run as a program; no user has a reason to choose these, so they are no settings. What bounds the steps of a
machine's life shrinks with its lease, which has to cover a start and two requests.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from bfaas import coord
from bfaas.pooling.config import pool_config
from bfaas.system.runtime import run_service

if TYPE_CHECKING:
    from bfaas.pooling.config import PoolConfig
    from bfaas.settings import CoordSettings


def _pool_settings(settings: CoordSettings) -> PoolConfig:
    chosen = pool_config(settings)
    if "UNTIMED" in os.environ:
        environment = dict(chosen.template.env)
        del environment["MAXREQTIME"]
        chosen = replace(chosen, template=replace(chosen.template, env=environment))
    if "LEASE" in os.environ:
        lease = int(os.environ["LEASE"])
        spare = lease - 2 * settings.max_req_time
        half = spare / 2
        timeouts = replace(
            chosen.timeouts, create=spare, start=half, ready=half, stop=spare, destroy=spare, lease=1.5
        )
        chosen = replace(chosen, lease_ttl=lease, timeouts=timeouts)
    period = float(os.environ.get("RECONCILE_INTERVAL", chosen.reconcile_interval))
    return replace(chosen, reconcile_interval=period)


if __name__ == "__main__":
    vars(coord)["pool_config"] = _pool_settings
    run_service(coord.Options(), coord.makeService)
