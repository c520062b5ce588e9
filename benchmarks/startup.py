"""
How soon a worker is ready and has run a script, and how much memory it uses.

Each round measures each of these once, one after the other. The first round is discarded, since it fills
the caches of bytecode and files. In ms, on this process's clock:

- `python`: a baseline: `python -c pass`, from before its start to its exit.
- `reactor`: a baseline: from before the start of a Python that imports Twisted's reactor until it has done
  so.
- `healthz`: from before a worker's start to the complete response to `GET /healthz`, which is requested
  every half millisecond.
- `cold run`: the same to the first byte of a script's output. The script is sent after `healthz`.
- `ready run`: from the request to the first byte of a script's output, on a worker that was idle for a
  while.
- `freed`: from SIGKILL of an idle worker to its exit, as a pool stops a machine.

`idle` is the resident memory of an idle worker, in MB (2^20 bytes); `own` is the part of it that is not
file-backed.

Run it with `python -m benchmarks.startup`. ROUNDS can be set. AGAINST can be the directory of another
checkout: its workers are measured too, alternating with this one's, as `... before`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.client import get
from benchmarks.programs import WORKER_IDENTITY, signed
from benchmarks.report import ROOT, Report
from tests.support.network import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ROOT", "measure"]

_IDLE_TIME = 0.3
_TIMEOUT = 60.0
_BEFORE = " before"
_MARKER = b"hello from the script"


def _unit(name: str) -> str:
    return "MB" if name.split(maxsplit=1)[0] in ("idle", "own") else "ms"


class _Worker:
    """A worker of a checkout, as a process."""

    def __init__(self, checkout: Path) -> None:
        self._port = free_port()
        listen = f"tcp:{self._port}:interface=127.0.0.1"
        settings = {**WORKER_IDENTITY, "HOME": tempfile.gettempdir()}
        self.started = time.perf_counter()
        self._process = _start(
            ["-m", "bfaas.basher", "--listen", listen], checkout, settings, subprocess.DEVNULL
        )

    def wait_until_ready(self) -> None:
        """Request /healthz until it responds."""
        while True:
            try:
                if self._request(get("/healthz"), b"ok\n"):
                    return
            except ConnectionError:
                if time.perf_counter() - self.started > _TIMEOUT or self._process.poll() is not None:
                    raise
                time.sleep(0.0005)

    def run(self) -> None:
        """Run a script until its first output has arrived."""
        if not self._request(signed("echo " + _MARKER.decode()), _MARKER):
            raise RuntimeError("the script was not run")

    def memory(self) -> Iterator[float]:
        """Yield the resident memory in MB, and the part of it that is not file-backed."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        for name in ("VmRSS", "RssAnon"):
            yield int(fields[name].split()[0]) / 1024

    def end(self) -> None:
        """Kill it, and wait for its exit."""
        self._process.kill()
        self._process.wait()

    def _request(self, request: bytes, marker: bytes) -> bool:
        """Send a request, read until the marker; return whether it arrived."""
        with socket.create_connection(("127.0.0.1", self._port), _TIMEOUT) as connection:
            connection.sendall(request)
            received = b""
            while marker not in received:
                data = connection.recv(65536)
                if not data:
                    return False
                received += data
        return True


def _start(
    arguments: list[str], checkout: Path, settings: dict[str, str], stdout: int
) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=checkout,  # Python searches it before PYTHONPATH
        env=environment | settings,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
    )


def _ms_since(moment: float) -> float:
    return 1000 * (time.perf_counter() - moment)


def _baselines() -> Iterator[tuple[str, float]]:
    started_at = time.perf_counter()
    with _start(["-c", "pass"], ROOT, {}, subprocess.DEVNULL) as python:
        python.wait()  # without a timeout, which would poll at intervals
        yield "python", _ms_since(started_at)
    started_at = time.perf_counter()
    code = "import twisted.internet.reactor, os; os.write(1, b'.')"
    with _start(["-c", code], ROOT, {}, subprocess.PIPE) as python:
        assert python.stdout is not None  # noqa: S101 - it is a pipe
        python.stdout.read(1)
        yield "reactor", _ms_since(started_at)


def _measure_once(checkout: Path) -> Iterator[tuple[str, float]]:
    worker = _Worker(checkout)
    try:
        worker.wait_until_ready()
        yield "healthz", _ms_since(worker.started)
        worker.run()
        yield "cold run", _ms_since(worker.started)
    finally:
        worker.end()
    worker = _Worker(checkout)
    try:
        worker.wait_until_ready()
        time.sleep(_IDLE_TIME)
        yield from zip(("idle", "own"), worker.memory(), strict=True)
        started_at = time.perf_counter()
        worker.run()
        yield "ready run", _ms_since(started_at)
    finally:
        worker.end()
    worker = _Worker(checkout)
    worker.wait_until_ready()
    time.sleep(_IDLE_TIME)
    started_at = time.perf_counter()
    worker.end()
    yield "freed", _ms_since(started_at)


def measure(rounds: int, against: Path | None = None) -> Report:
    """Measure so many rounds; alternate with the workers of another checkout, if one is given."""
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        results = list(_baselines())
        checkouts = [(ROOT, "")] + ([(against, _BEFORE)] if against else [])
        # The order alternates: the first one has colder caches.
        for checkout, suffix in checkouts if number % 2 else checkouts[::-1]:
            results += [(name + suffix, value) for name, value in _measure_once(checkout)]
        if number:
            for name, value in results:
                samples[name].append(value)
    report = Report("startup")
    for name, values in samples.items():
        baselines = () if _unit(name) == "MB" else ("python", "reactor")
        before = {"before": name + _BEFORE} if name + _BEFORE in samples else {}
        report.add(name, _unit(name), values, *baselines, **before)
    return report


def main() -> None:
    """Measure and report."""
    against = os.environ.get("AGAINST")
    measure(int(os.environ.get("ROUNDS", "15")), Path(against).resolve() if against else None).write()


if __name__ == "__main__":
    main()
