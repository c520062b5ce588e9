"""
How long a client waits for the first byte of its script's output, and what of that the coordinator adds.

In ms, from before the connection to when the first byte of the answer's body has been read:

- `bash`, `confined`: the script without us: `bash -c`, and the same through the programs that confine it on a
  local machine, such as bubblewrap. What these take, no worker can spare.
- `direct`: the baseline: a worker that is ready is asked without a coordinator.
- `standby`: a coordinator is asked, while a machine stands by. All of these in turn, each when what should
  be ready is, and nothing else boots; `added` is what it took more than `direct`, pair by pair.
- `missed`: the same where no machine stood by after all, if that happened.
- `stopped`: a coordinator whose one machine is stopped.
- `nothing`: a coordinator that has no machine yet that is not in use.

Machines of the last two boot for BOOT seconds, and then start their workers. Their baseline is `boot`: to
wait for as long, then to start a worker, and to ask it.

Run it with `python -m benchmarks.first_byte`. SAMPLES (of each; ten at the most where something boots) and
BOOT can be set.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.client import ask, begin, post, read_to_body
from benchmarks.programs import confined, coordinator, worker
from benchmarks.report import Report
from bfaas.system.confinement import Confinement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from benchmarks.programs import Program

_SCRIPT = "echo hello"
_EXIT = b'"code": 0'
_MISSED = 50
"""Milliseconds in line that say that a machine had to be started: less than a start, more than noise."""

_SETTLES = 0.15
"""Seconds in which a coordinator's worker, which has answered once, loads the rest of itself."""


def measure(samples: int, boot: float) -> Report:
    """Measure so many from standby, and up to ten where something boots for so many seconds."""
    report = Report("first_byte", notes=[f"boot: {boot:g} s"])
    bare, pairs, missed = _in_turn(samples)
    direct, standby = zip(*pairs, strict=True)
    for name, values in bare.items():
        report.add(name, "ms", values)
    report.add("direct", "ms", direct, "confined")
    report.add("standby", "ms", standby, "direct")
    report.add("added", "ms", [ours - theirs for theirs, ours in pairs], "direct")
    report.notes.append(f"{len(missed)} of {len(pairs) + len(missed)} found no machine that stood by")
    if missed:
        report.add("missed", "ms", missed, "direct")
    few = min(10, samples)
    report.add("boot", "ms", [_boot(boot) for _ in range(few)])
    report.add("stopped", "ms", _from_stopped(few, boot), "boot")
    report.add("nothing", "ms", _from_nothing(few, boot), "boot")
    return report


def _in_turn(samples: int) -> tuple[dict[str, list[float]], list[tuple[float, float]], list[float]]:
    bare: dict[str, list[float]] = {"bash": [], "confined": []}
    pairs: list[tuple[float, float]] = []
    missed: list[float] = []
    with coordinator(POOL_STANDBY="2", POOLSIZE="2") as ours:
        while len(pairs) + len(missed) < samples:
            with worker() as direct:
                _settle(ours)
                bare["bash"].append(_spawn(()))
                with confined() as (_, user, sandbox):
                    bare["confined"].append(_spawn(Confinement(user, sandbox).command_prefix()))
                # Whoever is first leaves something behind that ends while the other is asked.
                theirs = direct.run(_SCRIPT).check(_EXIT).first_ms
                direct.end()
            _settle(ours)
            heard = ask(ours.port, post(_SCRIPT)).check(_EXIT)
            run = ours.status()["runs"]["recent"][-1]
            if run["wait_ms"] > _MISSED:
                missed.append(heard.first_ms)
            else:
                pairs.append((theirs, heard.first_ms))
    return bare, pairs, missed


def _spawn(prefix: Sequence[str]) -> float:
    """Run the script by ourselves; ms to its first byte."""
    began = time.perf_counter()
    command = [*prefix, "/bin/bash", "-c", _SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        if not process.stdout.read(1):
            raise RuntimeError(f"{command} writes nothing")
        return 1000 * (time.perf_counter() - began)


def _settle(ours: Program) -> None:
    ours.wait_for(ready=2)
    time.sleep(_SETTLES)


def _boot(seconds: float) -> float:
    began = time.perf_counter()
    time.sleep(seconds)
    with worker() as direct:
        ready = 1000 * (time.perf_counter() - began)
        return ready + direct.run(_SCRIPT).check(_EXIT).first_ms


def _from_stopped(samples: int, boot: float) -> list[float]:
    with _slow(boot, 1) as ours:
        ask(ours.port, post(_SCRIPT)).check(_EXIT)  # the first has no machine
        taken = []
        for _ in range(samples):
            ours.wait_for(idle=1)
            taken.append(ask(ours.port, post(_SCRIPT)).check(_EXIT).first_ms)
    return taken


def _from_nothing(samples: int, boot: float) -> list[float]:
    taken = []
    with _slow(boot, samples) as ours, ExitStack() as held:
        for _ in range(samples):
            began = time.perf_counter()
            connection = held.enter_context(begin(ours.port, post("echo hello; exec sleep 1000")))
            read_to_body(connection)
            taken.append(1000 * (time.perf_counter() - began))
    return taken


def _slow(boot: float, size: int) -> AbstractContextManager[Program]:
    """Run a coordinator whose machines take their time."""
    return coordinator(("-m", "benchmarks.booting"), BOOT=str(boot), POOLSIZE=str(size))


def main() -> None:
    """Measure and tell."""
    measure(int(os.environ.get("SAMPLES", "200")), float(os.environ.get("BOOT", "1"))).write()


if __name__ == "__main__":
    main()
