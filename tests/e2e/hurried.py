"""
A coordinator like any other, but for its time: whatever of LEASE and CLEANING_PERIOD (seconds) is set, and
with UNTIMED its workers are not told of `MAXREQTIME`. Run as a program; no user has a use for these.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from bfaas import coord, pool
from bfaas.process import run_role

if TYPE_CHECKING:
    from bfaas.life import PoolSettings
    from bfaas.settings import CoordSettings

_usual_settings = coord.pool_settings


def _pool_settings(settings: CoordSettings) -> PoolSettings:
    usual = _usual_settings(settings)
    environment = dict(usual.config.env)
    if "UNTIMED" in os.environ:
        del environment["MAXREQTIME"]
    lease = int(os.environ.get("LEASE", usual.lease_ttl))
    return replace(usual, lease_ttl=lease, config=replace(usual.config, env=environment))


if __name__ == "__main__":
    pool.CLEANING_PERIOD = float(os.environ.get("CLEANING_PERIOD", pool.CLEANING_PERIOD))
    coord.pool_settings = _pool_settings
    run_role(coord.Options(), coord.makeService)
