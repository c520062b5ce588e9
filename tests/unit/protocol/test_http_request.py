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


def parse(
    body: bytes, content_type: str, *, raw: bool = False, max_unpacked: int | None = None
) -> RunRequest:
    request: Any = DummyRequest([b"run"])
    request.content = io.BytesIO(body)
    request.args = {b"raw": [b"1"]} if raw else {}
    request.requestHeaders.setRawHeaders("Content-Type", [content_type])
    return parse_run_request(request, max_unpacked=max_unpacked)


class ParseRunRequestTests(SynchronousTestCase):
    def test_media_type_selects_json_or_script(self) -> None:
        body = b'{"script": "true", "timeout": "1s"}'
        decoded = parse(body, "application/json")
        self.assertEqual((b"true", 1.0), (decoded.script, decoded.timeout))
        script = parse(body, "text/plain")
        self.assertEqual((body, None), (script.script, script.timeout))

    def test_forms_are_for_coordinators_only(self) -> None:
        form = b'--B\r\nContent-Disposition: form-data; name="script"\r\n\r\ntrue\r\n--B--\r\n'
        kind = 'Multipart/Form-Data; boundary="B"'
        self.assertEqual(b"true", parse(form, kind, max_unpacked=9).script)
        self.assertEqual(415, self.assertRaises(HTTPError, parse, form, kind).code)
        for invalid in (
            "",
            "; boundary=",
            '; boundary="B "',
            "; boundary=B; boundary=C",
            f"; boundary={'x' * 71}",
        ):
            with self.assertRaises(HTTPError) as raised:
                parse(form, "multipart/form-data" + invalid, max_unpacked=9)
            self.assertEqual(400, raised.exception.code)

    def test_raw_responses_cannot_contain_outputs(self) -> None:
        body = b'{"script": "true", "outputs": ["a"]}'
        self.assertEqual(["a"], parse(body, "application/json").outputs)
        with self.assertRaises(HTTPError) as raised:
            parse(body, "application/json", raw=True)
        self.assertEqual(400, raised.exception.code)

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
