"""Local machines on hosts of many kinds: what is installed, who runs them, who removes their files."""

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
    reactor,
    start,
    start_coordinator,
    start_listening,
    stop,
)
from tests.support.network import free_port
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.responses import Response

with_twisted = pytest_twisted.ensureDeferred
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")
SYSTEM = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
ROOT = Path(bfaas.__file__).resolve().parents[1]


@pytest.fixture
def tmp() -> Iterator[Path]:
    """Make a temporary directory that every user can use, as /tmp is; pytest's own is private."""
    path = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def without_bubblewrap(tmp: Path) -> str:
    """Make a PATH that has everything but bubblewrap."""
    path = tmp / "bin"
    path.mkdir()
    for place in SYSTEM:
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            link = path / program.name
            if program.name != "bwrap" and not link.is_symlink():
                link.symlink_to(program)
    return str(path)


@pytest.fixture(params=["sandboxed", "unsandboxed"])
def path(request: pytest.FixtureRequest) -> str:
    """Search programs with bubblewrap and without."""
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


async def refused(*leaders: str, **settings: str) -> tuple[int | None, bytes]:
    """Start a coordinator that ends by itself; its status, and what it wrote."""
    given = {"WORKER_APP": "mock", "MAXREQTIME": "5s", **settings}
    program, _ = start([*TWISTD, "bfaas-coord", "--listen", "tcp:0"], given, leaders)
    await Deadline(reactor, PATIENCE).run(program.ended)
    return program.status, program.output


def call(*words: str) -> int:
    """Run a program; its exit status."""
    return subprocess.run(words, check=False).returncode


def relative(place: Path) -> Path:
    return Path(os.path.relpath(place))


def matching(place: Path, pattern: str) -> list[Path]:
    return list(place.glob(pattern))


def homes(place: Path) -> list[Path]:
    return list(place.glob("bfaas-machines-*/*/home"))


def directories(place: Path) -> set[str]:
    return {path.name for path in place.glob("bfaas-machines-*")}


def state_of(pid: int) -> str:
    return next((process.state for process in process_tree.process_and_descendants(pid)[:1]), "gone")


async def kill(coordinator: Running) -> None:
    """Kill a coordinator; nothing that was below it survives."""
    processes = coordinator.processes()
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

    async def stand_by() -> bool:
        if state == "suspended":
            return len([pid for pid in coordinator.workers() if state_of(pid) == "T"]) == 2
        metrics = (await coordinator.get("/readyz")).status
        return metrics == 200 and len(coordinator.workers()) == 2

    await wait_until(stand_by)
    await kill(coordinator)


@with_twisted
async def test_sigkill_leaves_no_booting_worker(path: str, tmp: Path) -> None:
    for delay in (0.0, 0.003, 0.01, 0.05, 0.1):
        coordinator = await start_coordinator(PATH=path, POOL_STANDBY="2", TMPDIR=str(tmp))

        async def begin(coordinator: Running = coordinator) -> bool:
            return coordinator.processes() != []

        await wait_until(begin)
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
        machine = json.loads(b"".join(pieces))["id"]
        url = f"/v1/apps/workers/machines/{machine}/suspend"
        suspended = await emulator.request("POST", url, headers=headers)
        assert suspended.status == 200
        await suspended.end()

    async def stopped() -> bool:
        return [state_of(process.pid) for process in emulator.processes()] == ["T"] * 3

    await wait_until(stopped)
    await kill(emulator)


@with_twisted
async def test_the_next_instance_removes_the_files_of_a_killed_one(path: str, tmp: Path) -> None:
    settings = {"PATH": path, "TMPDIR": str(tmp), "POOL_STANDBY": "1"}
    outside = tmp / "outside"
    outside.mkdir(mode=0o711)
    outside.chmod(0o711)
    (outside / "precious").touch()
    (tmp / "bfaas-machines-aaaaaaaa").symlink_to(outside)
    (tmp / "bfaas-machines-notes").mkdir(mode=0o711)
    kept = {"bfaas-machines-aaaaaaaa", "bfaas-machines-notes"}
    if os.geteuid() == 0:
        other = tmp / "bfaas-machines-bbbbbbbb"
        other.mkdir()
        other.chmod(0o711)
        os.chown(other, 12345, 12345)
        kept.add(other.name)

    async def has_one_more() -> bool:
        return len(directories(tmp) - kept) > 0

    async with running(**settings) as living:
        await wait_until(has_one_more)
        kept |= directories(tmp)
        killed = await start_coordinator(**settings)
        await wait_until(has_one_more)
        answer = await killed.run("mkdir -p a/b; touch a/b/c; ln -s / a/root; chmod 0 a; echo $?")
        assert answer.output("stdout") == "0\n"
        left = directories(tmp) - kept
        await kill(killed)
        assert left <= directories(tmp)
        async with running(**settings):

            async def removed() -> bool:
                return not left & directories(tmp)

            await wait_until(removed)
            assert kept <= directories(tmp)
            assert (await living.run("touch x && echo fine")).output("stdout") == "fine\n"
    assert (outside / "precious").exists()


