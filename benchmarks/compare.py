"""
The same load on running coordinators, given by their URLs: of bfaas, or others with its `POST /run`.

For each coordinator NAME:

- `first byte, NAME`: ms from before the connection to the first byte of the response to `echo hello`, with
  PAUSE seconds between two requests, in which a standby machine can start.
- `rate, NAME`: runs of `true` per second, with CLIENTS clients that each send one request after the other.
- `rejected, NAME`: responses per second meanwhile that are errors, or no responses. The client waits for
  50 ms after one.
- `raw, NAME`, `events, NAME`: MB (10^6 bytes) per second of one run's output: zeros, and lines as events.

The coordinators alternate; the first is the baseline of the others. Run it with
`URLS="NAME=URL NAME=URL ..." python -m benchmarks.compare`. SAMPLES (of first bytes), ROUNDS (of the rest),
SECONDS (of each window), CLIENTS, MEGABYTES and PAUSE can be set.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from benchmarks.client import fetch, post
from benchmarks.load import rate
from benchmarks.report import Report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.client import Response

_EXIT_ZERO = re.compile(rb'"code": ?0\b|\nexit: 0\n')
_AFTER_ERROR = 0.05  # seconds
_UNITS = {"first byte": "ms", "rate": "runs/s", "rejected": "/s", "raw": "MB/s", "events": "MB/s"}


@dataclass(frozen=True)
class Load:
    """How much of each kind of load: see the module."""

    samples: int
    rounds: int
    seconds: float
    clients: int
    megabytes: float
    pause: float

    @classmethod
    def from_environment(cls) -> Load:
        """Return the settings."""
        environment = os.environ
        return cls(
            samples=int(environment.get("SAMPLES", "20")),
            rounds=int(environment.get("ROUNDS", "3")),
            seconds=float(environment.get("SECONDS", "10")),
            clients=int(environment.get("CLIENTS", "8")),
            megabytes=float(environment.get("MEGABYTES", "20")),
            pause=float(environment.get("PAUSE", "1.5")),
        )


class Coordinator:
    """A running coordinator. Its URL is `http://`, a host and a port."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SystemExit(f"not a URL such as http://127.0.0.1:8000: {url}")
        self._server = (parts.hostname, parts.port or 80)
        self._host = parts.netloc

    def run(self, script: str, query: str = "") -> Response:
        """Run a script. Raises `RuntimeError` or `OSError` unless its exit code is 0."""
        response = fetch(self._server, post(script, query, host=self._host))
        if not _EXIT_ZERO.search(response.tail):
            raise RuntimeError(f"a response that ends with {response.tail!r}")
        return response

    def saturate(self, clients: int, seconds: float) -> tuple[float, float]:
        """Send requests from so many clients; return runs and errors per second."""
        errors = 0
        end = time.monotonic() + seconds

        def try_once() -> None:
            nonlocal errors
            while time.monotonic() < end:
                try:
                    self.run("true")
                except (RuntimeError, OSError):
                    errors += 1
                    time.sleep(_AFTER_ERROR)
                else:
                    return

        runs = rate(try_once, clients, seconds)
        return runs, errors / seconds

    def stream(self, size: int) -> tuple[float, float]:
        """Return the MB per second of so many bytes of raw output, and of a quarter of that as events."""
        raw = self.run(f"exec head -c {size} /dev/zero", "?raw=1")
        events = self.run(f"yes 'the quick brown fox jumps over the lazy dog' | head -c {size // 4}")
        return _megabytes_per_second(size, raw), _megabytes_per_second(size // 4, events)


def _megabytes_per_second(size: int, response: Response) -> float:
    return size / 1000 / (response.end_ms - response.first_ms)


def measure(coordinators: Mapping[str, Coordinator], load: Load, name: str = "compare") -> Report:
    """Put the load on each coordinator."""
    results: dict[tuple[str, str], list[float]] = defaultdict(list)
    for coordinator in coordinators.values():
        coordinator.run("true")  # creates a machine
    for _ in range(load.samples):
        for each, coordinator in coordinators.items():
            time.sleep(load.pause)
            results["first byte", each].append(coordinator.run("echo hello").first_ms)
    for _ in range(load.rounds):
        for each, coordinator in coordinators.items():
            time.sleep(load.pause)
            runs, errors = coordinator.saturate(load.clients, load.seconds)
            results["rate", each].append(runs)
            results["rejected", each].append(errors)
            time.sleep(load.pause)
            raw, events = coordinator.stream(int(load.megabytes * 1e6))
            results["raw", each].append(raw)
            results["events", each].append(events)
    report = Report(name, notes=[f"{load.clients} clients, windows of {load.seconds:g} s"])
    first = next(iter(coordinators))
    for kind, unit in _UNITS.items():
        for each in coordinators:
            baselines = {} if each == first else {first: f"{kind}, {first}"}
            report.add(f"{kind}, {each}", unit, results[kind, each], **baselines)
    return report


def main() -> None:
    """Measure and report."""
    named = [word.partition("=") for word in os.environ.get("URLS", "").split()]
    if not named:
        raise SystemExit('URLS is not set: URLS="bfaas=http://127.0.0.1:8000 ..."')
    coordinators = {name: Coordinator(url) for name, _, url in named}
    measure(coordinators, Load.from_environment()).write()


if __name__ == "__main__":
    main()
