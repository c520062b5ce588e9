"""
What the coordinator itself takes for a run: the wait that it adds, its processor time, and its limit.

One worker that runs nothing serves all runs (`benchmarks/shared_worker.py`), and machines boot at once. So
neither workers nor machines limit anything, but all calls to the Machines API are made.

- `worker`: the baseline: ms from before the connection to the worker to the first byte of the response's
  body, without a coordinator.
- `coordinator`: the same through a coordinator with a warm standby; `added` is the difference, pair by pair.
- `rate`: runs per second while CLIENTS clients send one request after the other. The coordinator has one
  core, everything else the other cores.
- `processor`: the coordinator's processor time for each of these runs, in ms: probes, calls to the Machines
  API and logs included.
- `busy`: its share of its core meanwhile, in percent. Near 100, the coordinator is the limit.

Run it with `python -m benchmarks.overhead`. SAMPLES, ROUNDS, SECONDS (of a round) and CLIENTS can be set.
AGAINST can be the directory of another checkout: its coordinator is measured too, alternating with this
one's, as `... before`.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.client import fetch, post
from benchmarks.load import rate
from benchmarks.programs import shared_worker
from benchmarks.report import ROOT, Report

if TYPE_CHECKING:
    from benchmarks.programs import Program

_ECHO = post("echo hello")
_TRUE = post("true")
_EXIT = b'"code": 0'
_STANDBY = 2
_SETTLE_TIME = 0.06
_UNITS = {"rate": "runs/s", "busy": "%"}
_BEFORE = " before"


def measure(samples: int, rounds: int, seconds: float, clients: int, against: Path | None = None) -> Report:
    """Measure so many single requests, and so many rounds; alternate with another checkout, if given."""
    results: dict[str, list[float]] = defaultdict(list)
    checkouts = {"": ROOT} | ({_BEFORE: against} if against else {})
    with ExitStack() as running:
        workers = running.enter_context(shared_worker())
        # More machines than clients, so that a run never waits for the stop of another run's machine.
        sizes = {"POOLSIZE": str(4 * clients), "POOL_STANDBY": str(2 * clients)}
        few = {"POOLSIZE": str(_STANDBY), "POOL_STANDBY": str(_STANDBY)}
        quiet = {
            suffix: running.enter_context(workers.coordinator(root, **few))
            for suffix, root in checkouts.items()
        }
        for _ in range(samples):
            alone = fetch(workers.port, _ECHO).check(_EXIT).first_ms
            results["worker"].append(alone)
            for suffix, coord in quiet.items():
                coord.wait_for(ready=_STANDBY)
                time.sleep(_SETTLE_TIME)
                through_coord = fetch(coord.port, _ECHO).check(_EXIT).first_ms
                results["coordinator" + suffix].append(through_coord)
                results["added" + suffix].append(through_coord - alone)
        cores = os.sched_getaffinity(0)
        own = {min(cores)}
        others = cores - own or own
        workers.api.pin(others)
        os.sched_setaffinity(0, others)
        busy = {
            suffix: running.enter_context(workers.coordinator(root, **sizes))
            for suffix, root in checkouts.items()
        }
        for coord in busy.values():
            coord.pin(own)
        for _ in range(rounds):
            for suffix, coord in busy.items():
                for name, value in _saturate(coord, clients, seconds).items():
                    results[name + suffix].append(value)
        os.sched_setaffinity(0, cores)
    report = Report("overhead", notes=[f"{clients} clients, rounds of {seconds:g} s on one core"])
    for name, values in results.items():
        before = {"before": name + _BEFORE} if name + _BEFORE in results else {}
        baselines = ("worker",) if name.partition(" ")[0] in ("coordinator", "added") else ()
        report.add(name, _UNITS.get(name.removesuffix(_BEFORE), "ms"), values, *baselines, **before)
    return report


def _saturate(coord: Program, clients: int, seconds: float) -> dict[str, float]:
    before = coord.processor_ms()
    started_at = time.monotonic()
    runs = rate(lambda: fetch(coord.port, _TRUE).check(_EXIT), clients, seconds)
    elapsed = 1000 * (time.monotonic() - started_at)
    used = coord.processor_ms() - before
    return {"rate": runs, "processor": used / (runs * seconds), "busy": 100 * used / elapsed}


def main() -> None:
    """Measure and report."""
    environment = os.environ
    against = environment.get("AGAINST")
    measure(
        int(environment.get("SAMPLES", "200")),
        int(environment.get("ROUNDS", "5")),
        float(environment.get("SECONDS", "4")),
        int(environment.get("CLIENTS", "8")),
        Path(against).resolve() if against else None,
    ).write()


if __name__ == "__main__":
    main()