@pytest.mark.parametrize("state", ["started", "suspended"])
@with_twisted
async def test_removed_homes_are_created_again(path: str, state: str, tmp: Path) -> None:
    settings = {"PATH": path, "TMPDIR": str(tmp), "POOL_STANDBY": "1", "POOL_STANDBY_STATE": state}
    async with running(**settings) as coordinator:
        for pattern in ("bfaas-machines-*", "bfaas-machines-*/*", "bfaas-machines-*/*/home"):

            async def stands_by() -> bool:
                return len(coordinator.workers()) > 0 and len(homes(tmp)) > 0

            await wait_until(stands_by)
            for place in matching(tmp, pattern):
                # The coordinator may create the directory again while it is being removed.
                shutil.rmtree(place, ignore_errors=True)
            answers = [await coordinator.run("pwd >x && ls") for _ in range(3)]
            assert [answer.output("stdout") for answer in answers] == ["x\n"] * 3
            assert [answer.output("stderr") for answer in answers] == [""] * 3
        assert b"was removed" in coordinator.program.output
    assert directories(tmp) == set()


@with_twisted
async def test_a_replaced_directory_is_not_used(path: str, tmp: Path) -> None:
    async with running(PATH=path, TMPDIR=str(tmp), POOL_STANDBY="1") as coordinator:

        async def stands_by() -> bool:
            return len(coordinator.workers()) > 0 and len(homes(tmp)) > 0

        await wait_until(stands_by)
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
async def test_systemd_tmpfiles_leaves_a_living_coordinators_directory(tmp: Path) -> None:
    tmpfiles = shutil.which("systemd-tmpfiles")
    if tmpfiles is None:
        pytest.skip("systemd-tmpfiles is not installed")
    (tmp / "old").mkdir()
    config = tmp / "bfaas.conf"
    config.write_text(f"d {tmp} 1777 root root 0\n")
    async with running(TMPDIR=str(tmp), POOL_STANDBY="1") as coordinator:

        async def stands_by() -> bool:
            return len(directories(tmp)) > 0 and len(coordinator.workers()) > 0

        await wait_until(stands_by)
        [name] = directories(tmp)
        before = homes(tmp)
        assert call(tmpfiles, "--clean", str(config)) == 0
        assert not (tmp / "old").exists()
        assert directories(tmp) == {name}
        assert homes(tmp) == before
        assert (await coordinator.run("touch x && echo fine")).output("stdout") == "fine\n"


@with_twisted
async def test_bubblewrap_is_used_from_where_it_was_found(without_bubblewrap: str, tmp: Path) -> None:
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        pytest.skip("bubblewrap is not installed")
    elsewhere = tmp / "opt bwrap" / "bin"
    elsewhere.mkdir(parents=True)
    shutil.copy(bubblewrap, elsewhere / "bwrap")
    async with running(PATH=f"{without_bubblewrap}:{elsewhere}", TMPDIR=str(tmp)) as coordinator:
        assert (await coordinator.run("pwd")).output("stdout") == "/home/worker\n"
        assert b"NO SANDBOX" not in coordinator.program.output


@with_twisted
async def test_temporary_directories_with_unusual_names_are_used(path: str, tmp: Path) -> None:
    place = tmp / "a b'\"$c"
    place.mkdir()
    place.chmod(0o1777)
    (tmp / "link").symlink_to(place)
    for directory in (place, tmp / "link", relative(place)):
        async with running(PATH=path, TMPDIR=str(directory)) as coordinator:
            assert (await coordinator.run("touch x && echo fine")).output("stdout") == "fine\n"
            assert len(directories(place)) == 1


@needs_root
@with_twisted
async def test_homes_are_created_where_scripts_can_use_them(path: str, tmp: Path) -> None:
    private, noexec = tmp / "private", tmp / "noexec"
    private.mkdir(mode=0o700)
    noexec.mkdir()
    mounted = call("mount", "-t", "tmpfs", "-o", "noexec,mode=1777", "t", str(noexec)) == 0
    places = [private, noexec] if mounted else [private]
    try:
        for place in places:
            async with running(PATH=path, TMPDIR=str(place)) as coordinator:
                answer = await coordinator.run("echo 'echo fine' >x && chmod +x x && ./x")
                assert answer.output("stdout") == "fine\n"
                assert f", not to {place}: ".encode() in coordinator.program.output
    finally:
        if mounted:
            assert call("umount", str(noexec)) == 0


