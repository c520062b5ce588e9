"""
The short form of `make overshoot`: what it compares is there, and no ending is late without reason.

Other programs may have the processors, so the bound is loose: what it cost to look through /proc for eight
machines before the first client was told is not what it would find.
"""

from __future__ import annotations

import pytest_twisted

from benchmarks.overshoot import measure
from tests.e2e.coordinator import reactor

with_twisted = pytest_twisted.ensureDeferred


@with_twisted
async def test_responses_end_soon_after_the_deadline() -> None:
    measured = await measure(reactor, 24, clients=12, machines=4, max_req_time=2.0)

    told = measured.report().table()
    counts = {len(measured.samples[name]) for name in ("overshoot", "decided", "delivered", "baseline")}
    assert counts == {24 - measured.others["504"]}, told
    assert min(counts) >= 12, told
    assert min(measured.samples["overshoot"]) > -1, told  # ms, to which the log tells the time
    assert measured.percentile("overshoot", 50) < 500 + 10 * measured.percentile("baseline", 50), told
