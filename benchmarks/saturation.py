"""
How many runs of `true` a second end, while more clients ask than there are machines.

Each run is of a machine that was wiped and booted for it, so that the start of workers is what limits it.

- `bash`: two loops that start `bash -c true`, each its next when the last has ended: as many as cores.
- `workers`: the baseline: as many loops as there are machines, each of which starts a worker, waits until it
  answers, has it run `true`, and kills it. No coordinator, no pool.
- `coordinator`: twice as many clients as there are machines, each with its next request when the last is
  answered.

In turn, window by window, after a while in which they warm up. Run it with `python -m benchmarks.saturation`.
ROUNDS, SECONDS (of a window) and MACHINES can be set.
"""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks.client import ask, post
from benchmarks.programs import coordinator, worker
from benchmarks.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable

_EXIT = b'"code": 0'
_WARM = 1.5


def measure(rounds: int, seconds: float, machines: int) -> Report:
    """Measure so many windows of each."""
    rates: dict[str, list[float]] = {"bash": [], "workers": [], "coordinator": []}
    with coordinator(POOLSIZE=str(machines)) as ours:
        request = post("true")
        for _ in range(rounds):
            rates["bash"].append(_rate(_run_bash, os.cpu_count() or 1, seconds))
            rates["workers"].append(_rate(_use_a_worker, machines, seconds))
            asked = _rate(lambda: ask(ours.port, request).check(_EXIT), 2 * machines, seconds)
            rates["coordinator"].append(asked)
            ours.wait_for(idle=machines)
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


def _rate(work: Callable[[], object], loops: int, seconds: float) -> float:
    """Do something in so many loops; tell how often a second it was done, once they are warm."""
    begins = time.monotonic() + _WARM

    def loop() -> int:
        done = 0
        while True:
            work()
            now = time.monotonic()
            if now >= begins + seconds:
                return done
            done += now >= begins

    with ThreadPoolExecutor(loops) as threads:
        return sum(threads.map(lambda _: loop(), range(loops))) / seconds


def main() -> None:
    """Measure and tell."""
    rounds, machines = int(os.environ.get("ROUNDS", "3")), int(os.environ.get("MACHINES", "8"))
    measure(rounds, float(os.environ.get("SECONDS", "5")), machines).write()


if __name__ == "__main__":
    main()
