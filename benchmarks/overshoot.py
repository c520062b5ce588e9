"""
How long after `MAXREQTIME` a client receives the end of its response on a busy host.

There are a coordinator with eight local machines, and 48 clients that send scripts which do not end by
themselves, each its next one after the last: eight run, forty are queued, and machines boot and stop.

Measured for each run, in ms, on the clock that all processes of a host share (CLOCK_MONOTONIC):

- `overshoot`: from the end of `MAXREQTIME` until the client has read the last byte of its response.
  `MAXREQTIME` starts when the run gets a ready machine. That moment is computed from the coordinator's log:
  the line of a run is written together with the end of its response, and has the duration of the run in ms.
- `decided`: the coordinator's part of that, until it writes the end of the response.
- `delivered`: the rest, until the client has read it.
- `body`: by the client's clock alone: the time from the head to the last byte, less `MAXREQTIME`. The head
  arrives after the start of `MAXREQTIME`, so that this is less than the overshoot, and may be negative.
- `baseline`: the delay of a bare `callLater` of the same length in the client's process at the same time.

All but `decided` include delays of the client's process, which shares the processors. Not included: the
network, runs that ended early (counted as `others`), and responses that did not start in time (504, counted
too).

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
"""Scripts that write a line and never end: one of them spins, one ignores signals, one forks."""

_PREFIX = "ENDED "
_FAILED = re.compile(r"run ([0-9a-f]+): \S+ failed: (.*)")


def log_ends() -> Callable[[LogEvent], None]:
    """Return a log observer for the coordinator, which writes the ends of runs as JSON with the time."""
    out = sys.stdout  # twistd replaces it

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if "run_ms" in event:
            end = {"run": event["run"], "run_ms": event["run_ms"], "at": time.monotonic()}
            out.write(_PREFIX + json.dumps(end) + "\n")
        else:
            out.write(formatEventAsClassicLogText(event) or "")
        out.flush()

    observer: Callable[[LogEvent], None] = observe
    return observer


class Run(NamedTuple):
    """A run of a client: the moments of head and last byte, and the delay of the timer."""

    response: Response
    head_at: float
    end_at: float
    timer_delay: float


@dataclass(frozen=True)
class Result:
    """Samples in ms by name, and the number of runs with other outcomes, by outcome."""

    max_req_time: float
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    others: Counter[str] = field(default_factory=Counter)

    def percentile(self, name: str, percent: float) -> float:
        """Return a percentile of the samples of a name."""
        return percentile(self.samples[name], percent)

    def report(self) -> Report:
        """Return a report, with the timer as the baseline."""
        report = Report("overshoot")
        report.notes.append(f"MAXREQTIME {self.max_req_time:g} s; others: {dict(self.others) or 'none'}")
        for name, values in self.samples.items():
            report.add(name, "ms", values, *([] if name == "baseline" else ["baseline"]))
        return report


async def measure(
    reactor: Any, runs: int, *, clients: int = 48, machines: int = 8, max_req_time: float = 1.0
) -> Result:
    """Start a coordinator, send it so many runs, stop it, and compare its log with the clients."""
    settings = {
        "WORKER_APP": "mock", "POOLSIZE": str(machines), "MAXREQTIME": f"{max_req_time}s", "MAXWAIT": "10m",
        "MAXPERCLIENT": str(clients),
    }  # fmt: skip
    program = [*TWISTD, "--logger", "benchmarks.overshoot.log_ends", "bfaas-coord"]
    coordinator = await start_program(program, free_port(), settings)
    finished: list[Run] = []
    numbers = iter(range(runs))

    async def run_client() -> None:
        for number in numbers:
            run = await _run(reactor, coordinator, SCRIPTS[number % len(SCRIPTS)], max_req_time)
            finished.append(run)

    await gatherResults([Deferred.fromCoroutine(run_client()) for _ in range(clients)], consumeErrors=True)
    status, log = await stop(coordinator), coordinator.program.output.decode()
    if status != 0:
        raise RuntimeError(log)
    return _compare(finished, log, max_req_time)


async def _run(reactor: Any, coordinator: Running, script: str, max_req_time: float) -> Run:
    chunks: list[bytes] = []
    exchange = await coordinator.begin(script, "", chunks.append)
    head_at = time.monotonic()
    delay: Deferred[float] = Deferred()
    reactor.callLater(max_req_time, lambda: delay.callback(time.monotonic() - head_at - max_req_time))
    await exchange.end()
    end_at = time.monotonic()
    response = Response(exchange.status, exchange.headers, b"".join(chunks))
    return Run(response, head_at, end_at, await delay)


def _compare(finished: list[Run], log: str, max_req_time: float) -> Result:
    """Combine each client's run with its line in the coordinator's log, by its id."""
    lines = [line.removeprefix(_PREFIX) for line in log.splitlines() if line.startswith(_PREFIX)]
    ends = {end["run"]: end for end in map(json.loads, lines)}
    reasons = {run: f", {reason}" for run, reason in _FAILED.findall(log)}
    result = Result(max_req_time)
    for run in sorted(finished, key=lambda run: run.end_at):
        if run.response.status != 200:  # noqa: PLR2004 - OK
            reason = reasons.get(run.response.headers.get("run-id", ""), "")
            result.others[f"{run.response.status}{reason}"] += 1
            continue
        end = ends[run.response.headers["run-id"]]
        if run.response.exit.get("reason") != Reason.TIMEOUT:
            result.others[json.dumps(run.response.exit)] += 1
            continue
        deadline_at = end["at"] - end["run_ms"] / 1000 + max_req_time
        durations = {
            "overshoot": run.end_at - deadline_at,
            "decided": end["at"] - deadline_at,
            "delivered": run.end_at - end["at"],
            "body": run.end_at - run.head_at - max_req_time,
            "baseline": run.timer_delay,
        }
        for name, seconds in durations.items():
            result.samples[name].append(1000 * seconds)
    return result


async def _main(reactor: Any) -> None:
    runs, max_req_time = int(os.environ.get("RUNS", "480")), float(os.environ.get("MAXREQTIME", "1"))
    (await measure(reactor, runs, max_req_time=max_req_time)).report().write()


if __name__ == "__main__":
    task.react(_main)
