"""Local machines on different hosts: installed programs, users and privileges, removal of files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

import bfaas
from bfaas.deadline import Deadline
from bfaas.system import process_tree
from tests.e2e.coordinator import (
    PATIENCE,
    TWISTD,
    Running,
    name,
    reactor,
    start,
    start_coordinator,
    start_listening,
    stop,
)
from tests.support.network import free_port
from tests.support.waiting import wait_until
from tests.support.workers import is_fork_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.responses import Response

with_twisted = pytest_twisted.ensureDeferred
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")
SYSTEM = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
ROOT = Path(bfaas.__file__).resolve().parents[1]


@pytest.fixture
def tmp() -> Iterator[Path]:
    """Create a temporary directory that every user can write to, as /tmp; pytest's own is private."""
    path = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def without_bubblewrap(tmp: Path) -> str:
    """Return a PATH with all programs except bubblewrap."""
    path = tmp / "bin"
    path.mkdir()
    for folder in SYSTEM:
        for program in Path(folder).glob("*") if Path(folder).is_dir() else ():
            link = path / program.name
            if program.name != "bwrap" and not link.is_symlink():
                link.symlink_to(program)
    return str(path)


@pytest.fixture(params=["sandboxed", "unsandboxed"])
def path(request: pytest.FixtureRequest) -> str:
    """Return a PATH with bubblewrap or without, depending on the parameter."""
    if request.param == "unsandboxed":
        return str(request.getfixturevalue("without_bubblewrap"))
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    return os.environ["PATH"]


@asynccontextmanager
async def running(*leaders: str, **settings: str) -> AsyncIterator[Running]:
    coordinator = await start_coordinator(*leaders, **settings)
    try:
        yield coordinator
    finally:
        await stop(coordinator)


async def run_rejected(*leaders: str, **settings: str) -> tuple[int | None, bytes]:
    """Start a coordinator with settings that it rejects; return its exit status and its output."""
    settings = {"WORKER_APP": "mock", "MAXREQTIME": "5s", **settings}
    program, _ = start([*TWISTD, "bfaas-coord", "--listen", "tcp:0"], settings, leaders)
    await Deadline(reactor, PATIENCE).run(program.ended)
    return program.status, program.output


def call(*command: str) -> int:
    """Run a program; return its exit status."""
    return subprocess.run(command, check=False).returncode


def relative(parent: Path) -> Path:
    return Path(os.path.relpath(parent))


def matching(parent: Path, pattern: str) -> list[Path]:
    return list(parent.glob(pattern))


def homes(parent: Path) -> list[Path]:
    return list(parent.glob("bfaas-machines-*/*/home"))


def directories(parent: Path) -> set[str]:
    return {path.name for path in parent.glob("bfaas-machines-*")}


def state_of(pid: int) -> str:
    return next((process.state for process in process_tree.process_and_descendants(pid)[:1]), "gone")


async def kill(coordinator: Running) -> None:
    """Kill a coordinator, and wait until all its descendants have ended, its fork server included."""
    processes = process_tree.descendants(coordinator.pid)
    coordinator.kill(signal.SIGKILL)
    await Deadline(reactor, PATIENCE).run(coordinator.program.ended)

    async def gone() -> bool:
        return not any(map(process_tree.is_running, processes))

    await wait_until(gone)


@pytest.mark.parametrize("state", ["started", "suspended"])
@with_twisted
async def test_sigkill_leaves_no_warm_standby(path: str, state: str, tmp: Path) -> None:
    coordinator = await start_coordinator(
        PATH=path, POOL_STANDBY="2", POOL_STANDBY_STATE=state, TMPDIR=str(tmp)
    )

    async def ready() -> bool:
        if state == "suspended":
            return len([pid for pid in coordinator.workers() if state_of(pid) == "T"]) == 2
        status = (await coordinator.get("/readyz")).status
        return status == 200 and len(coordinator.workers()) == 2

    await wait_until(ready)
    await kill(coordinator)


