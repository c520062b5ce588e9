"""Starting the roles: one-line errors, unusual process environments, and the signals that stop them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.trial.unittest import SkipTest, SynchronousTestCase

import bfaas
from bfaas.system import process_tree
from bfaas.tokens import genkey
from tests.support.network import free_port
from tests.unit.system.test_listener import REJECTED_ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TIMEOUT = 120.0

DAEMON = (sys.executable, "-P", "-c", "from twisted.scripts.twistd import run; run()")
FOREGROUND = (*DAEMON, "-n", "--pidfile=")
COORD = (*FOREGROUND, "bfaas-coord")
BASHER = (*FOREGROUND, "bfaas-basher")
BASHER_WITHOUT_TWISTD = (sys.executable, "-m", "bfaas.basher")
MACHINES = (*FOREGROUND, "bfaas-machines")

ROOT = str(Path(bfaas.__file__).resolve().parents[1])
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": ROOT, "HOME": "/"}
MOCK = {**ENVIRONMENT, "WORKER_APP": "mock", "MAXREQTIME": "20s"}
WORKER = {**ENVIRONMENT, "PUBLIC": genkey().public, "FLY_MACHINE_ID": "m1"}

PREPARE = """
import os, resource, signal, sys
{}
os.execv(sys.executable, sys.argv[1:])
"""
"""Changes something of the process, then executes a command."""

FULL_PIPE = """
inner, outer = os.pipe()
os.set_blocking(outer, False)
try:
    while True:
        os.write(outer, bytes(4096))
except BlockingIOError:
    os.set_blocking(outer, True)
