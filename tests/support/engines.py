"""
Run a command with a container engine of its own, which has this project's images.

    python -m tests.support.engines docker|podman COMMAND...

The command gets the engine's socket in DOCKER_HOST. If it kills the engine, that is started again, as by a
service manager. Needs root and Debian. Without the programs nothing runs, which is a failure only with CI
set. Where the engine does not start, as in a container without privileges, nothing runs either. The base
image is made by debootstrap, since a registry may be out of reach; it and the engines' layers are kept in
build/engines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import IO, TYPE_CHECKING

from tests.support.paths import ROOT
from tests.support.processes import end_process
from tests.support.waiting import block_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = ROOT / "build" / "engines"

_BASE = "debian:bookworm-slim"  # the name in the Dockerfile
_STOP_TIMEOUT = 30.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PROGRAMS = {
    "docker": ("debootstrap", "docker", "dockerd", "runc"),
    "podman": ("catatonit", "debootstrap", "podman", "runc"),
}
_CONFIGURATION = (
    "etc/apt/sources.list",
    "etc/apt/sources.list.d",
    "etc/pip.conf",
    "usr/local/share/ca-certificates",
)
"""What the base image gets from this host, so that a build reaches Debian and PyPI as the host does."""


def missing_programs(engine: str) -> list[str]:
    """Return what is missing here for an engine."""
    missing = (program for program in _PROGRAMS[engine] if not shutil.which(program, path=_PATH))
    return [f"{program} is not installed" for program in missing]


class NoEngineError(Exception):
    """The engine does not start here."""


@contextmanager
def running_engine(engine: str) -> Iterator[str]:
    """
    Start an engine, build the images there, and yield the engine's URL.

    The output of both is in build/engines. Raises `NoEngineError`, and `SystemExit` if the build fails.
    """
    if os.geteuid() != 0:
        raise NoEngineError("this is not root")
    CACHE.mkdir(parents=True, exist_ok=True)
    # A socket's path is short, and a runtime's state is of no use after its end.
    with tempfile.TemporaryDirectory(prefix=f"bfaas-{engine}-", ignore_cleanup_errors=True) as directory:
        socket, state = Path(directory, "engine.sock"), Path(directory, "state")
        url = f"unix://{socket}"
        # Podman's database has the directory of its state, so that stays the same.
        roots = ["--root", str(CACHE / "podman"), "--runroot", str(CACHE / "podman-state")]
        podman = ["podman", *roots, "--runtime", "runc"]
        environ = {**os.environ, "PATH": _PATH, "DOCKER_HOST": url, "DOCKER_BUILDKIT": "0"}
        if engine == "docker":
            data = [
                "--data-root",
                str(CACHE / "docker"),
                "--exec-root",
                str(state),
                "--pidfile",
                f"{directory}/pid",
            ]
            serve = ["dockerd", "--iptables=false", "--bridge=none", "--host", url, *data]
            client = ["docker"]
        else:
            serve, client = [*podman, "system", "service", "--time=0", url], podman
        with Path(CACHE, f"{engine}.log").open("wb") as log:
            service = _Service(serve, environ, socket, log)
            try:
                service.wait_until_listening()
                _build_images(client, environ, Path(CACHE, f"{engine}-build.log"))
                service.restart_when_killed()
                yield url
            finally:
                service.stop()
                _kill_monitors(
                    f"containerd-shim.* -address {state}/" if engine == "docker" else f"conmon.* {CACHE}/"
                )
                _unmount(directory if engine == "docker" else f"{CACHE}/podman")


class _Service:
    """The process of an engine, which listens on a socket, in the directory of that."""

    def __init__(self, command: list[str], environ: dict[str, str], socket: Path, log: IO[bytes]) -> None:
        self._command = command
        self._environ = environ
        self._socket = socket
        self._log = log
        self._lock = Lock()
        self._stopped = False
        self._restarts: Thread | None = None
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Podman's monitor of a container writes a file `oom` to its working directory.
        directory = self._socket.parent
        return subprocess.Popen(
            self._command, env=self._environ, stdout=self._log, stderr=self._log, cwd=directory
        )

    def wait_until_listening(self) -> None:
        """Wait until the engine listens. Raises `NoEngineError` if it ends instead."""
        process = self._process
        block_until(lambda: self._socket.exists() or process.poll() is not None, "the start of the engine")
        if process.poll() is not None:
            raise NoEngineError(f"{self._command[0]} ended with {process.returncode}: see {self._log.name}")

    def restart_when_killed(self) -> None:
        """From now on, start the engine again whenever it ends, until it is stopped."""
        self._restarts = Thread(target=self._keep_running)
        self._restarts.start()

    def _keep_running(self) -> None:
        while True:
            self._process.wait()
            with self._lock:
                if self._stopped:
                    return
                self._socket.unlink(missing_ok=True)
                self._process = self._start()

    def stop(self) -> None:
        """Terminate the engine, and wait until it has ended."""
        with self._lock:
            self._stopped = True
            process = self._process
        end_process(process, _STOP_TIMEOUT)
        if self._restarts is not None:
            self._restarts.join()


def _kill_monitors(pattern: str) -> None:
    """Kill what a killed engine has left: monitors, and containers that were not started yet."""
    command = ["pgrep", "-f", pattern]
    found = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout.split()
    for monitor in found:
        subprocess.run(["pkill", "-KILL", "--parent", monitor], check=False)
        subprocess.run(["kill", "-KILL", monitor], check=False)


def _unmount(directory: str) -> None:
    """Unmount what an engine has left below a directory, so that it can be removed."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{directory}/")]):
        subprocess.run(["umount", mount], check=True)


