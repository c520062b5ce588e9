"""
What containers cost beside local processes: first byte, runs per second, memory.

- `processes, …`: the baselines: a coordinator with local machines (`WORKER_APP=mock`).
- `containers, …`: one with containers of the engine in DOCKER_HOST.

`standby` and `on demand` are ms until the first byte of the output of `echo hello`, from a warm standby and
from a stopped machine; the kinds alternate. `rate` is how many runs of `true` finish per second on MACHINES
machines with twice as many clients, in windows that alternate. `memory` is the proportional set size (PSS) of
an idle container's processes and of the engine's process that supervises it, in MB; as root.

Run it with `python -m tests.support.engines docker .venv/bin/python -m benchmarks.containers`. SAMPLES,
ROUNDS, SECONDS and MACHINES can be set.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.client import fetch, post
from benchmarks.load import rate
from benchmarks.programs import coordinator
from benchmarks.report import Report

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from benchmarks.programs import Program

_EXIT = b'"code": 0'
_HELLO = post("echo hello")
_REGION = f"benchmark-{os.getpid()}"
_KINDS = ("processes", "containers")
_SETTLE_TIME = 0.15
"""Seconds in which a worker that has responded once loads the rest of its code."""

_WARM_UP = 1.5


def measure(samples: int, rounds: int, seconds: float, machines: int) -> Report:
    """Measure so many samples of each kind, and so many windows."""
    report = Report("containers", notes=[f"{machines} machines, windows of {seconds:g} s"])
    standby = _first_bytes(samples, {"ready": 1}, POOL_STANDBY="1", POOLSIZE="1")
    on_demand = _first_bytes(samples, {"stopped": 1}, POOLSIZE="1")
    rates = _rates(rounds, seconds, machines)
    for name, unit, values in (
        ("standby", "ms", standby),
        ("on demand", "ms", on_demand),
        ("rate", "runs/s", rates),
    ):
        for kind in _KINDS:
            baselines = {"processes": f"processes, {name}"} if kind != "processes" else {}
            report.add(f"{kind}, {name}", unit, values[kind], **baselines)
    report.add("containers, memory", "MB", [_memory(machines)])
    return report


def _coordinators(stack: ExitStack, **settings: str) -> dict[str, Program]:
    """Run a coordinator of each kind."""
    return {kind: stack.enter_context(_coordinator(stack, kind, **settings)) for kind in _KINDS}


def _coordinator(stack: ExitStack, kind: str, **settings: str) -> AbstractContextManager[Program]:
    if kind == "containers":
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bfaas-sockets-"))
        settings |= {"WORKER_APP": "docker", "WORKER_SOCKETS": directory, "FLY_MACHINE_ID": _REGION}
        settings["DOCKER_HOST"] = os.environ["DOCKER_HOST"]
    return coordinator(FLY_REGION=_REGION, **settings)


def _first_bytes(samples: int, machines: dict[str, int], **settings: str) -> dict[str, list[float]]:
    """Measure the first byte of runs that begin while there are these numbers of machines by phase."""
    times: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    with ExitStack() as stack:
        coordinators = _coordinators(stack, **settings)
        for coord in coordinators.values():
            fetch(coord.port, _HELLO).check(_EXIT)  # creates the machine
        for _ in range(samples):
            for kind, coord in coordinators.items():
                for each in coordinators.values():
                    each.wait_for(**machines)
                time.sleep(_SETTLE_TIME)
                times[kind].append(fetch(coord.port, _HELLO).check(_EXIT).first_ms)
    return times


def _rates(rounds: int, seconds: float, machines: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    request = post("true")
    with ExitStack() as stack:
        coordinators = _coordinators(stack, POOLSIZE=str(machines))
        for _ in range(rounds):
            for kind, coord in coordinators.items():
                port = coord.port
                rates[kind].append(
                    rate(lambda port=port: fetch(port, request).check(_EXIT), 2 * machines, seconds, _WARM_UP)  # type: ignore[misc]
                )
                coord.wait_for(stopped=machines)
    return rates


def _memory(machines: int) -> float:
    """Return the MB of an idle container, the mean of `machines`."""
    with ExitStack() as stack:
        number = str(machines)
        coord = stack.enter_context(_coordinator(stack, "containers", POOLSIZE=number, POOL_STANDBY=number))
        coord.wait_for(ready=machines)
        time.sleep(_SETTLE_TIME)
        return sum(map(_pss_kib, _container_processes())) / 1024 / machines


def _container_processes() -> set[int]:
    """Return the ids of the containers' processes and of their parents outside."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        # Only a worker has both; a coordinator has no PUBLIC.
        if f"FLY_REGION={_REGION}".encode() in environment and any(
            variable.startswith(b"PUBLIC=") for variable in environment
        ):
            found |= {int(directory.name), int(parent)}
    return found


def _pss_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def main() -> None:
    """Measure and report."""
    samples, rounds = int(os.environ.get("SAMPLES", "50")), int(os.environ.get("ROUNDS", "3"))
    machines = int(os.environ.get("MACHINES", "4"))
    measure(samples, rounds, float(os.environ.get("SECONDS", "5")), machines).write()


if __name__ == "__main__":
    main()
