"""Run requests from HTTP requests: the choice by media type, and the status of errors."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.test.requesthelper import DummyRequest

from bfaas.http.errors import HTTPError
from bfaas.protocol.formats import Format
from bfaas.protocol.http_request import parse_run_request, response_format

if TYPE_CHECKING:
    from bfaas.protocol.request import RunRequest


def parse(body: bytes, content_type: str) -> RunRequest:
    request: Any = DummyRequest([b"run"])
    request.content = io.BytesIO(body)
    request.requestHeaders.setRawHeaders("Content-Type", [content_type])
    return parse_run_request(request)


class ParseRunRequestTests(SynchronousTestCase):
    def test_media_type_selects_json_or_script(self) -> None:
        body = b'{"script": "true", "timeout": "1s"}'
        decoded = parse(body, "application/json")
        self.assertEqual((b"true", 1.0), (decoded.script, decoded.timeout))
        script = parse(body, "text/plain")
        self.assertEqual((body, None), (script.script, script.timeout))

    def test_errors_have_a_status_and_a_reason(self) -> None:
        for body, content_type, status, message in (
            (b"{}", "application/json", 400, "script is missing"),
            (b"a\0b", "text/plain", 400, "a script cannot contain a NUL byte"),
            (b"true", "image/png", 415, "unsupported Content-Type: send text/plain or application/json"),
        ):
            error = self.assertRaises(HTTPError, parse, body, content_type)
            self.assertEqual((status, message), (error.code, error.message))


class ResponseFormatTests(SynchronousTestCase):
    def test_repeated_accept_headers_are_one_list(self) -> None:
        for values in (["application/x-ndjson", "*/*"], ["*/*", "application/x-ndjson"]):
            request: Any = DummyRequest([b"run"])
            request.requestHeaders.setRawHeaders("Accept", values)
            self.assertIs(Format.NDJSON, response_format(request))

    def test_query_selects_raw(self) -> None:
        request: Any = DummyRequest([b"run"])
        request.args = {b"raw": [b"1"]}
        self.assertIs(Format.RAW, response_format(request))
