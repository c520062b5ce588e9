"""
How long after `MAXREQTIME` a client sees its ending, while the host is busy.

A coordinator with eight local machines, and 48 clients that send scripts which outlive their time, each
its next one when the last has ended: eight run, forty wait, and machines boot and die all the while.

What is measured, of each run, in ms, on the clock that all processes of a host share (CLOCK_MONOTONIC):

- `overshoot`: from the moment at which `MAXREQTIME` is over to the moment at which the client has read the
  last byte of its answer. `MAXREQTIME` begins when the coordinator takes a machine that answers; when that
  was, its log tells: a run's line is written as its answer is, and has the time since then, to the ms.
- `decided`: the coordinator's part of that, until it writes the ending: its timer, and its judgement.
- `delivered`: the rest: until the client has read it.
- `body`: by the client's own clock alone, the time from head to last byte, less `MAXREQTIME`. The head
  comes after `MAXREQTIME` has begun, so this is below the overshoot, and may be below 0.
- `baseline`: how late a bare `callLater` of the same length is in the client's process at the same time.

The lateness of the client's own process is in all but `decided`: it has the same two processors. What is
left out: the network, runs that ended before their time (counted as `others`), and answers that
did not begin in time (504, counted too).

Run it with `make overshoot`; RUNS and MAXREQTIME (in seconds) can be set.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet import task
from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import ILogObserver, formatEventAsClassicLogText
from zope.interface import provider

from benchmarks.report import Report, percentile
from bfaas.protocol.formats import Reason
from tests.e2e.coordinator import TWISTD, start_program, stop
from tests.support.network import free_port
from tests.support.responses import Response

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from twisted.logger import LogEvent

    from tests.e2e.coordinator import Running

SCRIPTS = (
    "echo begun; sleep 1000",
    "echo begun; sleep 1000 | cat",
    "echo begun; exec sleep 1000",
    "trap '' HUP INT TERM; echo begun; while :; do sleep 1000; done",
    "for _ in 1 2 3 4 5; do sleep 1000 & done; setsid sleep 1000 & echo begun; wait",
    "echo begun; while :; do :; done",
)
"""They print, and then outlive any deadline: one in six spins, one ignores signals, one forks."""

_MARK = "ENDED "
_FAILED = re.compile(r"run ([0-9a-f]+): \S+ failed: (.*)")


def tell_endings() -> Callable[[LogEvent], None]:
    """Make an observer for the coordinator, which tells its runs with the time, and all else as usual."""
    out = sys.stdout  # twistd takes its place

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if "run_ms" in event:
            told = {"run": event["run"], "run_ms": event["run_ms"]}
            out.write(_MARK + json.dumps({**told, "at": time.monotonic()}) + "\n")
        else:
            out.write(formatEventAsClassicLogText(event) or "")
        out.flush()

    telling: Callable[[LogEvent], None] = observe
    return telling


class Run(NamedTuple):
    """A run as its client saw it: when its head and its last byte came, and how late the timer was."""

    answer: Response
    head_at: float
    end_at: float
    timer_late: float


@dataclass(frozen=True)
class Measured:
    """Samples in ms by the name of what they measure, and how many runs ended otherwise, by how."""

    max_req_time: float
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    others: Counter[str] = field(default_factory=Counter)

    def percentile(self, name: str, percent: float) -> float:
        """Tell the smallest sample that so many of a hundred do not exceed."""
        return percentile(self.samples[name], percent)

    def report(self) -> Report:
        """Tell it all, compared with a timer of the same length."""
        report = Report("overshoot")
        report.notes.append(f"MAXREQTIME {self.max_req_time:g} s; others: {dict(self.others) or 'none'}")
        for name, values in self.samples.items():
            report.add(name, "ms", values, *([] if name == "baseline" else ["baseline"]))
        return report


async def measure(
    reactor: Any, runs: int, *, clients: int = 48, machines: int = 8, max_req_time: float = 1.0
) -> Measured:
    """Start a coordinator, load it with so many runs, stop it, and compare what both sides saw."""
    settings = {
        "WORKER_APP": "mock", "POOLSIZE": str(machines), "MAXREQTIME": f"{max_req_time}s", "MAXWAIT": "10m",
        "MAXPERCLIENT": str(clients),
    }  # fmt: skip
    program = [*TWISTD, "--logger", "benchmarks.overshoot.tell_endings", "bfaas-coord"]
    coordinator = await start_program(program, free_port(), settings)
    seen: list[Run] = []
    left = iter(range(runs))

    async def be_a_client() -> None:
        for number in left:
            run = await _run(reactor, coordinator, SCRIPTS[number % len(SCRIPTS)], max_req_time)
            seen.append(run)

    await gatherResults([Deferred.fromCoroutine(be_a_client()) for _ in range(clients)], consumeErrors=True)
    status, said = await stop(coordinator), coordinator.program.said.decode()
    if status != 0:
        raise RuntimeError(said)
    return _compare(seen, said, max_req_time)


async def _run(reactor: Any, coordinator: Running, script: str, max_req_time: float) -> Run:
    pieces: list[bytes] = []
    exchange = await coordinator.begin(script, "", pieces.append)
    head_at = time.monotonic()
    late: Deferred[float] = Deferred()
    reactor.callLater(max_req_time, lambda: late.callback(time.monotonic() - head_at - max_req_time))
    await exchange.end()
    end_at = time.monotonic()
    answer = Response(exchange.status, exchange.headers, b"".join(pieces))
    return Run(answer, head_at, end_at, await late)


def _compare(seen: list[Run], said: str, max_req_time: float) -> Measured:
    """Find each run in the coordinator's log, by its id."""
    lines = [line.removeprefix(_MARK) for line in said.splitlines() if line.startswith(_MARK)]
    told = {ending["run"]: ending for ending in map(json.loads, lines)}
    whys = {run: f", {why}" for run, why in _FAILED.findall(said)}
    measured = Measured(max_req_time)
    for run in sorted(seen, key=lambda run: run.end_at):
        if run.answer.status != 200:  # noqa: PLR2004 - OK
            why = whys.get(run.answer.headers.get("run-id", ""), "")
            measured.others[f"{run.answer.status}{why}"] += 1
            continue
        ending = told[run.answer.headers["run-id"]]
        if run.answer.exit.get("reason") != Reason.TIMEOUT:
            measured.others[json.dumps(run.answer.exit)] += 1
            continue
        over_at = ending["at"] - ending["run_ms"] / 1000 + max_req_time
        moments = {
            "overshoot": run.end_at - over_at,
            "decided": ending["at"] - over_at,
            "delivered": run.end_at - ending["at"],
            "body": run.end_at - run.head_at - max_req_time,
            "baseline": run.timer_late,
        }
        for name, seconds in moments.items():
            measured.samples[name].append(1000 * seconds)
    return measured


async def _main(reactor: Any) -> None:
    runs, max_req_time = int(os.environ.get("RUNS", "480")), float(os.environ.get("MAXREQTIME", "1"))
    (await measure(reactor, runs, max_req_time=max_req_time)).report().write()


if __name__ == "__main__":
    task.react(_main)
