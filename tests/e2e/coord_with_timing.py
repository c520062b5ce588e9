"""
A coordinator with other timing than its settings allow, for tests. Run as a program.

LEASE and RECONCILE_INTERVAL are in seconds. With a shorter lease, the timeouts of a machine's steps shrink
too, since a lease has to cover a start and two requests, and the MAX_SILENCE of workers. With UNTIMED,
workers do not get `MAXREQTIME`.
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


def _pool_config_with_timing(settings: CoordSettings) -> PoolConfig:
    config = pool_config(settings)
    if "UNTIMED" in os.environ:
        environment = dict(config.template.env)
        del environment["MAXREQTIME"]
        config = replace(config, template=replace(config.template, env=environment))
    if "LEASE" in os.environ:
        lease = int(os.environ["LEASE"])
        remaining = lease - 2 * settings.max_req_time
        half = remaining / 2
        timeouts = replace(
            config.timeouts,
            create=remaining,
            start=half,
            ready=half,
            stop=remaining,
            destroy=remaining,
            lease=1.5,
        )
        environment = {**config.template.env, "MAX_SILENCE": f"{lease}s"}
        config = replace(
            config,
            lease_ttl=lease,
            timeouts=timeouts,
            template=replace(config.template, env=environment),
        )
    interval = float(os.environ.get("RECONCILE_INTERVAL", config.reconcile_interval))
    return replace(config, reconcile_interval=interval)


if __name__ == "__main__":
    vars(coord)["pool_config"] = _pool_config_with_timing
    run_service(coord.Options(), coord.makeService)
