"""Tests of the client of a container engine, against a fake one."""

from __future__ import annotations

import os
import ssl
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from bfaas.machines.local.engine import (
    Engine,
    EngineError,
    EngineInfo,
    EngineUnreachableError,
    JSONLines,
    examine_engine,
)
from bfaas.settings import EngineSettings
from tests.support.certificates import Authority
from tests.support.fake_engine import INFO, VERSION, FakeEngine, cut, refuse, silent
from tests.support.waiting import reactor

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def failure(work: Coroutine[Deferred[Any], Any, Any] | Deferred[Any]) -> EngineError:
    """Return the error that work raises, in one line."""
    try:
        await work
    except EngineError as raised:
        error = raised
    else:
        raise AssertionError("no error")
    assert len(str(error).splitlines()) == 1, error
    return error


class ExamineTests(TestCase):
    """The check at the start, which blocks, and therefore runs in a thread here."""

    def setUp(self) -> None:
        self.fake = FakeEngine()
        path = self.fake.listen(self)
        self.settings = EngineSettings(f"unix://{path}", path)

    def examine(self) -> Deferred[EngineInfo]:
        return deferToThread(examine_engine, self.settings)

    async def test_uses_the_newest_version_that_both_know(self) -> None:
        for newest, oldest, chosen in (
            ("1.41", "1.12", "1.41"),
            ("1.47", "1.24", "1.47"),
            ("1.60", "1.44", "1.51"),
        ):
            self.fake.answers["GET /version"] = [VERSION | {"ApiVersion": newest, "MinAPIVersion": oldest}]
            found = await self.examine()
            self.assertEqual((chosen, "Docker 99.0"), (found.api_version, found.name))

    async def test_versions_that_do_not_fit_are_refused(self) -> None:
        for changes, text in (
            (
                {"ApiVersion": "1.40"},
                "too old: its API has version 1.40, and 1.41 (Docker 20.10) is required",
            ),
            ({"ApiVersion": "1.70", "MinAPIVersion": "1.60"}, "too new: its API begins with version 1.60"),
            ({"ApiVersion": "next"}, "has no ApiVersion"),
            ({"ApiVersion": None}, "has no ApiVersion"),
        ):
            self.fake.answers["GET /version"] = [VERSION | changes]
            self.assertIn(text, str(await failure(self.examine())))

    async def test_describes_podman_and_its_limits(self) -> None:
        self.fake.answers["GET /version"] = [VERSION | {"Components": [{"Name": "Podman Engine"}]}]
        self.fake.answers["GET /info"] = [INFO | {"MemoryLimit": False}]

        found = await self.examine()

        self.assertEqual(("Podman 99.0", False, False), (found.name, found.rootless, found.remaps_users))
        self.assertEqual(("memory",), found.unlimited)

    async def test_rootless_engines_are_known_by_what_docker_and_podman_say(self) -> None:
        for said in ({"SecurityOptions": ["name=seccomp", "name=rootless"]}, {"Rootless": True}):
            self.fake.answers["GET /info"] = [INFO | said]
            found = await self.examine()
            self.assertEqual((True, False, ()), (found.rootless, found.remaps_users, found.unlimited), said)

    async def test_rootless_engines_limit_nothing_with_version_1_of_cgroups(self) -> None:
        said = {"Rootless": True, "CgroupVersion": "1", "MemoryLimit": True}
        self.fake.answers["GET /info"] = [INFO | said]
        self.assertEqual(("memory", "processes", "processors"), (await self.examine()).unlimited)

    async def test_responses_of_something_else_are_errors(self) -> None:
        for answer in (b"<html>", b"[1]", b"", cut(b'{"ApiVersion"'), cut(), refuse(500, "broken\nengine")):
            self.fake.answers["GET /version"] = [answer]
            await failure(self.examine())

    async def test_error_names_the_socket_and_the_reason(self) -> None:
        absent = EngineSettings("unix:///nowhere/engine.sock", "/nowhere/engine.sock")
        closed = EngineSettings("tcp://127.0.0.1:1", None, "http://127.0.0.1:1")
        for settings, reason in ((absent, "No such file or directory"), (closed, "Connection refused")):
            raised = self.assertRaises(EngineUnreachableError, examine_engine, settings)
            message = f"the container engine at {settings.host} (DOCKER_HOST) cannot be reached: {reason}"
            self.assertEqual(message, str(raised))

    def test_user_without_permission_learns_of_the_group(self) -> None:
        Path(self.settings.socket or "").chmod(0o600 if os.geteuid() == 0 else 0)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                examine_engine(self.settings)
            except EngineError as raised:
                os.write(write_end, str(raised).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        os.waitpid(child, 0)
        with os.fdopen(read_end) as report:
            message = report.read()
        self.assertIn("permission denied; add this user to the group of the socket (docker)", message)


class TLSTests(TestCase):
    """An engine at tcp:// with the certificates of Docker's client."""

    def setUp(self) -> None:
        authority = Authority()
        directory = tempfile.TemporaryDirectory(prefix="bfaas-tls-")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.directory.joinpath("ca.pem").write_bytes(authority.certificate)
        key, certificate = authority.issue("client")
        self.directory.joinpath("key.pem").write_bytes(key)
        self.directory.joinpath("cert.pem").write_bytes(certificate)
        server_pem = self.directory / "server.pem"
        server_pem.write_bytes(b"".join(authority.issue("localhost")))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b'{"ApiVersion": "1.41", "MinAPIVersion": "1.12", "Version": "99.0"}'
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.directory / "ca.pem")
        context.load_cert_chain(server_pem)
        context.verify_mode = ssl.CERT_REQUIRED
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def close() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        self.addCleanup(close)
        self.address = f"localhost:{server.server_port}"

    def settings(self, **changes: str) -> EngineSettings:
        return EngineSettings.from_environment(
            {
                "DOCKER_HOST": f"tcp://{self.address}",
                "DOCKER_TLS_VERIFY": "1",
                "DOCKER_CERT_PATH": str(self.directory),
            }
            | changes
        )

    async def test_both_sides_verify_each_other(self) -> None:
        settings = self.settings()
        info = await deferToThread(examine_engine, settings)
        engine = Engine(reactor, settings, info)
        try:
            self.assertEqual("99.0", (await engine.call("GET", "/version"))["Version"])
        finally:
            await engine.close()

    async def test_certificates_of_others_are_refused(self) -> None:
        self.directory.joinpath("ca.pem").write_bytes(Authority().certificate)

        self.assertIn("TLS", str(await failure(deferToThread(examine_engine, self.settings()))))

    async def test_missing_certificates_are_reported(self) -> None:
        self.directory.joinpath("key.pem").unlink()

        raised = await failure(deferToThread(examine_engine, self.settings()))

        self.assertIn("DOCKER_CERT_PATH", str(raised))
        self.assertIn("No such file or directory", str(raised))


