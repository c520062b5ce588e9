"""What the client sends, and what it makes of errors."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import httpx
from twisted.trial.unittest import SynchronousTestCase

from bfaas.client.errors import BfaasError, BusyError, RejectedError
from bfaas.client.exchange import Coordinator, RetryBudget, RunBody, RunOptions, decode_status, rejection
from bfaas.protocol.files import File

Files = dict[str, str | bytes | File | os.PathLike[str]]


def decoded(body: RunBody) -> dict[str, Any]:
    assert body.headers == {"Content-Type": "application/json"}
    fields: dict[str, Any] = json.loads(body.content)
    return fields


def response(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()})


class RunBodyTests(SynchronousTestCase):
    def test_a_script_alone_is_a_plain_body(self) -> None:
        for script in ("echo ö", "echo ö".encode()):
            empty: RunOptions = {"stdin": None, "timeout": None, "env": {}, "files": {}, "outputs": []}
            for options in (RunOptions(), empty):
                body = RunBody(script, options)
                self.assertEqual("echo ö".encode(), body.content)
                self.assertEqual({"Content-Type": "text/plain; charset=utf-8"}, body.headers)

    def test_options_are_json(self) -> None:
        body = RunBody("cat", {"stdin": "ö", "env": {"A": "b"}, "timeout": 2.5, "outputs": ("*.png",)})
        expected = {
            "script": "cat",
            "stdin": "ö",
            "env": {"A": "b"},
            "timeout": "2.500000s",
            "outputs": ["*.png"],
        }
        self.assertEqual(expected, decoded(body))
        self.assertEqual({"script": "a", "timeout": "1m"}, decoded(RunBody("a", {"timeout": "1m"})))
        self.assertEqual({"script": "a", "stdin": ""}, decoded(RunBody("a", {"stdin": ""})))

    def test_bytes_are_base64(self) -> None:
        encoded = base64.b64encode(b"\xff").decode()
        self.assertEqual(encoded, decoded(RunBody("a", {"stdin": b"\xff"}))["stdin_base64"])
        files: Files = {"text": "t", "bytes": b"\xff", "file": File(b"\xff", 0o755)}
        expected = {
            "text": "t",
            "bytes": {"base64": encoded, "mode": "0644"},
            "file": {"base64": encoded, "mode": "0755"},
        }
        self.assertEqual(expected, decoded(RunBody("a", {"files": files}))["files"])

    def test_local_files_keep_their_mode(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "run")
            path.write_bytes(b"x")
            path.chmod(0o4750)
            body = RunBody("a", {"files": {"run": path}})
            self.assertEqual({"run": {"base64": "eA==", "mode": "0750"}}, decoded(body)["files"])
            with self.assertRaises(FileNotFoundError):
                RunBody("a", {"files": {"run": path.parent / "missing"}})

    def test_a_single_pattern_is_an_error(self) -> None:
        self.assertRaises(TypeError, RunBody, "a", {"outputs": "*.png"})

    def test_what_utf8_cannot_encode_is_an_error(self) -> None:
        for script, stdin in (("\ud800", None), (b"\xff", "x"), ("a", "\ud800")):
            with self.assertRaises(ValueError):
                RunBody(script, {"stdin": stdin})


class CoordinatorTests(SynchronousTestCase):
    def test_requests_go_to_the_url_with_the_token(self) -> None:
        with httpx.Client() as http:
            for url in ("http://host:81/prefix", "http://host:81/prefix/"):
                coordinator = Coordinator(url, " token ", 7)
                request = coordinator.run_request(http, RunBody("a", {}))
                self.assertEqual(("POST", "http://host:81/prefix/run"), (request.method, str(request.url)))
                self.assertEqual("Bearer token", request.headers["Authorization"])
                self.assertEqual("identity", request.headers["Accept-Encoding"])
                self.assertEqual(7, request.extensions["timeout"]["read"])
                self.assertEqual("http://host:81/prefix/status", str(coordinator.status_request(http).url))
            request = Coordinator("http://[::1]", "", 7).status_request(http)
            self.assertNotIn("Authorization", request.headers)
            self.assertEqual("http://[::1]/status", str(request.url))

    def test_invalid_urls_and_tokens_are_rejected_without_secrets(self) -> None:
        for url in (
            "host",
            "ftp://host",
            "http://",
            "http://host?a=b",
            "http://host:99999x",
            "http://[::",
            "http://\x01",
            "http://u:secret@[::",
            "http://host#a",
            "http://u:secret@host",
        ):
            error = self.assertRaises(ValueError, Coordinator, url, None, 7)
            self.assertEqual(1, len(str(error).splitlines()))
            self.assertNotIn("secret", str(error))
        for token in ("a b", "a\nb", "ö"):
            error = self.assertRaises(ValueError, Coordinator, "http://host", token, 7)
            self.assertNotIn(token, str(error))


class RejectionTests(SynchronousTestCase):
    def test_busy_only_with_retry_after(self) -> None:
        for status in (429, 503):
            error = rejection(response(status, retry_after="7", run_id="r1"), b"why\n")
            self.assertIsInstance(error, BusyError)
            self.assertEqual((False, "r1", "why"), (error.may_have_run, error.run_id, error.message))
            for value in ("", "soon", "-1", "1.5", "1, 2", "9" * 7, "Wed, 21 Oct 2026 07:28:00 GMT"):
                error = rejection(response(status, retry_after=value), b"why\n")
                self.assertIs(RejectedError, type(error))
                self.assertEqual(status == 503, error.may_have_run)

    def test_other_errors_are_never_busy(self) -> None:
        for status in (302, 400, 401, 500, 502, 504):
            error = rejection(response(status, retry_after="1"), b"why\n")
            self.assertIs(RejectedError, type(error))
            self.assertEqual(status >= 500, error.may_have_run, status)

    def test_a_message_is_one_printable_line(self) -> None:
        error = rejection(response(400), b"\x1b[31mred\r\nnext \xff\n")
        self.assertEqual(" [31mred  next \ufffd", error.message)
        self.assertEqual("400:  [31mred  next \ufffd", str(error))


class RetryBudgetTests(SynchronousTestCase):
    def busy(self, retry_after: int) -> BusyError:
        return BusyError(503, "busy", None, retry_after)

    def test_pauses_are_limited_together(self) -> None:
        budget = RetryBudget(10)
        self.assertEqual([3, 7], [budget.pause(self.busy(3)), budget.pause(self.busy(7))])
        self.assertRaises(BusyError, budget.pause, self.busy(1))
        self.assertRaises(BusyError, RetryBudget(0).pause, self.busy(0))
        self.assertEqual(1, RetryBudget(2).pause(self.busy(0)))

    def test_other_errors_are_raised(self) -> None:
        other = RejectedError(502, "failed", None, may_have_run=True)
        self.assertRaises(RejectedError, RetryBudget(10).pause, other)


class StatusTests(SynchronousTestCase):
    def test_a_status_is_an_object(self) -> None:
        self.assertEqual({"a": 1}, decode_status(httpx.Response(200, content=b'{"a": 1}')))
        for body in (b"", b"<html>", b"[]"):
            error = self.assertRaises(BfaasError, decode_status, httpx.Response(200, content=body))
            self.assertEqual("the response is not a status", str(error))
        self.assertRaises(RejectedError, decode_status, httpx.Response(401, content=b"no"))
