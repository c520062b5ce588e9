"""
What 1, 4, 16, 64 and 256 open runs cost a coordinator, and how long a line of output takes through it.

One worker serves all runs (`benchmarks/shared_worker.py`). Each kind of run has a coordinator of its own, to
which runs are added step by step; `N` is how many are open.

- `sleep N`: silent runs. `memory`: KiB by which the coordinator's resident memory has grown, for each run;
  `processor`: µs of processor time per second for each run.
- `lines N`: runs that write ten lines per second. `memory` and `processor` as above.
- `way N`: ms from the moment in which the worker writes a line until the client has read it.
- `direct N`: the baseline of `way N`: the same without a coordinator.

Worker and client use the same cores. Run it with `python -m benchmarks.scaling`. SECONDS (of each window) and
RUNS (`1,4,16,64,256`) can be set.
"""

from __future__ import annotations

import os
import re
import resource
import selectors
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.client import open_request, post, read_to_body
from benchmarks.plot import Panel
from benchmarks.programs import shared_worker
from benchmarks.report import Report, percentile

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from benchmarks.programs import Program, SharedWorker

_WARM_UP = 8
_WINDOWS = 5
"""Parts of a measurement of processor time, each of which is a sample."""

_LINE = re.compile(rb'data: "([0-9.]+)\\n"\n\n')
_MAX_LINE = 64


class _Costs(NamedTuple):
    """Samples for a number of open runs."""

    memory: list[float]
    processor: list[float]
    way: list[float]


class _Reader:
    """Reads open responses, and measures how long their lines were on the way."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._rest: dict[socket.socket, bytes] = {}

    def add(self, connection: socket.socket) -> None:
        """Add a response whose head is read."""
        self._rest[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def read(self, seconds: float) -> list[float]:
        """Read for so long; return the ms of each line. Raises `RuntimeError` if a response ends."""
        ways: list[float] = []
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                connection = key.fileobj
                data = connection.recv(65536)  # type: ignore[union-attr]
                now = time.monotonic()
                if not data:
                    raise RuntimeError("a response has ended")
                data = self._rest[connection] + data  # type: ignore[index]
                ways += [1000 * (now - float(match[1])) for match in _LINE.finditer(data)]
                end = data.rfind(b"\n\n") + 1
                self._rest[connection] = data[end:][-_MAX_LINE:]  # type: ignore[index]
        return ways


def measure(counts: Sequence[int], seconds: float) -> Report:
    """Measure for these numbers of open runs, in increasing order, with windows of so many seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * (counts[-1] + _WARM_UP) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, needed)), hard))
    report = Report("scaling", notes=[f"windows of {seconds:g} s"])
    with shared_worker() as workers:
        costs = {kind: _through_coordinator(workers, kind, counts, seconds) for kind in ("sleep", "lines")}
        direct = _open_step_by_step(workers.port, "lines", counts, seconds)
    for kind, steps in costs.items():
        for count, (memory, processor, _) in zip(counts, steps, strict=True):
            report.add(f"{kind} {count}: memory", "KiB", memory)
            report.add(f"{kind} {count}: processor", "µs/s", processor)
    for count, (_, _, way) in zip(counts, direct, strict=True):
        report.add(f"direct {count}", "ms", way)
    for count, (_, _, way) in zip(counts, costs["lines"], strict=True):
        report.add(f"way {count}", "ms", way, f"direct {count}")
    report.panels.extend(_panels(counts, costs, direct))
    return report


def _panels(counts: Sequence[int], costs: dict[str, list[_Costs]], direct: list[_Costs]) -> list[Panel]:
    def curve(samples: list[list[float]], percent: float) -> list[tuple[float, float]]:
        points = [(count, percentile(each, percent)) for count, each in zip(counts, samples, strict=True)]
        return [(count, value) for count, value in points if value > 0]  # both axes are logarithmic

    ways = {"coordinator": [step.way for step in costs["lines"]], "direct": [step.way for step in direct]}
    return [
        Panel(
            "a line's way, ms, by open runs",
            {
                f"{name}, {percent} %": curve(samples, percent)
                for name, samples in ways.items()
                for percent in (50, 99)
            },
        ),
        Panel(
            "processor time of a run, µs/s, by open runs",
            {kind: curve([step.processor for step in steps], 50) for kind, steps in costs.items()},
        ),
        Panel(
            "memory of a run, KiB, by open runs",
            {kind: curve([step.memory for step in steps], 50) for kind, steps in costs.items()},
        ),
    ]


def _through_coordinator(
    workers: SharedWorker, kind: str, counts: Sequence[int], seconds: float
) -> list[_Costs]:
    with workers.coordinator(POOLSIZE=str(counts[-1] + _WARM_UP)) as coord, ExitStack() as warm:
        for _ in range(_WARM_UP):
            read_to_body(warm.enter_context(open_request(coord.port, post("sleep"))))
        return _open_step_by_step(coord.port, kind, counts, seconds, coord)


def _open_step_by_step(
    port: int, kind: str, counts: Sequence[int], seconds: float, coord: Program | None = None
) -> list[_Costs]:
    steps = []
    reader = _Reader()
    with ExitStack() as connections:
        resident = coord.resident_kib() if coord else 0
        for before, count in pairwise((0, *counts)):
            for _ in range(count - before):
                connection = connections.enter_context(open_request(port, post(kind)))
                read_to_body(connection)
                reader.add(connection)
            reader.read(seconds / _WINDOWS)  # what has been written meanwhile
            memory = (coord.resident_kib() - resident) / count if coord else 0.0
            processor, way = [], []
            for _ in range(_WINDOWS):
                used, started_at = coord.processor_ms() if coord else 0.0, time.monotonic()
                way += reader.read(seconds / _WINDOWS)
                used = (coord.processor_ms() if coord else 0.0) - used
                processor.append(1000 * used / (time.monotonic() - started_at) / count)
            steps.append(_Costs([memory], processor, way))
    return steps


def main() -> None:
    """Measure and report."""
    counts = [int(count) for count in os.environ.get("RUNS", "1,4,16,64,256").split(",")]
    measure(counts, float(os.environ.get("SECONDS", "10"))).write()


if __name__ == "__main__":
    main()