os.dup2(outer, 1)
os.set_inheritable(inner, True)
"""


def prepared(preparation: str, command: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", PREPARE.format(preparation), *command]


def run(port: int, script: str) -> str:
    """Run a script on a coordinator as soon as it listens, and return the raw response."""
    limit = time.monotonic() + TIMEOUT
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        try:
            connection.request("POST", "/run?raw=1", script.encode())
            return connection.getresponse().read().decode()
        except ConnectionRefusedError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)
        finally:
            connection.close()


def wait_for_exit(pid: int) -> None:
    limit = time.monotonic() + TIMEOUT
    # A daemon may be this process's to reap: tests before may have made it the subreaper.
    while (stat := _read(f"/proc/{pid}/stat")) and stat.rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < limit, f"{pid} does not exit"
        time.sleep(0.05)


class StartTestCase(SynchronousTestCase):
    timeout = 10 * TIMEOUT

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)

    def used_port(self) -> int:
        used = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(used.close)
        port: int = used.getsockname()[1]
        return port


class ErrorTests(StartTestCase):
    """A start error is one line on standard error, with exit code 1."""

    def cases(self) -> Iterator[tuple[Sequence[str], Mapping[str, str], str]]:
        used = f"tcp:{self.used_port()}:interface=127.0.0.1"
        listens = {
            "tcp:foo": "--listen tcp:foo: invalid literal",
            used: "Couldn't listen on 127.0.0.1:[0-9]+: .*Address already in use",
        }
        # A lean worker does not import what TLS needs.
        lean = {**REJECTED_ENDPOINTS, **listens, "ssl:0:privateKey=/nonexistent": "--listen ssl:.*OpenSSL"}
        for endpoint, line in lean.items():
            yield (*BASHER_WITHOUT_TWISTD, "--listen", endpoint), WORKER, line
        for endpoint, line in listens.items():
            yield (*COORD, "--listen", endpoint), MOCK, line
            yield (*BASHER, "--listen", endpoint), WORKER, line
            yield (*MACHINES, "--listen", endpoint), ENVIRONMENT, line
            proxy_line = line.replace("--listen", "--proxy")
            yield (*MACHINES, "--listen", "tcp:0", "--proxy", endpoint), ENVIRONMENT, proxy_line
            metrics_line = line.replace("--listen", "--metrics")
            yield (*COORD, "--listen", "tcp:0", "--metrics", endpoint), MOCK, metrics_line
        for command, settings in (
            (COORD, MOCK),
            (BASHER, WORKER),
            (BASHER_WITHOUT_TWISTD, WORKER),
            (MACHINES, ENVIRONMENT),
        ):
            yield (*command, "--nonsense"), settings, "option --nonsense not recognized"
            yield (*command, "nonsense"), settings, "Wrong number of arguments"
            yield (
                prepared("resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))", command),
                settings,
                "open files",
            )
        for command in (COORD, BASHER, BASHER_WITHOUT_TWISTD):
            settings = MOCK if command is COORD else WORKER
            yield (*command, "--log-format", "xml"), settings, "'xml' is neither text nor json"
        for home in ("/etc/passwd", "/nonexistent"):
            yield (*BASHER_WITHOUT_TWISTD, "--listen", "tcp:0"), {**WORKER, "HOME": home}, f"HOME: .*'{home}'"
            yield (*BASHER, "--listen", "tcp:0"), {**WORKER, "HOME": home}, f"HOME: .*'{home}'"
        yield COORD, {**MOCK, "MAXREQTIME": "\udcff"}, "MAXREQTIME: "
        yield COORD, {**MOCK, "ACCESS_TOKENS": "@/nonexistent"}, "ACCESS_TOKENS: /nonexistent: No such file"
        yield COORD, {**MOCK, "ACCESS_TOKENS": "alice"}, "ACCESS_TOKENS: line 1 is not NAME:DIGEST"
        yield (
            (*DAEMON, "-n", "--pidfile=/nonexistent/pid", "bfaas-coord"),
            MOCK,
            "--pidfile /nonexistent/pid: ",
        )
        yield (
            (*FOREGROUND, "--logfile=/nonexistent/log", "bfaas-coord"),
            MOCK,
            "'/nonexistent/log'|'/nonexistent'",
        )
        yield (*FOREGROUND, "--rundir=/nonexistent", "bfaas-coord"), MOCK, "'/nonexistent'"
        low_memory = prepared("resource.setrlimit(resource.RLIMIT_AS, (50 << 20, 50 << 20))", COORD)
        yield low_memory, MOCK, "ImportError|MemoryError"

    def test_each_error_is_one_line(self) -> None:
        def start(case: tuple[Sequence[str], Mapping[str, str], str]) -> None:
            command, settings, line = case
            completed = subprocess.run(
                command, check=False, capture_output=True, env=settings, cwd=self.directory, timeout=TIMEOUT
            )
            out, err = completed.stdout.decode(), completed.stderr.decode()
            self.assertEqual(1, completed.returncode, (command, out, err))
            self.assertNotIn("Traceback", out + err)
            self.assertNotIn("Usage", out + err)
            self.assertEqual(1, len(err.splitlines()), (command, out, err))
            self.assertRegex(err, f"^bfaas-[a-z]+: .*({line})", command)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(start, self.cases()))

    def test_missing_temporary_directory_is_one_line(self) -> None:
        bwrap = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--"]
        if subprocess.run([*bwrap, "true"], check=False, capture_output=True).returncode:
            raise SkipTest("bubblewrap does not work here")
        for command in (COORD, MACHINES):
            completed = subprocess.run(
                [*bwrap, *command], check=False, capture_output=True, env=MOCK, cwd="/"
            )
            self.assertEqual(
                (1, 1), (completed.returncode, len(completed.stderr.splitlines())), completed.stderr
            )
            self.assertRegex(completed.stderr.decode(), "^bfaas-[a-z]+: .*(temporary directory|directory)")

    def test_daemon_logs_the_line_and_leaves_no_pid_file(self) -> None:
        used = f"tcp:{self.used_port()}:interface=127.0.0.1"
        for role, settings in (("coord", MOCK), ("basher", WORKER), ("machines", ENVIRONMENT)):
            log = self.directory / f"{role}.log"
            options = [f"--pidfile={self.directory}/pid", f"--logfile={log}", f"bfaas-{role}"]
            completed = subprocess.run(
                [*DAEMON, *options, "--listen", used],
                check=False, env=settings, cwd=self.directory, stderr=subprocess.PIPE, timeout=TIMEOUT,
            )  # fmt: skip
            self.assertEqual(1, completed.returncode)
            self.assertIn(b"Couldn't listen on 127.0.0.1:", completed.stderr)
            # The parent, which waits for the daemon's start, may exit before the daemon.
            limit = time.monotonic() + TIMEOUT
            while f"bfaas-{role}: Couldn't listen on 127.0.0.1:" not in (text := log.read_text()):
                self.assertLess(time.monotonic(), limit, text)
                time.sleep(0.05)
            self.assertNotIn("Traceback", text)
            self.assertFalse((self.directory / "pid").exists())


class StartTests(StartTestCase):
    """Roles work in unusual process environments."""

    def start(
        self, preparation: str = "", settings: Mapping[str, str] = MOCK
    ) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        command = prepared(preparation, (*COORD, "--listen", f"tcp:{port}:interface=127.0.0.1"))
        program = subprocess.Popen(
            command, env=settings, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

        def clean_up() -> None:
            if program.poll() is None:
                program.kill()
            program.communicate()

        self.addCleanup(clean_up)
        self.assertEqual("hi\n\nexit: 3\n", run(port, "echo hi; exit 3"))
        return program, port

    def test_ignored_and_blocked_signals_closed_files_removed_directory_and_umask(self) -> None:
        program, port = self.start("""
