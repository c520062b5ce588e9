"""
The short form of `make overshoot`: its samples are complete, and responses end soon after the deadline.

The bound is loose because other programs may use the processors: only `make overshoot` finds a smaller delay,
such as that of a search of /proc for each machine before the first response ends.
"""

from __future__ import annotations

import pytest_twisted

from benchmarks.overshoot import measure
from tests.e2e.coordinator import reactor

with_twisted = pytest_twisted.ensureDeferred


@with_twisted
async def test_responses_end_soon_after_the_deadline() -> None:
    measured = await measure(reactor, 24, clients=12, machines=4, max_req_time=2.0)

    table = measured.report().table()
    counts = {len(measured.samples[name]) for name in ("overshoot", "decided", "delivered", "baseline")}
    assert counts == {24 - measured.others["504"]}, table
    assert min(counts) >= 12, table
    assert min(measured.samples["overshoot"]) > -1, table  # ms, the resolution of the log's timestamps
    assert measured.percentile("overshoot", 50) < 500 + 10 * measured.percentile("baseline", 50), table
