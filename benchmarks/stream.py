"""
How many MB (10^6 bytes) of a script's output a second reach one client.

- `memory`: the baseline: a plain Twisted server, which pushes zeros from memory, 64 KiB at a time.
- `pipe`, `relay`: what Twisted does at its plainest with zeros that `head` writes into a pipe: it passes
  them on as it reads them, and once more over a relay of TCP (`twisted.protocols.portforward`).
- `raw, direct`, `raw`: the same zeros, printed by a script, from a worker, and through a coordinator.
- `events, direct`, `events`: lines of text, as events; what counts is what the script printed.

From the first byte of the body to the last, read by the same blocking socket; one after the other, again and
again, so that whatever else the machine does falls on all alike.

Run it with `python -m benchmarks.stream`. ROUNDS and MEGABYTES can be set.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.client import ask, get, post
from benchmarks.programs import coordinator, program, worker
from benchmarks.report import Report

if TYPE_CHECKING:
    from benchmarks.client import Heard

_RAW = "exec head -c {size} /dev/zero"
_TEXT = "yes 'the quick brown fox jumps over the lazy dog' | head -c {size}"
_AGAINST = {"memory": (), "pipe": ("memory",), "relay": ("memory",)}
_KINDS = (("raw", _RAW, "?raw=1", b"exit: 0", 1), ("events", _TEXT, "", b'"code": 0', 4))


def _rate(size: int, heard: Heard) -> float:
    return size / 1000 / (heard.end_ms - heard.first_ms)


def measure(rounds: int, megabytes: int) -> Report:
    """Measure so many rounds of so many MB, of events a quarter."""
    rates: dict[str, list[float]] = defaultdict(list)
    size = megabytes * 1_000_000
    with ExitStack() as running:
        ours = running.enter_context(coordinator(POOL_STANDBY="1", POOLSIZE="1"))
        plain = running.enter_context(program("-m", "benchmarks.plain"))
        relay = running.enter_context(program("-m", "benchmarks.plain", "--relay", str(plain.port)))
        for _ in range(rounds):
            rates["memory"].append(_rate(size, ask(plain.port, get(f"/{size}"))))
            rates["pipe"].append(_rate(size, ask(plain.port, get(f"/pipe/{size}"))))
            rates["relay"].append(_rate(size, ask(relay.port, get(f"/pipe/{size}"))))
            for kind, script, query, mark, part in _KINDS:
                much = size // part
                told = script.format(size=much)
                with worker() as direct:
                    rates[f"{kind}, direct"].append(_rate(much, direct.run(told, query).check(mark)))
                ours.wait_for(ready=1)
                rates[kind].append(_rate(much, ask(ours.port, post(told, query)).check(mark)))
    report = Report("stream")
    for name, samples in rates.items():
        report.add(name, "MB/s", samples, *_AGAINST.get(name, ("memory", "relay")))
    return report


def main() -> None:
    """Measure and tell."""
    measure(int(os.environ.get("ROUNDS", "7")), int(os.environ.get("MEGABYTES", "200"))).write()


if __name__ == "__main__":
    main()