os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone"); os.umask(0o077)
for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE): signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for number in range(3): os.close(number)
""")
        for number in range(3):
            self.assertEqual("/dev/null", str(Path(f"/proc/{program.pid}/fd/{number}").readlink()))
        script = "umask; sed -n 's/SigBlk:.//p' /proc/self/status; trap 'echo hup' HUP; kill -HUP $$"
        self.assertEqual("0022\n0000000000000000\nhup\n\nexit: 0\n", run(port, script))
        program.send_signal(signal.SIGHUP)
        self.assertIn("hi\n", run(port, "echo hi"))
        program.send_signal(signal.SIGTERM)
        self.assertEqual(0, program.wait(TIMEOUT))

    def test_full_pipe_as_output_and_few_open_files(self) -> None:
        limit = "\nresource.setrlimit(resource.RLIMIT_NOFILE, (133, 133))"
        program, port = self.start(FULL_PIPE + limit)
        for _ in range(3):
            self.assertIn("hi\n", run(port, "echo hi"))
        program.send_signal(signal.SIGHUP)
        self.assertEqual(0, program.wait(TIMEOUT))

    def test_full_disk_and_almost_empty_environment(self) -> None:
        environment = {
            "WORKER_APP": "mock",
            "MAXREQTIME": "20s",
            "PYTHONPATH": ROOT,
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
        }
        program, _ = self.start("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", environment)
        program.send_signal(signal.SIGINT)
        self.assertEqual(0, program.wait(TIMEOUT))

    def test_daemon_reaps_orphans_and_rotates_its_json_log(self) -> None:
        tools = self.directory / "bin"
        tools.mkdir()
        for place in reversed(os.environ["PATH"].split(":")):
            for tool in Path(place).glob("*"):
                link = tools / tool.name
                if tool.name != "bwrap" and not link.exists():
                    link.symlink_to(tool)
        port, pid_file, log = free_port(), self.directory / "pid", self.directory / "log"
        options = [f"--pidfile={pid_file}", f"--logfile={log}", "bfaas-coord", "--log-format", "json"]
        listen = f"tcp:{port}:interface=127.0.0.1"
        subprocess.run(
            [*DAEMON, *options, "--listen", listen],
            check=True, env={**MOCK, "PATH": str(tools)}, cwd=self.directory, timeout=TIMEOUT,
        )  # fmt: skip
        pid = int(pid_file.read_text())
        try:
            self.assertIn("hi\n", run(port, "echo hi"))
            os.kill(pid, signal.SIGUSR1)
            # Orphans of the killed worker become children of the coordinator.
            with ThreadPoolExecutor(1) as pool:
                started = pool.submit(run, port, "setsid sleep 1000 & sleep 1000 & wait")
                while not (sleeps := [p for p in process_tree.descendants(pid) if _name(p.pid) == "sleep"]):
                    time.sleep(0.05)
                [worker] = [p for p in process_tree.descendants(pid) if _name(p.pid) == "bfaas-basher"]
                os.kill(worker.pid, signal.SIGKILL)
                self.assertIn("worker-lost", started.result(TIMEOUT))
            for sleep in sleeps:
                wait_for_exit(sleep.pid)
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_for_exit(pid)
        self.assertFalse(pid_file.exists())
        logs = [self.directory / "log.1", log]
        lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
        self.assertTrue(all(re.match(r"\d{4}-", line["time"]) for line in lines))
        self.assertEqual(2, len([line for line in lines if "outcome" in line]))


def _name(pid: int) -> str:
    return _read(f"/proc/{pid}/comm").strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
