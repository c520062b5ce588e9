"""What a request asks for, and what is refused."""

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


class AskTests(SynchronousTestCase):
    @given(requests, st.booleans())
    def test_a_worker_reads_what_the_client_asked_for(self, told: dict[str, Any], ascii_: bool) -> None:
        ask = RunRequest.from_json(json.dumps(told, ensure_ascii=ascii_).encode())

        self.assertEqual(told["script"].encode(), ask.script)
        self.assertEqual(told.get("stdin", "").encode(), ask.stdin)
        self.assertEqual(told.get("env", {}), ask.env)
        self.assertEqual(2.5 if "timeout" in told else None, ask.timeout)
        self.assertLessEqual(len(ask.body), ask.size)
        if ask.content_type is None:
            self.assertEqual(({"script"}, ask.script), (set(told), ask.body))
        else:
            again = RunRequest.from_json(ask.body)
            self.assertEqual((JSON, ask.body), (ask.content_type, again.body))
            self.assertEqual(
                (ask.script, ask.stdin, ask.env, ask.timeout),
                (again.script, again.stdin, again.env, again.timeout),
            )

    @given(st.binary())
    def test_whatever_comes_is_read_or_refused_in_a_line(self, data: bytes) -> None:
        for body in (data, b'{"script":"' + data + b'"}', b'{"script":"","' + data + b'":1}'):
            try:
                RunRequest.from_json(body)
            except InvalidRequestError as error:
                self.assertRegex(str(error), r"\A[ -~]{1,120}\Z")

    def test_a_plain_body_is_the_script(self) -> None:
        ask = RunRequest.plain(b'{"script": 1}\xff')

        self.assertEqual((b'{"script": 1}\xff', ask.body), (ask.body, ask.script))
        self.assertIsNone(ask.content_type)

    def test_a_timeout_is_capped(self) -> None:
        def limit(timeout: str) -> float:
            return RunRequest.from_json(
                json.dumps({"script": "", "timeout": timeout}).encode()
            ).effective_timeout(10)

        self.assertEqual([0.5, 10, 10], [limit("500ms"), limit("10s"), limit("1h")])
        self.assertEqual(10, RunRequest.plain(b"").effective_timeout(10))

    def test_what_is_refused_is_told(self) -> None:
        for body, told in [
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
            self.assertIn(told, str(raised.exception))
            self.assertRegex(str(raised.exception), r"\A[ -~]{1,120}\Z")
        self.assertRaises(InvalidRequestError, RunRequest.plain, b"a\0b")
        for mark in (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"):
            self.assertRaises(InvalidRequestError, RunRequest.plain, mark + b"echo hello\necho again\n")

    def test_variables_have_a_size(self) -> None:
        def read(length: int) -> RunRequest:
            return RunRequest.from_json(json.dumps({"script": "", "env": {"A": "x" * length}}).encode())

        self.assertEqual(MAX_ENV - 3, len(read(MAX_ENV - 3).env["A"]))
        self.assertRaises(InvalidRequestError, read, MAX_ENV - 2)
