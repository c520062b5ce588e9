"""
How many runs of `true` finish per second, with more clients than machines.

Each run is on a machine that was wiped and booted for it, so that the start of workers limits the rate.

- `bash`: as many loops as cores, each of which runs `bash -c true` again and again.
- `workers`: the baseline: as many loops as machines, each of which starts a worker, waits until it is
  ready, runs `true` on it, and kills it, without a coordinator.
- `coordinator`: twice as many clients as machines, each of which sends its next request after the last
  response.

The kinds alternate, window by window, each after a warm-up. Run it with `python -m benchmarks.saturation`.
ROUNDS, SECONDS (of a window) and MACHINES can be set.
"""

from __future__ import annotations

import os
import subprocess

from benchmarks.client import fetch, post
from benchmarks.load import rate
from benchmarks.programs import coordinator, worker
from benchmarks.report import Report

_EXIT = b'"code": 0'
_WARM_UP = 1.5


def measure(rounds: int, seconds: float, machines: int) -> Report:
    """Measure so many windows of each kind."""
    rates: dict[str, list[float]] = {"bash": [], "workers": [], "coordinator": []}
    with coordinator(POOLSIZE=str(machines)) as coord:
        request = post("true")
        for _ in range(rounds):
            rates["bash"].append(rate(_run_bash, os.cpu_count() or 1, seconds, _WARM_UP))
            rates["workers"].append(rate(_use_a_worker, machines, seconds, _WARM_UP))
            rates["coordinator"].append(
                rate(lambda: fetch(coord.port, request).check(_EXIT), 2 * machines, seconds, _WARM_UP)
            )
            coord.wait_for(stopped=machines)
    report = Report("saturation", notes=[f"{machines} machines, windows of {seconds:g} s"])
    report.add("bash", "runs/s", rates["bash"])
    report.add("workers", "runs/s", rates["workers"], "bash")
    report.add("coordinator", "runs/s", rates["coordinator"], "workers")
    return report


def _run_bash() -> None:
    subprocess.run(["/bin/bash", "-c", "true"], stdin=subprocess.DEVNULL, check=True)


def _use_a_worker() -> None:
    with worker() as direct:
        direct.run("true").check(_EXIT)
        direct.end()


def main() -> None:
    """Measure and report."""
    rounds, machines = int(os.environ.get("ROUNDS", "3")), int(os.environ.get("MACHINES", "8"))
    measure(rounds, float(os.environ.get("SECONDS", "5")), machines).write()


if __name__ == "__main__":
    main()