def _build_images(client: list[str], environ: dict[str, str], log: Path) -> None:
    base = _base_archive()
    isolation = ["--isolation", "chroot"] if client[0] == "podman" else []
    targets = ("basher",) if isolation else ("coord", "basher")  # only Docker runs coordinators, by Compose
    builds = [
        ["build", *isolation, "--network", "host", "--target", target, "--tag", f"bfaas-{target}", "."]
        for target in targets
    ]
    with log.open("wb") as output:
        found = subprocess.run(
            [*client, "image", "inspect", _BASE], env=environ, check=False, stdout=output, stderr=output
        )
        steps = builds if found.returncode == 0 else [["import", str(base), _BASE], *builds]
        for step in steps:
            done = subprocess.run(
                [*client, *step], cwd=ROOT, env=environ, check=False, stdout=output, stderr=output
            )
            if done.returncode != 0:
                raise SystemExit(f"{client[0]} {step[0]} ended with {done.returncode}: see {log}")


def _base_archive() -> Path:
    """Return a tar archive of Debian, which is made if it does not exist."""
    archive = CACHE / "base.tar"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(prefix="bfaas-base-") as directory:
        root = Path(directory, "root")
        debootstrap = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(root)]
        subprocess.run(debootstrap, env={**os.environ, "PATH": _PATH}, check=True, stdout=subprocess.DEVNULL)
        for name in _CONFIGURATION:
            source = Path("/", name)
            if source.is_dir():
                shutil.copytree(source, root / name, dirs_exist_ok=True)
            elif source.exists():
                shutil.copy(source, root / name)
        subprocess.run(["chroot", str(root), "update-ca-certificates"], check=True, stdout=subprocess.DEVNULL)
        unfinished = archive.with_suffix(".new")
        subprocess.run(["tar", "-C", str(root), "-cf", str(unfinished), "."], check=True)
        unfinished.rename(archive)
    return archive


def main() -> int:
    """Run the command of the arguments. Return its exit status."""
    engine, *command = sys.argv[1:]
    if missing := missing_programs(engine):
        print(f"no tests with {engine}: {', '.join(missing)}", file=sys.stderr)
        return 1 if "CI" in os.environ else 0
    try:
        with running_engine(engine) as url:
            return subprocess.run(command, env={**os.environ, "DOCKER_HOST": url}, check=False).returncode
    except NoEngineError as error:
        print(f"SKIPPED: no tests with {engine}: {error}", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main())
