"""
A coordinator like any other, but for the length of its leases: LEASE and CLEANING_PERIOD, in seconds.

Run as a program. What bounds the steps of a machine's life shrinks with them, for a lease has to cover a
start and two requests. No user has a reason to choose these, so they are no settings.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from bfaas import coord, pool
from bfaas.process import run_role

if TYPE_CHECKING:
    from bfaas.member import PoolSettings
    from bfaas.settings import CoordSettings

_with_long_leases = coord.pool_settings


def _pool_settings(settings: CoordSettings) -> PoolSettings:
    lease = int(os.environ["LEASE"])
    spare = lease - 2 * settings.max_req_time
    half = spare / 2
    chosen = _with_long_leases(settings)
    limits = replace(
        chosen.limits, create=spare, start=half, ready=half, stop=spare, destroy=spare, lease=1.5
    )
    return replace(chosen, lease_ttl=lease, limits=limits)


if __name__ == "__main__":
    pool.CLEANING_PERIOD = float(os.environ["CLEANING_PERIOD"])
    coord.pool_settings = _pool_settings
    run_role(coord.Options(), coord.makeService)