@needs_root
@with_twisted
async def test_scripts_have_users_and_limits_of_their_own(without_bubblewrap: str, tmp: Path) -> None:
    settings = {"PATH": without_bubblewrap, "TMPDIR": str(tmp)}
    # 400 each, of 512 that a user may have.
    script = "id -u; for i in {1..400}; do sleep 1000 & done; sleep 1; jobs | wc -l"
    async with running(**settings) as first, running(**settings) as second:
        works = [deferred_run(one, script) for one in (first, first, second)]
        outputs = [(await work).output("stdout").split() for work in works]
    assert [output[1] for output in outputs] == ["400"] * 3
    assert len({output[0] for output in outputs} - {"65534"}) == 3


def deferred_run(coordinator: Running, script: str) -> Deferred[Response]:
    return Deferred.fromCoroutine(coordinator.run(script))


@needs_root
@with_twisted
async def test_a_scripts_user_has_a_name_in_bubblewrap(tmp: Path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    async with running(TMPDIR=str(tmp)) as coordinator:
        answer = await coordinator.run("id -un; id -gn; echo ~; stat -c %U:%G .")
        assert answer.output("stdout") == "worker\nworker\n/home/worker\nworker:worker\n"


@needs_root
@pytest.mark.parametrize(
    "leaders",
    [("setpriv", "--bounding-set=-all", "--inh-caps=-all"), ("unshare", "--map-root-user")],
    ids=["without capabilities", "in a user namespace"],
)
@with_twisted
async def test_root_without_the_capability_to_change_users_serves(
    path: str, leaders: tuple[str, ...], tmp: Path
) -> None:
    if call(*leaders, "true") != 0:
        pytest.skip(f"{leaders[0]} does not work here")
    async with running(*leaders, sys.executable, PATH=path, TMPDIR=str(tmp)) as coordinator:
        answer = await coordinator.run("id -u; touch x && echo fine")
        assert answer.output("stdout") == "0\nfine\n"
        assert b"scripts run as root: " in coordinator.program.output


@with_twisted
async def test_a_host_without_the_confining_programs_is_refused_in_one_line(tmp: Path) -> None:
    hidden = ("bwrap", "--dev-bind", "/", "/", "--bind", "/dev/null", str(shutil.which("choom")))
    if call(*hidden, "true") != 0:
        pytest.skip("bubblewrap does not work here")
    status, said = await refused(*hidden, sys.executable, TMPDIR=str(tmp))
    assert (status, said) == (1, b"bfaas-coord: choom is not installed (it is part of util-linux)\n")
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
async def test_a_worker_that_cannot_change_the_user_is_refused_in_one_line() -> None:
    given = {"PUBLIC": "0" * 64, "FLY_MACHINE_ID": "m", "RUN_AS": "nobody"}
    leaders = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable)
    worker, _ = start([*TWISTD, "bfaas-basher"], given, leaders)
    await Deadline(reactor, PATIENCE).run(worker.ended)
    lacking = b"CAP_KILL, CAP_SETGID, CAP_SETUID"
    said = b"bfaas-basher: RUN_AS: cannot change the user without " + lacking + b"\n"
    assert (worker.status, worker.output) == (1, said)


@with_twisted
async def test_workers_find_the_users_packages(path: str, tmp: Path) -> None:
    base: str = sys._base_executable  # type: ignore[attr-defined]
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = tmp / ".local" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (tmp / ".local").chmod(0o700)
    libraries = [place for place in sys.path if place.endswith("site-packages")]
    (packages / "all.pth").write_text("\n".join([str(ROOT), *libraries]) + "\n")
    async with running(base, PATH=path, HOME=str(tmp), PYTHONPATH="") as coordinator:
        assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"


@with_twisted
async def test_a_worker_imports_nothing_from_the_directory_of_its_coordinator(path: str, tmp: Path) -> None:
    (tmp / "random.py").write_text("raise SystemExit('not this one')\n")
    (tmp / "site-packages").mkdir()
    leaders = ("env", f"--chdir={tmp}", sys.executable, "-P")
    async with running(*leaders, PATH=path) as coordinator:
        assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"


@with_twisted
async def test_a_python_that_does_not_know_its_own_path_starts_workers(tmp: Path) -> None:
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
    places = os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))])
    program = "import sys; assert not sys.executable, sys.executable; "
    program += "from twisted.scripts.twistd import run; run()"
    port = free_port()
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    arguments = ["-c", program, *TWISTD[2:], "bfaas-coord", "--listen", endpoint]
    given = {"WORKER_APP": "mock", "MAXREQTIME": "5s", "PYTHONPATH": places, "TMPDIR": str(tmp)}
    process, pid = start(arguments, given, leaders)
    coordinator = Running(process, port, pid)
    try:

        async def listens() -> bool:
            assert process.status is None, process.output
            return b"starting on" in process.output

        await wait_until(listens)
        assert (await coordinator.run("echo fine")).output("stdout") == "fine\n"
    finally:
        await stop(coordinator)
