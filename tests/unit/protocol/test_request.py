"""Parsing of request bodies, and the errors of invalid ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.http.media_type import JSON
from bfaas.protocol.request import MAX_ENV, InvalidRequestError, RunRequest

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
requests = st.fixed_dictionaries(
    {"script": text},
    optional={"stdin": text, "env": st.dictionaries(names, text), "timeout": st.just("2.5s")},
)


class RunRequestTests(SynchronousTestCase):
    @given(requests, st.booleans())
    def test_worker_parses_what_the_client_sent(self, fields: dict[str, Any], ascii_: bool) -> None:
        request = RunRequest.from_json(json.dumps(fields, ensure_ascii=ascii_).encode())

        self.assertEqual(fields["script"].encode(), request.script)
        self.assertEqual(fields.get("stdin", "").encode(), request.stdin)
        self.assertEqual(fields.get("env", {}), request.env)
        self.assertEqual(2.5 if "timeout" in fields else None, request.timeout)
        self.assertLessEqual(len(request.body), request.size)
        if request.content_type is None:
            self.assertEqual(({"script"}, request.script), (set(fields), request.body))
        else:
            decoded = RunRequest.from_json(request.body)
            self.assertEqual((JSON, request.body), (request.content_type, decoded.body))
            self.assertEqual(
                (request.script, request.stdin, request.env, request.timeout),
                (decoded.script, decoded.stdin, decoded.env, decoded.timeout),
            )

    @given(st.binary())
    def test_any_body_is_parsed_or_a_one_line_error(self, data: bytes) -> None:
        for body in (data, b'{"script":"' + data + b'"}', b'{"script":"","' + data + b'":1}'):
            try:
                RunRequest.from_json(body)
            except InvalidRequestError as error:
                self.assertRegex(str(error), r"\A[ -~]{1,140}\Z")

    def test_plain_body_is_the_script(self) -> None:
        request = RunRequest.plain(b'{"script": 1}\xff')

        self.assertEqual((b'{"script": 1}\xff', request.body), (request.body, request.script))
        self.assertIsNone(request.content_type)

    def test_effective_timeout_has_a_maximum(self) -> None:
        def limit(timeout: str) -> float:
            return RunRequest.from_json(
                json.dumps({"script": "", "timeout": timeout}).encode()
            ).effective_timeout(10)

        self.assertEqual([0.5, 10, 10], [limit("500ms"), limit("10s"), limit("1h")])
        self.assertEqual(10, RunRequest.plain(b"").effective_timeout(10))

    def test_errors_name_the_reason(self) -> None:
        for body, message in [
            (b"", "not JSON, at line 1"),
            (b"echo hello", "not JSON, at line 1, column 1"),
            (b'{"script": ""} more', "not JSON"),
            (b"\xef\xbb\xbf{}", "the body starts with a byte order mark"),
            (b"\xff\xfe{\0}\0", "the body starts with a byte order mark"),
            (b'{"script": "\xef\xbb\xbfecho"}', "the script starts with a byte order mark"),
            (b'{"script": "\xff"}', "not UTF-8, at byte 12"),
            (b"[]", "not a JSON object"),
            (b"{}", "script is missing"),
            (b'{"script": null}', "script is not a string"),
            (b'{"script": "\\u0000"}', "NUL"),
            (b'{"script": "\\ud800"}', "script contains a lone surrogate"),
            (b'{"script": "", "script": "rm"}', 'duplicate key "script"'),
            (b'{"script": "", "Stdin": ""}', 'unknown key "Stdin"'),
            (b'{"script": "", "stdin": 1}', "stdin is not a string"),
            (b'{"script": "", "env": []}', "env is not an object"),
            (b'{"script": "", "env": {"A": 1}}', 'env: "A" is not a string'),
            (b'{"script": "", "env": {"A": "\\u0000"}}', 'env: "A" contains a NUL byte'),
            (b'{"script": "", "env": {"A": "", "A": ""}}', 'duplicate key "A"'),
            (b'{"script": "", "env": {"1A": ""}}', '"1A" is not a name'),
            (b'{"script": "", "env": {"A=B": ""}}', '"A=B" is not a name'),
            (b'{"script": "", "env": {"A\\n": ""}}', '"A\\n" is not a name'),
            (b'{"script": "", "env": {"": ""}}', '"" is not a name'),
            (b'{"script": "", "timeout": 5}', "timeout is not a string"),
            (b'{"script": "", "timeout": "5"}', 'timeout: "5" is not a duration'),
            (b'{"script": "", "timeout": "0s"}', '"0s" is not above zero'),
            (b'{"script": "", "timeout": "-1s"}', '"-1s" is not above zero'),
            (b'{"script": "", "timeout": null}', "timeout is not a string"),
            (b'{"script": ' + b"[" * 100_000, "nested too deeply"),
            (b'{"script": ' + b"1" * 5000 + b"}", "too long"),
            (b'{"script": "", "' + b"x" * 5000 + b'": 1}', 'unknown key "xxxxx'),
        ]:
            with self.assertRaises(InvalidRequestError) as raised:
                RunRequest.from_json(body)
            self.assertIn(message, str(raised.exception))
            self.assertRegex(str(raised.exception), r"\A[ -~]{1,140}\Z")
        self.assertRaises(InvalidRequestError, RunRequest.plain, b"a\0b")
        for mark in (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"):
            self.assertRaises(InvalidRequestError, RunRequest.plain, mark + b"echo hello\necho decoded\n")

    def test_variables_have_a_size_limit(self) -> None:
        def read(length: int) -> RunRequest:
            return RunRequest.from_json(json.dumps({"script": "", "env": {"A": "x" * length}}).encode())

        self.assertEqual(MAX_ENV - 3, len(read(MAX_ENV - 3).env["A"]))
        self.assertRaises(InvalidRequestError, read, MAX_ENV - 2)