@with_twisted
async def test_sigkill_leaves_no_booting_worker(path: str, tmp: Path) -> None:
    for delay in (0.0, 0.003, 0.01, 0.05, 0.1):
        coordinator = await start_coordinator(PATH=path, POOL_STANDBY="2", TMPDIR=str(tmp))

        async def has_processes(coordinator: Running = coordinator) -> bool:
            return coordinator.processes() != []

        await wait_until(has_processes)
        await deferToThread(time.sleep, delay)
        await kill(coordinator)


@with_twisted
async def test_sigkill_leaves_no_worker_suspended_during_its_boot(path: str, tmp: Path) -> None:
    proxy = f"tcp:{free_port()}:interface=127.0.0.1"
    emulator = await start_listening(
        "bfaas-machines", free_port(), ["--proxy", proxy], {"PATH": path, "TMPDIR": str(tmp)}
    )
    config = json.dumps({"config": {"image": "i", "env": {"PUBLIC": "0" * 64}}}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer any"}
    for _ in range(3):
        pieces: list[bytes] = []
        created = await emulator.request("POST", "/v1/apps/workers/machines", config, pieces.append, headers)
        await created.end()
        assert created.status == 200, pieces
        url = f"/v1/apps/workers/machines/{json.loads(b''.join(pieces))['id']}"
        started = await emulator.request("GET", f"{url}/wait?state=started&timeout=20", headers=headers)
        assert started.status == 200
        await started.end()
        suspended = await emulator.request("POST", f"{url}/suspend", headers=headers)
        assert suspended.status == 200
        await suspended.end()

    async def stopped() -> bool:
        return [state_of(process.pid) for process in emulator.processes()] == ["T"] * 3

    await wait_until(stopped)
    await kill(emulator)


@with_twisted
async def test_a_killed_fork_server_is_replaced_and_its_workers_end(path: str, tmp: Path) -> None:
    coordinator = await start_coordinator(PATH=path, POOL_STANDBY="1", TMPDIR=str(tmp))
    for _ in range(2):
        pieces: list[bytes] = []
        run = await coordinator.begin("echo up; setsid sleep 1000 & sleep 1000", take=pieces.append)

        async def sleeps() -> bool:
            return len([each for each in coordinator.processes() if name(each.pid) == b"sleep"]) == 2

        await wait_until(sleeps)
        descendants = process_tree.descendants(coordinator.pid)
        [server] = [process for process in descendants if is_fork_server(process.pid)]
        os.kill(server.pid, signal.SIGKILL)
        await run.end()
        assert b'"reason": "worker-lost"' in b"".join(pieces)

        async def gone(descendants: list[process_tree.Process] = descendants) -> bool:
            return not any(map(process_tree.is_running, descendants))

        await wait_until(gone)

        async def runs() -> bool:  # until the pool has noticed that its standby has ended
            return (await coordinator.run("echo again")).status == 200

        await wait_until(runs)
    assert await stop(coordinator) == 0
    assert b"the fork server ended with None" in coordinator.program.output


@with_twisted
async def test_a_new_coordinator_removes_the_files_of_a_killed_one(path: str, tmp: Path) -> None:
    settings = {"PATH": path, "TMPDIR": str(tmp), "POOL_STANDBY": "1"}
    outside = tmp / "outside"
    outside.mkdir(mode=0o711)
    outside.chmod(0o711)
    (outside / "unrelated").touch()
    (tmp / "bfaas-machines-aaaaaaaa").symlink_to(outside)
    (tmp / "bfaas-machines-notes").mkdir(mode=0o711)
    expected = {"bfaas-machines-aaaaaaaa", "bfaas-machines-notes"}
    if os.geteuid() == 0:
        other = tmp / "bfaas-machines-bbbbbbbb"
        other.mkdir()
        other.chmod(0o711)
        os.chown(other, 12345, 12345)
        expected.add(other.name)

    async def has_one_more() -> bool:
        return len(directories(tmp) - expected) > 0

    async with running(**settings) as survivor:
        await wait_until(has_one_more)
        expected |= directories(tmp)
        killed = await start_coordinator(**settings)
        await wait_until(has_one_more)
        response = await killed.run("mkdir -p a/b; touch a/b/c; ln -s / a/root; chmod 0 a; echo $?")
        assert response.output("stdout") == "0\n"
        stale = directories(tmp) - expected
        await kill(killed)
        assert stale <= directories(tmp)
        async with running(**settings):

            async def removed() -> bool:
                return not stale & directories(tmp)

            await wait_until(removed)
            assert expected <= directories(tmp)
            assert (await survivor.run("touch x && echo fine")).output("stdout") == "fine\n"
    assert (outside / "unrelated").exists()


@pytest.mark.parametrize("state", ["started", "suspended"])
@with_twisted
async def test_removed_homes_are_created_again(path: str, state: str, tmp: Path) -> None:
    settings = {"PATH": path, "TMPDIR": str(tmp), "POOL_STANDBY": "1", "POOL_STANDBY_STATE": state}
    async with running(**settings) as coordinator:
        for pattern in ("bfaas-machines-*", "bfaas-machines-*/*", "bfaas-machines-*/*/home"):

            async def ready() -> bool:
                return len(coordinator.workers()) > 0 and len(homes(tmp)) > 0

            await wait_until(ready)
            for folder in matching(tmp, pattern):
                # The coordinator may create the directory again while it is being removed.
                shutil.rmtree(folder, ignore_errors=True)
            # It does so 10 ms after the removal. A run that starts before that may find no home.
            await wait_until(ready)
            responses = [await coordinator.run("pwd >x && ls") for _ in range(3)]
            assert [response.output("stdout") for response in responses] == ["x\n"] * 3
            assert [response.output("stderr") for response in responses] == [""] * 3
        assert b"was removed" in coordinator.program.output
    assert directories(tmp) == set()


@with_twisted
async def test_a_replaced_directory_is_not_used(path: str, tmp: Path) -> None:
    async with running(PATH=path, TMPDIR=str(tmp), POOL_STANDBY="1") as coordinator:

        async def ready() -> bool:
            return len(coordinator.workers()) > 0 and len(homes(tmp)) > 0

        await wait_until(ready)
        [name] = directories(tmp)
        (tmp / name).rename(tmp / "moved")
        (tmp / name).symlink_to("/")

        async def is_replaced() -> bool:
            return len(homes(tmp)) > 0 and directories(tmp) != {name}

        await wait_until(is_replaced)
        assert (await coordinator.run("touch x && echo fine")).output("stdout") == "fine\n"
    assert (tmp / name).is_symlink()


@needs_root
@with_twisted
async def test_systemd_tmpfiles_does_not_remove_the_directory_of_a_running_coordinator(tmp: Path) -> None:
    tmpfiles = shutil.which("systemd-tmpfiles")
    if tmpfiles is None:
        pytest.skip("systemd-tmpfiles is not installed")
    (tmp / "old").mkdir()
    config = tmp / "bfaas.conf"
    config.write_text(f"d {tmp} 1777 root root 0\n")
    async with running(TMPDIR=str(tmp), POOL_STANDBY="1") as coordinator:

        async def ready() -> bool:
            return len(directories(tmp)) > 0 and len(coordinator.workers()) > 0

        await wait_until(ready)
        [name] = directories(tmp)
        before = homes(tmp)
        assert call(tmpfiles, "--clean", str(config)) == 0
        assert not (tmp / "old").exists()
        assert directories(tmp) == {name}
        assert homes(tmp) == before
        assert (await coordinator.run("touch x && echo fine")).output("stdout") == "fine\n"


@with_twisted
async def test_bubblewrap_is_found_in_any_directory_of_path(without_bubblewrap: str, tmp: Path) -> None:
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        pytest.skip("bubblewrap is not installed")
    directory = tmp / "opt bwrap" / "bin"
    directory.mkdir(parents=True)
    shutil.copy(bubblewrap, directory / "bwrap")
    async with running(PATH=f"{without_bubblewrap}:{directory}", TMPDIR=str(tmp)) as coordinator:
        assert (await coordinator.run("pwd")).output("stdout") == "/home/worker\n"
        assert b"NO SANDBOX" not in coordinator.program.output


@with_twisted
async def test_temporary_directories_with_unusual_names_are_used(path: str, tmp: Path) -> None:
    unusual = tmp / "a b'\"$c"
    unusual.mkdir()
    unusual.chmod(0o1777)
    (tmp / "link").symlink_to(unusual)
    for directory in (unusual, tmp / "link", relative(unusual)):
        async with running(PATH=path, TMPDIR=str(directory)) as coordinator:
            assert (await coordinator.run("touch x && echo fine")).output("stdout") == "fine\n"
            assert len(directories(unusual)) == 1


@needs_root
@with_twisted
async def test_homes_are_created_where_scripts_can_use_them(path: str, tmp: Path) -> None:
    private, noexec = tmp / "private", tmp / "noexec"
    private.mkdir(mode=0o700)
    noexec.mkdir()
    mounted = call("mount", "-t", "tmpfs", "-o", "noexec,mode=1777", "t", str(noexec)) == 0
    parents = [private, noexec] if mounted else [private]
    try:
        for parent in parents:
            async with running(PATH=path, TMPDIR=str(parent)) as coordinator:
                response = await coordinator.run("echo 'echo fine' >x && chmod +x x && ./x")
                assert response.output("stdout") == "fine\n"
                assert f", not to {parent}: ".encode() in coordinator.program.output
    finally:
        if mounted:
            assert call("umount", str(noexec)) == 0


@needs_root
@with_twisted
async def test_each_script_has_its_own_user_and_process_limit(without_bubblewrap: str, tmp: Path) -> None:
    settings = {"PATH": without_bubblewrap, "TMPDIR": str(tmp)}
    # Each script has 400 processes; the limit for one user is 512.
    script = "id -u; for i in {1..400}; do sleep 1000 & done; sleep 1; jobs | wc -l"
    async with running(**settings) as first, running(**settings) as second:
        runs = [deferred_run(coordinator, script) for coordinator in (first, first, second)]
        outputs = [(await run).output("stdout").split() for run in runs]
    assert [output[1] for output in outputs] == ["400"] * 3
    assert len({output[0] for output in outputs} - {"65534"}) == 3


def deferred_run(coordinator: Running, script: str) -> Deferred[Response]:
    return Deferred.fromCoroutine(coordinator.run(script))


@needs_root
@with_twisted
async def test_the_user_of_a_script_has_a_name_in_bubblewrap(tmp: Path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    async with running(TMPDIR=str(tmp)) as coordinator:
        response = await coordinator.run("id -un; id -gn; echo ~; stat -c %U:%G .")
        assert response.output("stdout") == "worker\nworker\n/home/worker\nworker:worker\n"


@needs_root
@pytest.mark.parametrize(
    "leaders",
    [("setpriv", "--bounding-set=-all", "--inh-caps=-all"), ("unshare", "--map-root-user")],
    ids=["without capabilities", "in a user namespace"],
)
@with_twisted
async def test_root_without_the_capability_to_change_users_runs_scripts_as_root(
    path: str, leaders: tuple[str, ...], tmp: Path
) -> None:
    if call(*leaders, "true") != 0:
        pytest.skip(f"{leaders[0]} does not work here")
    async with running(*leaders, sys.executable, PATH=path, TMPDIR=str(tmp)) as coordinator:
        response = await coordinator.run("id -u; touch x && echo fine")
        assert response.output("stdout") == "0\nfine\n"
        assert b"scripts run as root: " in coordinator.program.output


@with_twisted
async def test_missing_confinement_programs_are_reported_in_one_line(tmp: Path) -> None:
    hidden = ("bwrap", "--dev-bind", "/", "/", "--bind", "/dev/null", str(shutil.which("choom")))
    if call(*hidden, "true") != 0:
        pytest.skip("bubblewrap does not work here")
    status, output = await run_rejected(*hidden, sys.executable, TMPDIR=str(tmp))
    assert (status, output) == (1, b"bfaas-coord: choom is not installed (it is part of util-linux)\n")
    worker, _ = start(
        [*TWISTD, "bfaas-basher"],
        {"PUBLIC": "0" * 64, "FLY_MACHINE_ID": "m"},
        (*hidden, sys.executable),
    )
    await Deadline(reactor, PATIENCE).run(worker.ended)
    assert (worker.status, worker.output) == (
        1,
        b"bfaas-basher: choom is not installed (it is part of util-linux)\n",
    )


@needs_root
@with_twisted
async def test_a_worker_that_cannot_change_the_user_reports_it_in_one_line() -> None:
    settings = {"PUBLIC": "0" * 64, "FLY_MACHINE_ID": "m", "RUN_AS": "nobody"}
    leaders = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable)
    worker, _ = start([*TWISTD, "bfaas-basher"], settings, leaders)
    await Deadline(reactor, PATIENCE).run(worker.ended)
    missing = b"CAP_KILL, CAP_SETGID, CAP_SETUID"
    message = b"bfaas-basher: RUN_AS: cannot change the user without " + missing + b"\n"
    assert (worker.status, worker.output) == (1, message)


@with_twisted
async def test_workers_import_packages_of_the_users_site_directory(path: str, tmp: Path) -> None:
    base: str = sys._base_executable  # type: ignore[attr-defined]
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = tmp / ".local" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (tmp / ".local").chmod(0o700)
    libraries = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "all.pth").write_text("\n".join([str(ROOT), *libraries]) + "\n")
    async with running(base, PATH=path, HOME=str(tmp), PYTHONPATH="") as coordinator:
        assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"


