"""
What an open stream costs a coordinator: KiB of resident memory, with the machine that it runs on.

Each stream is a run that has printed a word, and is silent; its worker is one that answers for all, since so
many real ones do not fit (`benchmarks/one_for_all.py`). A few come first, which count for nothing; then they
come in steps, and each step is a sample: what the process has grown by, a stream.

The baseline, `plain`, is a plain Twisted server with as many answers that it has begun.

Run it with `python -m benchmarks.streams`. STREAMS can be set.
"""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.client import begin, get, post, read_to_body
from benchmarks.programs import coordinator, program
from benchmarks.report import Report
from bfaas.tokens import genkey
from tests.support.network import free_port

if TYPE_CHECKING:
    from benchmarks.programs import Program

_STEPS = 10
_FIRST = 20


def measure(streams: int) -> Report:
    """Open so many, of each kind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * streams + 100)), hard))
    workers = free_port()
    report = Report("streams", notes=[f"{streams} streams, in {_STEPS} steps"])
    with program("-m", "benchmarks.plain") as plain:
        report.add("plain", "KiB", _grow(plain, get("/open"), streams))
    fly = program("-m", "benchmarks.one_for_all", "--workers", f"tcp:{workers}:interface=127.0.0.1")
    with fly as api:
        settings = {
            "WORKER_APP": "workers", "WORKER_IMAGE": "basher:1", "FLY_TOKEN": "token", "FLY_REGION": "ams",
            "FLY_MACHINE_ID": "measured", "FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{api.port}",
            "PRIVATE": genkey().private, "WORKER_URL": f"http://127.0.0.1:{workers}",
            "POOLSIZE": str(_FIRST + streams), "MAXREQTIME": "600s",
        }  # fmt: skip
        with coordinator(**settings) as ours:
            report.add("coordinator", "KiB", _grow(ours, post("sleep 1"), streams), "plain")
    return report


def _grow(server: Program, request: bytes, streams: int) -> list[float]:
    costs: list[float] = []
    with ExitStack() as held:

        def open_some(count: int) -> None:
            for _ in range(count):
                read_to_body(held.enter_context(begin(server.port, request)))

        open_some(_FIRST)
        size = streams // _STEPS
        for _ in range(_STEPS):
            before = server.resident_kib()
            open_some(size)
            costs.append((server.resident_kib() - before) / size)
    return costs


def main() -> None:
    """Measure and tell."""
    measure(int(os.environ.get("STREAMS", "500"))).write()


if __name__ == "__main__":
    main()
