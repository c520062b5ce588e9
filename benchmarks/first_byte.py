"""
How long a client waits for the first byte of its script's output, and the coordinator's part of that.

In ms, from before the connection until the first byte of the response's body was read:

- `bash`, `confined`: the script without bfaas: `bash -c`, and the same with the programs that confine
  scripts on local machines, such as bubblewrap. No worker can be faster.
- `direct`: the baseline: a ready worker without a coordinator.
- `standby`: a coordinator with a warm standby. These four alternate, each when all machines are ready and
  none is booting. `added` is the difference to `direct`, pair by pair.
- `missed`: samples of `standby` that found no warm standby ready, if there are any.
- `stopped`: a coordinator whose only machine is stopped.
- `nothing`: a coordinator without an unused machine.

Machines of the last two boot for BOOT seconds, then start their workers. Their baseline is `boot`: a sleep
of that length, followed by the start of a worker and a request to it.

Run it with `python -m benchmarks.first_byte`. SAMPLES (of each; at most ten where something boots) and BOOT
can be set.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.client import fetch, open_request, post, read_to_body
from benchmarks.programs import confined, coordinator, worker
from benchmarks.report import Report
from bfaas.system.confinement import Confinement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from benchmarks.programs import Program

_SCRIPT = "echo hello"
_EXIT = b'"code": 0'
_MISSED_MS = 50
"""Queue wait that shows that a machine had to be started: less than a start, more than noise."""

_SETTLE_TIME = 0.15
"""Seconds in which a worker that has responded once loads the rest of its code."""


def measure(samples: int, boot: float) -> Report:
    """Measure so many samples, at most ten of those with a boot of so many seconds."""
    report = Report("first_byte", notes=[f"boot: {boot:g} s"])
    plain, pairs, missed = _alternate(samples)
    direct, standby = zip(*pairs, strict=True)
    for name, values in plain.items():
        report.add(name, "ms", values)
    report.add("direct", "ms", direct, "confined")
    report.add("standby", "ms", standby, "direct")
    report.add("added", "ms", [through_coord - alone for alone, through_coord in pairs], "direct")
    report.notes.append(f"{len(missed)} of {len(pairs) + len(missed)} found no warm standby")
    if missed:
        report.add("missed", "ms", missed, "direct")
    boots = min(10, samples)
    report.add("boot", "ms", [_boot(boot) for _ in range(boots)])
    report.add("stopped", "ms", _from_stopped(boots, boot), "boot")
    report.add("nothing", "ms", _from_nothing(boots, boot), "boot")
    return report


def _alternate(samples: int) -> tuple[dict[str, list[float]], list[tuple[float, float]], list[float]]:
    plain: dict[str, list[float]] = {"bash": [], "confined": []}
    pairs: list[tuple[float, float]] = []
    missed: list[float] = []
    with coordinator(POOL_STANDBY="2", POOLSIZE="2") as coord:
        while len(pairs) + len(missed) < samples:
            with worker() as direct:
                _settle(coord)
                plain["bash"].append(_spawn(()))
                with confined() as (_, user, sandbox):
                    plain["confined"].append(_spawn(Confinement(user, sandbox).command_prefix()))
                # The worker ends first: its shutdown would take processor time from the coordinator.
                alone = direct.run(_SCRIPT).check(_EXIT).first_ms
                direct.end()
            _settle(coord)
            response = fetch(coord.port, post(_SCRIPT)).check(_EXIT)
            run = coord.status()["runs"]["recent"][-1]
            if run["wait_ms"] > _MISSED_MS:
                missed.append(response.first_ms)
            else:
                pairs.append((alone, response.first_ms))
    return plain, pairs, missed


def _spawn(prefix: Sequence[str]) -> float:
    """Run the script without a worker; return the ms to its first byte."""
    started_at = time.perf_counter()
    command = [*prefix, "/bin/bash", "-c", _SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        if not process.stdout.read(1):
            raise RuntimeError(f"{command} writes nothing")
        return 1000 * (time.perf_counter() - started_at)


def _settle(coord: Program) -> None:
    coord.wait_for(ready=2)
    time.sleep(_SETTLE_TIME)


def _boot(seconds: float) -> float:
    started_at = time.perf_counter()
    time.sleep(seconds)
    with worker() as direct:
        ready = 1000 * (time.perf_counter() - started_at)
        return ready + direct.run(_SCRIPT).check(_EXIT).first_ms


def _from_stopped(samples: int, boot: float) -> list[float]:
    with _slow_coordinator(boot, 1) as coord:
        fetch(coord.port, post(_SCRIPT)).check(_EXIT)  # creates the machine
        times = []
        for _ in range(samples):
            coord.wait_for(stopped=1)
            times.append(fetch(coord.port, post(_SCRIPT)).check(_EXIT).first_ms)
    return times


def _from_nothing(samples: int, boot: float) -> list[float]:
    times = []
    with _slow_coordinator(boot, samples) as coord, ExitStack() as connections:
        for _ in range(samples):
            started_at = time.perf_counter()
            connection = connections.enter_context(
                open_request(coord.port, post("echo hello; exec sleep 1000"))
            )
            read_to_body(connection)
            times.append(1000 * (time.perf_counter() - started_at))
    return times


def _slow_coordinator(boot: float, size: int) -> AbstractContextManager[Program]:
    """Run a coordinator whose machines take so many seconds to boot."""
    return coordinator(("-m", "benchmarks.slow_boot_coord"), BOOT=str(boot), POOLSIZE=str(size))


def main() -> None:
    """Measure and report."""
    measure(int(os.environ.get("SAMPLES", "200")), float(os.environ.get("BOOT", "1"))).write()


if __name__ == "__main__":
    main()
