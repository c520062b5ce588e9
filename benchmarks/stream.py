"""
How many MB (10^6 bytes) of a script's output reach one client per second.

- `memory`: the baseline: a plain Twisted server that sends zeros from memory, 64 KiB at a time.
- `pipe`, `relay`: plain Twisted servers: one that forwards zeros that `head` writes into a pipe, and a TCP
  relay in front of it (`twisted.protocols.portforward`).
- `raw, direct`, `raw`: the same zeros, written by a script, from a worker and through a coordinator.
- `events, direct`, `events`: lines of text as events; only the script's output counts.

Measured from the first byte of the body to the last, by the same blocking socket. The kinds alternate, so
that other load affects all of them.

Run it with `python -m benchmarks.stream`. ROUNDS and MEGABYTES can be set.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.client import fetch, get, post
from benchmarks.programs import coordinator, program, worker
from benchmarks.report import Report

if TYPE_CHECKING:
    from benchmarks.client import Response

_RAW = "exec head -c {size} /dev/zero"
_TEXT = "yes 'the quick brown fox jumps over the lazy dog' | head -c {size}"
_BASELINES = {"memory": (), "pipe": ("memory",), "relay": ("memory",)}
_KINDS = (("raw", _RAW, "?raw=1", b"exit: 0", 1), ("events", _TEXT, "", b'"code": 0', 4))


def _rate(size: int, response: Response) -> float:
    return size / 1000 / (response.end_ms - response.first_ms)


def measure(rounds: int, megabytes: int) -> Report:
    """Measure a number of rounds of so many MB each, a quarter of that for events."""
    rates: dict[str, list[float]] = defaultdict(list)
    size = megabytes * 1_000_000
    with ExitStack() as running:
        coord = running.enter_context(coordinator(POOL_STANDBY="1", POOLSIZE="1"))
        plain = running.enter_context(program("-m", "benchmarks.plain_twisted"))
        relay = running.enter_context(program("-m", "benchmarks.plain_twisted", "--relay", str(plain.port)))
        for _ in range(rounds):
            rates["memory"].append(_rate(size, fetch(plain.port, get(f"/{size}"))))
            rates["pipe"].append(_rate(size, fetch(plain.port, get(f"/pipe/{size}"))))
            rates["relay"].append(_rate(size, fetch(relay.port, get(f"/pipe/{size}"))))
            for kind, template, query, marker, divisor in _KINDS:
                count = size // divisor
                script = template.format(size=count)
                with worker() as direct:
                    rates[f"{kind}, direct"].append(_rate(count, direct.run(script, query).check(marker)))
                coord.wait_for(ready=1)
                rates[kind].append(_rate(count, fetch(coord.port, post(script, query)).check(marker)))
    report = Report("stream")
    for name, samples in rates.items():
        report.add(name, "MB/s", samples, *_BASELINES.get(name, ("memory", "relay")))
    return report


def main() -> None:
    """Measure and report."""
    measure(int(os.environ.get("ROUNDS", "7")), int(os.environ.get("MEGABYTES", "200"))).write()


if __name__ == "__main__":
    main()
