"""
Memory of a coordinator for each open stream, in KiB, its machine included.

Each stream is a run that has written a line and is silent. One worker serves all runs, since there is not
enough memory for so many real ones (`benchmarks/shared_worker.py`). After a few streams to warm up, they are
opened in steps. Each step is a sample: the growth of the process's resident memory, divided by the streams.

The baseline, `plain`, is a plain Twisted server with as many open responses.

Run it with `python -m benchmarks.streams`. STREAMS can be set.
"""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.client import get, open_request, post, read_to_body
from benchmarks.programs import program, shared_worker
from benchmarks.report import Report

if TYPE_CHECKING:
    from benchmarks.programs import Program

_STEPS = 10
_WARM_UP = 20


def measure(streams: int) -> Report:
    """Measure with so many streams of each kind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * streams + 100)), hard))
    report = Report("streams", notes=[f"{streams} streams, in {_STEPS} steps"])
    with program("-m", "benchmarks.plain_twisted") as plain:
        report.add("plain", "KiB", _growth(plain, get("/open"), streams))
    with shared_worker() as workers, workers.coordinator(POOLSIZE=str(_WARM_UP + streams)) as coord:
        report.add("coordinator", "KiB", _growth(coord, post("sleep 1"), streams), "plain")
    return report


def _growth(server: Program, request: bytes, streams: int) -> list[float]:
    costs: list[float] = []
    with ExitStack() as connections:

        def open_some(count: int) -> None:
            for _ in range(count):
                read_to_body(connections.enter_context(open_request(server.port, request)))

        open_some(_WARM_UP)
        size = streams // _STEPS
        for _ in range(_STEPS):
            before = server.resident_kib()
            open_some(size)
            costs.append((server.resident_kib() - before) / size)
    return costs


def main() -> None:
    """Measure and report."""
    measure(int(os.environ.get("STREAMS", "500"))).write()


if __name__ == "__main__":
    main()