class EngineTests(TestCase):
    """Calls."""

    def setUp(self) -> None:
        self.fake = FakeEngine()
        path = self.fake.listen(self)
        info = EngineInfo("Docker 99.0", "1.41", False, False, (), "", ())
        self.engine = Engine(reactor, EngineSettings(f"unix://{path}", path), info)
        self.addCleanup(lambda: Deferred.fromCoroutine(self.engine.close()))

    async def test_error_has_the_message_of_the_engine(self) -> None:
        self.fake.answers["GET /info"] = [refuse(409, "Conflict.\n  Try again"), b""]

        raised = await failure(self.engine.call("GET", "/info"))

        self.assertEqual(("Conflict. Try again", 409), (str(raised), raised.status))
        self.assertIs(None, await self.engine.call("GET", "/info"))

    async def test_incomplete_responses_leave_the_outcome_open(self) -> None:
        for answer in (cut(), cut(b'{"Id": '), b"{", b"no JSON", b"[" * 100_000):
            self.fake.answers["GET /info"] = [answer]
            raised = await failure(self.engine.call("GET", "/info"))
            self.assertIsInstance(raised, EngineUnreachableError)

    async def test_call_without_a_response_ends(self) -> None:
        self.fake.answers["GET /info"] = [silent]

        raised = await failure(self.engine.call("GET", "/info", timeout=0.05))

        self.assertIn("does not respond to GET /info within 0.05 s", str(raised))

    async def test_stream_that_breaks_off_is_an_error(self) -> None:
        self.fake.answers["POST /images/create"] = [cut(b'{"status": "Pulling"}\r\n{"sta')]
        events: list[dict[str, Any]] = []

        response = await self.engine.open("POST", "/images/create")
        await failure(self.engine.stream(response, JSONLines(events.append).feed))

        self.assertEqual([{"status": "Pulling"}], events)

    def test_lines_are_split_wherever_they_arrive(self) -> None:
        data = b'{"a": 1}\r\n\r\n{"a": "\xc3\xa4"}\n[1]\n{"a"'
        for size in range(1, len(data)):
            events: list[dict[str, Any]] = []
            lines = JSONLines(events.append)
            for start in range(0, len(data), size):
                lines.feed(data[start : start + size])
            self.assertEqual([{"a": 1}, {"a": "ä"}], events)
        self.assertRaises(EngineError, JSONLines(events.append).feed, b"{\n")
        self.assertRaises(EngineError, JSONLines(events.append).feed, b"x" * (2 << 20))
