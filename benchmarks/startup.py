"""
How soon a worker is ready, how soon it has run something, and how much memory it holds meanwhile.

Each round measures each of these once, one after another; a round is thrown away first, so that bytecode and
files are where they are for all later workers too. In ms, on this process's clock:

- `python`: the baseline: `python -c pass`, from before its start to its end.
- `reactor`: the other: from before the start of a Python that imports Twisted's reactor until it has.
- `healthz`: from before a worker's start to the whole answer to `GET /healthz`, which is asked for anew every
  half a millisecond until then.
- `cold run`: the same to the first byte of a script's output. The script is sent once `healthz` is answered.
- `ready run`: from a script's sending to its output's first byte, at a worker that was idle for a while.
- `freed`: from SIGKILL of such a worker to its end, as a pool frees a machine.

`idle` is the resident memory of that idle worker, in MB (2^20 bytes), and `own` the part of it that is no
file's.

Run it with `python -m benchmarks.startup`. ROUNDS can be set; and AGAINST to the directory of another
checkout, whose workers are then measured in turn with ours, as `... before`.
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
from benchmarks.programs import TRUST, signed
from benchmarks.report import ROOT, Report
from tests.support.network import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ROOT", "measure"]

_IDLE = 0.3
_PATIENCE = 60.0
_BEFORE = " before"
_MARK = b"hello from the script"


def _unit(name: str) -> str:
    return "MB" if name.split(maxsplit=1)[0] in ("idle", "own") else "ms"


class _Worker:
    """A worker of some checkout, from outside."""

    def __init__(self, checkout: Path) -> None:
        self._port = free_port()
        listen = f"tcp:{self._port}:interface=127.0.0.1"
        settings = {**TRUST, "HOME": tempfile.gettempdir()}
        self.started = time.perf_counter()
        self._process = _start(
            ["-m", "bfaas.basher", "--listen", listen], checkout, settings, subprocess.DEVNULL
        )

    def wait_until_ready(self) -> None:
        """Ask for /healthz until it is answered."""
        while True:
            try:
                if self._ask(get("/healthz"), b"ok\n"):
                    return
            except ConnectionError:
                if time.perf_counter() - self.started > _PATIENCE or self._process.poll() is not None:
                    raise
                time.sleep(0.0005)

    def run(self) -> None:
        """Run a script, until the first of its output is there."""
        if not self._ask(signed("echo " + _MARK.decode()), _MARK):
            raise RuntimeError("the script was not run")

    def memory(self) -> Iterator[float]:
        """Tell its resident memory in MB, and what of it is no file's."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        told = dict(line.split(":") for line in lines)
        for name in ("VmRSS", "RssAnon"):
            yield int(told[name].split()[0]) / 1024

    def end(self) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def _ask(self, request: bytes, mark: bytes) -> bool:
        """Send a request, read until a mark; tells whether it came."""
        with socket.create_connection(("127.0.0.1", self._port), _PATIENCE) as connection:
            connection.sendall(request)
            heard = b""
            while mark not in heard:
                data = connection.recv(65536)
                if not data:
                    return False
                heard += data
        return True


def _start(
    arguments: list[str], checkout: Path, settings: dict[str, str], stdout: int
) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=checkout,  # where Python looks before it looks into PYTHONPATH
        env=environment | settings,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
    )


def _ms_since(moment: float) -> float:
    return 1000 * (time.perf_counter() - moment)


def _baselines() -> Iterator[tuple[str, float]]:
    began = time.perf_counter()
    with _start(["-c", "pass"], ROOT, {}, subprocess.DEVNULL) as python:
        python.wait()  # not with a limit: it would look only now and then
        yield "python", _ms_since(began)
    began = time.perf_counter()
    code = "import twisted.internet.reactor, os; os.write(1, b'.')"
    with _start(["-c", code], ROOT, {}, subprocess.PIPE) as python:
        assert python.stdout is not None  # noqa: S101 - it is a pipe
        python.stdout.read(1)
        yield "reactor", _ms_since(began)


def _one(checkout: Path) -> Iterator[tuple[str, float]]:
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
        time.sleep(_IDLE)
        yield from zip(("idle", "own"), worker.memory(), strict=True)
        began = time.perf_counter()
        worker.run()
        yield "ready run", _ms_since(began)
    finally:
        worker.end()
    worker = _Worker(checkout)
    worker.wait_until_ready()
    time.sleep(_IDLE)
    began = time.perf_counter()
    worker.end()
    yield "freed", _ms_since(began)


def measure(rounds: int, against: Path | None = None) -> Report:
    """Measure so many rounds, with workers of another checkout in turn if there is one."""
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        told = list(_baselines())
        turns = [(ROOT, "")] + ([(against, _BEFORE)] if against else [])
        # Whoever is first has colder caches.
        for checkout, suffix in turns if number % 2 else turns[::-1]:
            told += [(name + suffix, value) for name, value in _one(checkout)]
        if number:
            for name, value in told:
                samples[name].append(value)
    report = Report("startup")
    for name, values in samples.items():
        bases = () if _unit(name) == "MB" else ("python", "reactor")
        before = {"before": name + _BEFORE} if name + _BEFORE in samples else {}
        report.add(name, _unit(name), values, *bases, **before)
    return report


def main() -> None:
    """Measure and tell."""
    against = os.environ.get("AGAINST")
    measure(int(os.environ.get("ROUNDS", "15")), Path(against).resolve() if against else None).write()


if __name__ == "__main__":
    main()