@with_twisted
async def test_workers_import_nothing_from_the_working_directory(path: str, tmp: Path) -> None:
    (tmp / "random.py").write_text("raise SystemExit('imported the wrong module')\n")
    (tmp / "site-packages").mkdir()
    leaders = ("env", f"--chdir={tmp}", sys.executable, "-P")
    async with running(*leaders, PATH=path) as coordinator:
        assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"


@with_twisted
async def test_workers_start_with_a_python_that_does_not_know_its_own_path(tmp: Path) -> None:
    base: str = sys._base_executable  # type: ignore[attr-defined]
    leaders = (
        "env",
        "-C",
        "/",
        "-u",
        "PATH",
        f"PYTHONHOME={sys.base_prefix}",
        "bash",
        "-c",
        f'exec -a "" {base} "$@"',
        "bash",
    )
    module_path = os.pathsep.join(
        [str(ROOT), *(entry for entry in sys.path if entry.endswith("site-packages"))]
    )
    program = "import sys; assert not sys.executable, sys.executable; "
    program += "from twisted.scripts.twistd import run; run()"
    port = free_port()
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    arguments = ["-c", program, *TWISTD[2:], "bfaas-coord", "--listen", endpoint]
    settings = {"WORKER_APP": "mock", "MAXREQTIME": "5s", "PYTHONPATH": module_path, "TMPDIR": str(tmp)}
    process, pid = start(arguments, settings, leaders)
    coordinator = Running(process, port, pid)
    try:

        async def listens() -> bool:
            assert process.status is None, process.output
            return b"starting on" in process.output

        await wait_until(listens)
        assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"
    finally:
        await stop(coordinator)
