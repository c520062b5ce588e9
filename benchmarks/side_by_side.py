"""
bfaas and the Go original (superfly/bfaas) on one host, under the same load (`benchmarks/compare.py`).

- `original`: the baseline: the original's coordinator and worker.
- `bfaas, its worker`: our coordinator with the original's worker.
- `bfaas`: our coordinator and our worker, as in our image for Fly.
- `standby`: the same with a warm standby for each machine that is not in use.

Each has an emulated Fly of its own (`benchmarks/fly_host.py`), with as many machines, which boot for BOOT
seconds. Everything runs in a network namespace with the names and ports that the original has built in: run
it as root, with `ORIGINAL=DIRECTORY python -m benchmarks.side_by_side`. The directory has the original's
programs, `coord` and `basher`. MACHINES, BOOT and the settings of `compare` can be set.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.client import open_request
from benchmarks.compare import Coordinator, Load, measure
from benchmarks.programs import COORD, DIE_WITH_PARENT
from benchmarks.report import ROOT
from bfaas.tokens import genkey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_INSIDE = "inside"
_HOSTS = "127.0.0.1 localhost\n127.0.0.2 _api.internal workers.flycast\n"
_OWN_WORKER = f"{sys.executable} -m bfaas.basher --listen tcp:8001"
_TIMEOUT = 60.0


@contextmanager
def _running(command: Sequence[str], port: int, host: str = "127.0.0.1", **settings: str) -> Iterator[None]:
    """Run a program; enter the context when it listens."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), "HOME": "/"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*DIE_WITH_PARENT, *command], cwd=ROOT, env=environment | settings, stdout=log, stderr=log
        )
        try:
            started_at = time.monotonic()
            while True:
                try:
                    open_request((host, port), b"").close()
                except ConnectionRefusedError:
                    if process.poll() is not None or time.monotonic() - started_at > _TIMEOUT:
                        raise
                    time.sleep(0.02)
                else:
                    break
            yield
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode("utf-8", "replace"))
            raise
        finally:
            process.terminate()
            process.wait(_TIMEOUT)


@contextmanager
def _coordinator(
    command: Sequence[str], number: int, worker: str, boot: str, settings: Mapping[str, str]
) -> Iterator[Coordinator]:
    """Run a coordinator with an emulated Fly of its own, at 127.0.0.NUMBER."""
    host = f"127.0.0.{number}"
    fly = [
        sys.executable, "-m", "benchmarks.fly_host", "--listen", f"tcp:4280:interface={host}",
        "--proxy", f"tcp:80:interface={host}", "--worker", worker, "--boot", boot, "--network", str(number),
    ]  # fmt: skip
    port = 8000 if command[0] != sys.executable else 8000 + number  # the original's cannot be chosen
    if command[0] == sys.executable:
        command = [*command, "--listen", f"tcp:{port}"]
    own = {"FLY_FLAPS_BASE_URL": f"http://{host}:4280", "WORKER_URL": f"http://{host}"}
    with _running(fly, 4280, host), _running(command, port, **settings, **own):
        yield Coordinator(f"http://127.0.0.1:{port}")


def _measure(original: Path) -> None:
    machines, boot = os.environ.get("MACHINES", "4"), os.environ.get("BOOT", "0.3")
    settings = {
        "WORKER_APP": "workers", "WORKER_IMAGE": "basher:1", "FLY_TOKEN": "Bearer local", "FLY_REGION": "ams",
        "MAXREQTIME": "60s", "POOLSIZE": machines, "FLY_MACHINE_ID": "measured",
    }  # fmt: skip
    own = settings | {"PRIVATE": genkey().private, "MAXPERCLIENT": "1000"}
    basher = str(original / "basher")
    coord = [sys.executable, *COORD]
    kinds = {
        "original": ([str(original / "coord")], basher, settings),
        "bfaas, its worker": (coord, basher, own),
        "bfaas": (coord, _OWN_WORKER, own),
        "standby": (coord, _OWN_WORKER, own | {"POOL_STANDBY": machines}),
    }
    with ExitStack() as running:
        coordinators = {
            name: running.enter_context(_coordinator(command, number, worker, boot, environment))
            for number, (name, (command, worker, environment)) in enumerate(kinds.items(), 2)
        }
        report = measure(coordinators, Load.from_environment(), "side_by_side")
    report.notes.append(f"{machines} machines, boot: {boot} s")
    report.write()


def main() -> None:
    """Enter namespaces, and measure and report there."""
    original = os.environ.get("ORIGINAL")
    if not original:
        raise SystemExit("ORIGINAL is not set: the directory of the original's coord and basher")
    if sys.argv[1:] != [_INSIDE]:
        program = [sys.executable, "-m", "benchmarks.side_by_side", _INSIDE]
        os.execvp("unshare", ["unshare", "--net", "--mount", *program])  # noqa: S606
    with tempfile.NamedTemporaryFile("w", suffix="hosts") as hosts:
        hosts.write(_HOSTS)
        hosts.flush()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["mount", "--bind", hosts.name, "/etc/hosts"], check=True)
        _measure(Path(original).resolve())


if __name__ == "__main__":
    main()
