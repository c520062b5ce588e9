"""The worker: its application with a simulated process, and as a program with real scripts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import skipUnless

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.error import ConnectionDone, ProcessDone
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.python.filepath import FilePath
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.server import Site

from bfaas.settings import BasherSettings
from bfaas.system import process_tree
from bfaas.system.confinement import STARTED_FD, Confinement
from bfaas.tokens import Signer, genkey
from bfaas.worker.app import WorkerApp
from tests.support.waiting import wait_until
from tests.support.workers import BASHER, KEYS, LIMIT, MACHINE, TWISTD, Reader, Worker, auth_token, reactor

if TYPE_CHECKING:
    from twisted.internet.protocol import ProcessProtocol

ENDLESS = "echo up; setsid sleep 1000 & sleep 1000 | cat; :"


class FakeTransport:
    """A process transport without a process."""

    pid = 1 << 30  # no process has this number

    def __init__(self) -> None:
        self.pipes: dict[int, Any] = {}

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        pass

    def signalProcess(self, _: str) -> None:
        pass

    def closeChildFD(self, number: int) -> None:
        del self.pipes[number]


class FakeReactor(Clock):
    """A clock whose only process is simulated by the test."""

    error: OSError | None = None
    script_starts = True
    process: ProcessProtocol
    transport: FakeTransport

    def spawnProcess(self, protocol: ProcessProtocol, *_: object, **__: object) -> None:
        if self.error is not None:
            raise self.error
        self.process = protocol
        transport = FakeTransport()
        self.transport = transport
        protocol.makeConnection(transport)
        for pipe in transport.pipes.values():
            os.close(pipe.fileno())
        transport.pipes.clear()
        if self.script_starts:
            protocol.childDataReceived(STARTED_FD, b"\n")

    def addReader(self, reader: object) -> None:
        pass


class FakeProcessTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.finished = 0
        self.reactor = FakeReactor()
        self.clock_error = 0.0
        settings = BasherSettings.from_environment({"PUBLIC": KEYS.public, "FLY_MACHINE_ID": MACHINE})
        reactor: Any = self.reactor

        def wall_clock() -> float:
            return time.time() + self.clock_error

        app = WorkerApp(reactor, settings, Confinement(), wall_clock, self.on_finished)
        self.site = Site(app.app.resource(), reactor=self.reactor)

    def on_finished(self) -> None:
        self.finished += 1

    def post(self, query: str = "", body: str = ":", kind: str = "text/plain") -> str:
        """Send a request and return the head of the response."""
        self.transport = StringTransport()
        self.channel = self.site.buildProtocol(None)
        self.channel.makeConnection(self.transport)
        length = len(body.encode())
        head = f"POST /run{query} HTTP/1.0\r\nAuthorization: {auth_token()}\r\nContent-Length: {length}\r\n"
        self.channel.dataReceived(f"{head}Content-Type: {kind}\r\n\r\n{body}".encode())
        head, _, self.body = self.written().decode().partition("\r\n\r\n")
        return head

    def written(self) -> bytes:
        """Return what was written since the last call."""
        data: bytes = self.transport.value()
        self.transport.clear()
        return data

    def write_output(self, data: bytes, stream: int = 1) -> bytes:
        self.reactor.process.childDataReceived(stream, data)
        return self.written()

    def end(self) -> bytes:
        """End the process, then the connection. No delayed call may remain."""
        self.reactor.process.processExited(Failure(ProcessDone(0)))
        self.reactor.process.processEnded(Failure(ProcessDone(0)))
        self.channel.connectionLost(Failure(ConnectionDone()))
        self.assertEqual([], self.reactor.getDelayedCalls())
        return self.written()

    def test_rejected_body_leaves_the_worker_unused(self) -> None:
        for kind, body, status in (
            ("multipart/form-data; boundary=x", "--x", 415),
            ("application/x-www-form-urlencoded", "script=echo&x=1", 415),
            ("text/plain; charset=utf-16", ":", 415),
            ("text/plain\r\nContent-Encoding: gzip", ":", 415),
            ("text/plain\r\nContent-Type: application/json", ":", 400),
            ("text/plain", "\ufeff:", 400),
        ):
            self.assertIn(f" {status} ", self.post(body=body, kind=kind).splitlines()[0], kind)
        self.assertEqual(0, self.finished)
        self.assertIn(" 200 ", self.post(kind="application/x-www-form-urlencoded"))
        self.end()

    def test_sends_the_head_before_any_output(self) -> None:
        head = self.post()
        self.assertIn(" 200 ", head)
        self.assertIn(f"Worker: {MACHINE}", head)
        self.assertIn("Content-Type: text/event-stream; charset=utf-8", head)
        self.assertEqual("", self.body)
        self.end()

    def test_sends_heartbeats_without_output(self) -> None:
        self.post()
        self.reactor.advance(14)
        self.assertEqual(b'event: stdout\ndata: "x"\n\n', self.write_output(b"x"))
        self.reactor.advance(14)
        self.assertEqual(b"", self.written())
        self.reactor.advance(1)
        self.assertEqual(b": \n\n", self.written())
        self.reactor.advance(15)
        self.assertEqual(b": \n\n", self.written())
        self.assertIn(b'event: exit\ndata: {"code": 0', self.end())
        self.assertEqual(1, self.finished)

    def test_raw_response_has_no_heartbeats(self) -> None:
        self.assertIn("Content-Type: application/octet-stream", self.post("?raw=1"))
        self.reactor.advance(60)
        self.assertEqual(b"", self.written())
        self.assertEqual(b"x\xff", self.write_output(b"x\xff"))
        self.assertEqual(b"\nexit: 0\n", self.end())

    def test_character_may_be_split_between_pieces(self) -> None:
        self.post()
        self.assertEqual([b"", b""], [self.write_output(b"\xe2"), self.write_output(b"\x82")])
        self.assertEqual('event: stderr\ndata: "ü"\n\n'.encode(), self.write_output("ü".encode(), 2))
        self.assertEqual('event: stdout\ndata: "€"\n\n'.encode(), self.write_output(b"\xac"))
        self.end()

    def test_replaces_invalid_utf_8(self) -> None:
        self.post()
        self.assertEqual('event: stdout\ndata: "a\ufffdb"\n\n'.encode(), self.write_output(b"a\xffb\xe2"))
        self.assertTrue(self.end().startswith('event: stdout\ndata: "\ufffd"\n\nevent: exit\n'.encode()))

    def test_rejects_auth_tokens_while_the_clock_is_wrong(self) -> None:
        for self.clock_error in (-3600.0, -10.0, 65.0, 3600.0):
            self.assertIn(" 401 ", self.post())
            self.assertEqual("unauthorized\n", self.body)
        self.clock_error = 0.0
        self.assertIn(" 200 ", self.post())
        self.end()

    def test_failure_to_start_bash_is_an_error_and_finishes(self) -> None:
        self.reactor.error = OSError("no more processes")
        self.assertIn(" 500 ", self.post())
        self.assertEqual("bash cannot be started\n", self.body)
        self.assertEqual(1, self.finished)

    def test_sends_nothing_until_the_script_has_started(self) -> None:
        self.reactor.script_starts = False
        self.assertEqual("", self.post())
        self.assertEqual(b"", self.write_output(b"setpriv: a warning\n", 2))
        self.reactor.process.childDataReceived(STARTED_FD, b"\n")
        self.assertIn(b" 200 ", self.written())
        self.assertEqual(b'event: stdout\ndata: "x"\n\n', self.write_output(b"x"))
        self.end()

    def test_closes_pipes_that_stay_open_a_second_after_the_exit(self) -> None:
        self.post("?raw=1")
        pipes = self.reactor.transport.pipes
        pipes[1] = object()
        self.reactor.process.processExited(Failure(ProcessDone(0)))
        self.assertEqual(b"late", self.write_output(b"late"))
        self.reactor.advance(0.9)
        self.assertEqual([1], list(pipes))
        self.reactor.advance(0.1)
        self.assertEqual([], list(pipes))
        self.reactor.process.processEnded(Failure(ProcessDone(0)))
        self.assertEqual(b"\nexit: 0\n", self.written())

    def test_deadline_before_the_script_has_started_is_a_timeout(self) -> None:
        self.reactor.script_starts = False
        self.post(body='{"script": ":", "timeout": "1s"}', kind="application/json")
        self.reactor.advance(1)
        self.assertIn(b'data: {"code": 124, "reason": "timeout"', self.end())


class WorkerTests(TestCase):
    timeout = 2 * LIMIT

    async def assert_ends(self, worker: Worker) -> None:
        self.assertEqual(0, await worker.ended(), worker.output + worker.errors)
        self.assertNotIn(b"Traceback", worker.output + worker.errors)

    async def wait_until_up(self, reader: Reader) -> None:
        await wait_until(lambda: b"up" in reader.data, "the script is up")

    async def start_endless(self, worker: Worker) -> Reader:
        """Run an endless script, and wait until all of its processes run."""
        reader = await worker.stream(ENDLESS)
        await wait_until(lambda: b"up" in reader.data and worker.below("sleep") == 2, "the script is up")
        return reader

    async def test_runs_one_script_and_exits(self) -> None:
        for program in (BASHER, TWISTD):
            worker = await Worker.start(self, program=program)
            response = await worker.run("echo out; echo err >&2; exit 3")
            self.assertEqual((200, MACHINE), (response.status, response.headers["worker"]))
            self.assertEqual(("out\n", "err\n"), (response.output("stdout"), response.output("stderr")))
            self.assertEqual(3, response.exit["code"])
            # The peak memory of such a small script is unknown.
            self.assertEqual({"code", "wall_ms", "cpu_ms"}, set(response.exit))
            await self.assert_ends(worker)

    async def test_reports_the_signal_that_killed_bash(self) -> None:
        worker = await Worker.start(self)
        response = await worker.run("kill -KILL $$")
        self.assertEqual((137, "SIGKILL"), (response.exit["code"], response.exit["signal"]))
        await self.assert_ends(worker)

    async def test_script_inherits_nothing(self) -> None:
        worker = await Worker.start(self, SECRET="1")
        script = (
            "env | sort | sed s/=.*//; pwd; cat; ls /proc/self/fd; echo $FLY_MACHINE_ID $FLY_REGION $HOME"
        )
        response = await worker.run(script)
        names = "FLY_MACHINE_ID FLY_REGION HOME LANG LOGNAME PATH PWD SHELL SHLVL USER _ /tmp"
        # The last descriptor is the directory that ls reads.
        words = f"{names} 0 1 2 3 {MACHINE} ams /tmp".split()
        self.assertEqual((words, ""), (response.output("stdout").split(), response.output("stderr")))
        await self.assert_ends(worker)

    async def test_raw_output_of_twenty_megabytes_is_exact(self) -> None:
        data = os.urandom(20_000_000)
        path = FilePath(self.mktemp())
        path.setContent(data)
        worker = await Worker.start(self)
        response = await worker.run(f"cat '{path.path}'; exit 9", "?raw=1")
        end = b"\nexit: 9\n"
        self.assertEqual(len(data + end), len(response.body))
        self.assertEqual(hashlib.md5(data + end).digest(), hashlib.md5(response.body).digest())
        await self.assert_ends(worker)

    async def test_rejected_requests_leave_the_worker_unused(self) -> None:
        worker = await Worker.start(self)
        health = await worker.fetch("GET", "/healthz")
        self.assertEqual((200, b"ok\n"), (health.status, health.body))
        unsigned = [None, "", "00", auth_token("another-machine"), auth_token(private=genkey().private)]
        for authorization in unsigned:
            rejected = await worker.fetch("POST", "/run", b"echo", authorization)
            self.assertEqual((401, b"unauthorized\n"), (rejected.status, rejected.body))
        for method, path, body, code in [
            ("GET", "/", b"", 404),
            ("POST", "/run/", b":", 404),
            ("GET", "/run", b"", 405),
            ("POST", "/run", b"echo \0", 400),
            ("POST", "/run", bytes((1 << 20) + 1), 413),
        ]:
            rejected = await worker.fetch(method, path, body, auth_token())
            self.assertEqual((method, path, code), (method, path, rejected.status))
            self.assertEqual("text/plain; charset=utf-8", rejected.headers["content-type"])
            self.assertEqual(1, rejected.body.count(b"\n"))
        largest = await worker.run("exit 6\n".ljust(1 << 20, "#"))
        self.assertEqual(6, largest.exit["code"])
        await self.assert_ends(worker)

    async def test_runs_only_one_script(self) -> None:
        worker = await Worker.start(self)
        reader = await self.start_endless(worker)
        second = await worker.run("echo second")
        self.assertEqual(409, second.status)
        self.assertEqual(200, (await worker.fetch("GET", "/healthz")).status)
        self.assertEqual(2, worker.below("sleep"))
        self.assertNotIn(b"exit", reader.data)
        reader.leave()
        await self.assert_ends(worker)

    async def test_auth_token_is_accepted_once_and_never_logged(self) -> None:
        worker = await Worker.start(self)
        good = auth_token()
        bad = [
            auth_token("another-machine"),
            auth_token(private=genkey().private),
            f"Bearer {good}",
            good[:-2],
        ]
        bad += [Signer(KEYS.private).sign(MACHINE, time.time() + late) for late in (-90, 90)]
        for authorization in bad:
            rejected = await worker.fetch("POST", "/run", b"echo", authorization)
            self.assertEqual((401, b"unauthorized\n"), (rejected.status, rejected.body))
        response = await worker.send("POST", "/run", b"sleep 1000", good)
        replayed = await worker.fetch("POST", "/run", b"echo replayed", good)
        self.assertEqual((200, 409), (response.code, replayed.status))
        worker.send_signal("TERM")
        await response.content()
        await self.assert_ends(worker)
        log = (worker.output + worker.errors).decode()
        self.assertEqual(3, log.count("rejected a request"))
        for header in (good, *bad):
            self.assertNotIn(header[8:72], log)

    async def test_keys_can_be_rotated(self) -> None:
        old, new = genkey(), genkey()
        for public, accepted, rejected in (
            (old.public, [old], [new]),
            (f"{old.public},{new.public}", [old, new], []),
            (new.public, [new], [old]),
        ):
            for pair in accepted:
                worker = await Worker.start(self, PUBLIC=public)
                for other in rejected:
                    response = await worker.fetch("POST", "/run", b":", auth_token(private=other.private))
                    self.assertEqual(401, response.status)
                response = await worker.fetch("POST", "/run", b"exit 3", auth_token(private=pair.private))
                self.assertEqual(3, response.exit["code"])
                await self.assert_ends(worker)

    async def test_disconnected_client_ends_the_run(self) -> None:
        worker = await Worker.start(self)
        reader = await self.start_endless(worker)
        reader.leave()
        await self.assert_ends(worker)

    async def test_background_processes_do_not_delay_the_end(self) -> None:
        worker = await Worker.start(self)
        started = time.monotonic()
        script = "sleep 1000 & setsid sleep 1000 & nohup sleep 1000 & ( ( setsid sleep 1000 & ) & ); disown"
        response = await worker.run(script + "; echo out")
        self.assertLess(time.monotonic() - started, 20)
        self.assertEqual(("out\n", 0), (response.output("stdout"), response.exit["code"]))
        await self.assert_ends(worker)

    async def test_run_is_killed_at_its_deadline(self) -> None:
        async def expire(script: str) -> None:
            worker = await Worker.start(self, MAXREQTIME="1s")
            response = await worker.run("echo before; " + script)
            self.assertEqual((124, "timeout"), (response.exit["code"], response.exit["reason"]))
            self.assertNotIn("signal", response.exit)
            self.assertGreaterEqual(response.exit["wall_ms"], 999)
            self.assertEqual("before\n", response.output("stdout"))
            await self.assert_ends(worker)

        scripts = ("trap '' TERM; while :; do :; done", "sleep 1000 | cat", "kill -STOP $$")
        await gatherResults([Deferred.fromCoroutine(expire(script)) for script in scripts])

    async def test_files_that_cannot_be_written_are_a_start_error(self) -> None:
        worker = await Worker.start(self, HOME="/proc")
        response = await worker.run_json(script="echo ran", files={"a": "x"})
        self.assertEqual((500, b"bash cannot be started\n"), (response.status, response.body))
        self.assertIn(b"files: ", worker.output + worker.errors)
        await self.assert_ends(worker)

    async def test_time_limit_includes_writing_and_reading_files(self) -> None:
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({"script": ":", "files": {"a": "x" * 100_000}}, "1ns"),
            ({"script": "truncate -s 1G a", "outputs": ["a"]}, "2s"),
        )
        for fields, limit in cases:
            worker = await Worker.start(self, HOME=self.make_directory(), MAXREQTIME=limit, MAXOUTPUT="2GiB")
            response = await worker.run_json(**fields)
            self.assertEqual((124, "timeout"), (response.exit["code"], response.exit["reason"]))
            await self.assert_ends(worker)

    @skipUnless(os.geteuid() == 0, "only root can run scripts as another user")
    async def test_files_are_written_and_read_as_the_scripts_user(self) -> None:
        home = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, home)
        (home / "secret").write_text("secret")
        (home / "secret").chmod(0o600)
        (home / "hidden").mkdir(0o700)
        (home / "hidden" / "a").write_text("secret")
        os.chown(home, 1_948_001, 1_948_001)
        worker = await Worker.start(self, RUN_AS="1948001", HOME=str(home))
        response = await worker.run_json(
            script="stat -c '%u %g %a' a d d/b; mv secret renamed",
            files={"a": "x", "d/b": {"base64": "", "mode": "0600"}},
            outputs=["a", "renamed", "hidden/a"],
        )
        self.assertEqual(
            "1948001 1948001 644\n1948001 1948001 755\n1948001 1948001 600\n", response.output("stdout")
        )
        self.assertEqual(["a"], [event["name"] for name, event in response.events if name == "file"])
        self.assertNotIn(b"c2VjcmV0", response.body)
        errors = {failure["name"]: failure["error"] for failure in response.exit["output_errors"]}
        self.assertEqual({"renamed": "unreadable", "hidden/a": "not-found"}, errors)
        await self.assert_ends(worker)

    def make_directory(self) -> str:
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        return str(directory)

    async def test_shutdown_while_files_are_read_ends_the_run(self) -> None:
        worker = await Worker.start(self, HOME=self.make_directory(), MAXOUTPUT="1GiB")
        body = json.dumps({"script": "truncate -s 900M a", "outputs": ["a"]}).encode()
        response = await worker.send("POST", "/run", body, auth_token(), "application/json")
        reader = Reader()
        response.deliverBody(reader)
        await wait_until(lambda: b"event: file" in reader.data, "a file is sent")
        worker.send_signal("TERM")
        reader.pause()
        reader.resume()
        await reader.finished
        self.assertTrue(reader.data.endswith(b"\n\n"))
        self.assertIn(b'event: exit\ndata: {"code": 125, "reason": "worker-lost"', reader.data[-200:])
        await self.assert_ends(worker)

    async def test_signals_end_the_run_and_the_worker(self) -> None:
        for program, name in ((BASHER, "TERM"), (BASHER, "HUP"), (TWISTD, "HUP"), (TWISTD, "INT")):
            worker = await Worker.start(self, program=program)
            reader = await self.start_endless(worker)
            worker.send_signal(name)
            await reader.finished
            self.assertIn(b'event: exit\ndata: {"code": 125, "reason": "worker-lost"', reader.data)
            await self.assert_ends(worker)

    async def test_signal_to_all_processes_of_the_service_is_a_shutdown(self) -> None:
        for query, end in (("?raw=1", b"\nexit: 125 worker-lost\n"), ("", b'"reason": "worker-lost"')):
            worker = await Worker.start(self)
            reader = await worker.stream("echo up; sleep 1000; :", query)
            await self.wait_until_up(reader)
            # As systemd does. Stopped, the worker gets its signal before it notices the end of the script.
            os.kill(worker.pid, signal.SIGSTOP)
            for process in process_tree.process_and_descendants(worker.pid):
                os.kill(process.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGCONT)
            await reader.finished
            self.assertIn(end, reader.data)
            await self.assert_ends(worker)

    async def test_failure_of_a_confining_program_is_an_error_and_its_reason_is_logged(self) -> None:
        for sandbox, reason in (
            ("sh -c 'echo it is broken >&2; exit 126' sh", "it is broken"),
            ("env /no/such/program", "/no/such/program"),
            ("false", "no message"),
        ):
            worker = await Worker.start(self, SANDBOX=sandbox)
            response = await worker.run("echo never")
            self.assertEqual((500, b"bash cannot be started\n"), (response.status, response.body))
            await self.assert_ends(worker)
            log = (worker.output + worker.errors).decode()
            self.assertEqual(1, log.count("bash cannot be started: "), log)
            self.assertIn(reason, log)

    @skipUnless(os.geteuid() == 0, "only root can run scripts as another user")
    async def test_exhausted_process_limit_is_an_error_and_is_logged(self) -> None:
        user = ("setpriv", "--reuid=1948000", "--clear-groups", "--")
        others = [subprocess.Popen([*user, "sleep", "1000"]) for _ in range(2)]  # noqa: ASYNC220 - at once
        try:
            worker = await Worker.start(self, leaders=("prlimit", "--nproc=1:1", "--"), RUN_AS="1948000")
            response = await worker.run("echo never")
        finally:
            for other in others:
                other.kill()
                other.wait()
        self.assertEqual((500, b"bash cannot be started\n"), (response.status, response.body))
        await self.assert_ends(worker)
        self.assertIn(b"Resource temporarily unavailable", worker.output + worker.errors)

    async def test_failure_of_the_script_itself_is_its_exit_code(self) -> None:
        for script, code in (("exit 126", 126), ("exec /no/such/program", 127), ("exec /etc", 126)):
            worker = await Worker.start(self)
            response = await worker.run(script)
            self.assertEqual(
                (200, code, None), (response.status, response.exit["code"], response.exit.get("reason"))
            )
            await self.assert_ends(worker)

    async def test_reports_the_peak_memory_of_the_script(self) -> None:
        worker = await Worker.start(self)
        response = await worker.run("x=$(head -c 100M /dev/zero | tr '\\0' x); grep VmHWM /proc/$$/status; :")
        peak = int(response.output("stdout").split()[1])
        self.assertGreater(peak, 100_000)
        self.assertLess(abs(response.exit["max_rss_kb"] - peak), peak / 10)
        await self.assert_ends(worker)

    async def test_raw_output_keeps_the_order_of_both_streams(self) -> None:
        worker = await Worker.start(self)
        response = await worker.run("for i in {1..300}; do echo o$i; echo e$i >&2; done", "?raw=1")
        lines = "".join(f"o{i}\ne{i}\n" for i in range(1, 301))
        self.assertEqual(lines + "\nexit: 0\n", response.body.decode())
        await self.assert_ends(worker)

    async def test_both_streams_of_raw_output_share_one_limit(self) -> None:
        worker = await Worker.start(self, MAXOUTPUT="1kB")
        response = await worker.run("for i in {1..500}; do echo o; echo e >&2; done", "?raw=1")
        self.assertEqual(b"o\ne\n" * 250 + b"\nexit: 0\n", response.body)
        await self.assert_ends(worker)

    async def test_exit_on_stdin_eof_kills_the_run(self) -> None:
        worker = await Worker.start(self, "--exit-on-stdin-eof")
        reader = await self.start_endless(worker)
        worker.end_input()
        await reader.finished
        self.assertIn(b'event: exit\ndata: {"code": 125, "reason": "worker-lost"', reader.data)
        await self.assert_ends(worker)

    async def test_drops_output_beyond_the_limit(self) -> None:
        worker = await Worker.start(self, MAXOUTPUT="100kB")
        response = await worker.run("head -c 300000 /dev/zero | tr '\\0' x; exit 4")
        self.assertEqual("x" * 100_000, response.output("stdout"))
        exit_ = response.exit
        self.assertEqual((4, True, 200_000), (exit_["code"], exit_["truncated"], exit_["dropped_bytes"]))
        await self.assert_ends(worker)

    async def test_drops_raw_output_beyond_the_limit_silently(self) -> None:
        worker = await Worker.start(self, MAXOUTPUT="100kB")
        response = await worker.run("head -c 300000 /dev/zero | tr '\\0' x; exit 4", "?raw=1")
        self.assertEqual(b"x" * 100_000 + b"\nexit: 4\n", response.body)
        await self.assert_ends(worker)

    async def test_client_that_does_not_read_blocks_the_script(self) -> None:
        worker = await Worker.start(self, MAXREQTIME="3s", MAXOUTPUT="1000GB")
        reader = await worker.stream("yes", "?raw=1", paused=True)
        largest = 0

        def killed() -> bool:
            nonlocal largest
            largest = max(largest, worker.resident_kb)
            return not process_tree.descendants(worker.pid)

        await wait_until(killed, "the deadline")
        reader.resume()
        await reader.finished
        self.assertLess(largest, 120_000)
        self.assertTrue(reader.data.endswith(b"y\n\nexit: 124 timeout\n"), reader.data[-40:])
        await self.assert_ends(worker)

    async def test_slow_client_receives_everything(self) -> None:
        worker = await Worker.start(self)
        reader = await worker.stream("seq 100000 100000 600000; seq 1 600000", "?raw=1", paused=True)
        await deferLater(reactor, 1)
        expected = [*range(100_000, 600_001, 100_000), *range(1, 600_001)]
        while not reader.finished.called:
            reader.resume()
            await deferLater(reactor, 0.01)
            reader.pause()
            await deferLater(reactor, 0.05)
        self.assertEqual("".join(f"{n}\n" for n in expected).encode() + b"\nexit: 0\n", bytes(reader.data))
        await self.assert_ends(worker)

    async def test_reports_each_invalid_setting_before_listening(self) -> None:
        for program in (BASHER, TWISTD):
            worker = await Worker.start(
                self, program=program, up=False, PUBLIC="", FLY_MACHINE_ID="a b", MAXREQTIME="soon"
            )
            self.assertEqual(1, await worker.ended())
            lines = worker.errors.decode().splitlines()
            self.assertEqual(
                ["bfaas-basher: PUBLIC", "bfaas-basher: FLY_MACHINE_ID", "bfaas-basher: MAXREQTIME"],
                [": ".join(line.split(": ")[:2]) for line in lines],
            )
            self.assertNotIn(b"starting on", worker.output)
            self.assertNotIn(b"Traceback", worker.errors)

    async def test_port_in_use_is_an_error_with_exit_code_1(self) -> None:
        first = await Worker.start(self)
        for program in (BASHER, TWISTD):
            second = await Worker.start(
                self, "--listen", f"tcp:{first.port}:interface=127.0.0.1", program=program, up=False
            )
            self.assertEqual(1, await second.ended())
            self.assertIn(b"Address already in use", second.errors + second.output)

    async def test_scripts_run_in_the_sandbox(self) -> None:
        worker = await Worker.start(self, SANDBOX="env 'MARK=one two'")
        response = await worker.run("echo $MARK")
        self.assertEqual("one two\n", response.output("stdout"))
        await self.assert_ends(worker)
