"""Media types, charsets and encodings of request bodies, and the detection of form data."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers

from bfaas.http.errors import HTTPError
from bfaas.http.media_type import FORM, JSON, body_type

SCRIPTS = [
    b"",
    b"uptime",
    b"uptime\n",
    b"A=1; echo $A",
    b"X=5 env",
    b"X=5&uptime",
    b"X=5&&uptime",
    b"A=1&B=2&wait",
    b"A=1\nuptime",
    b"A=1\n",
    b"A=$(uptime)",
    b"A=`uptime`&B=1",
    b"A=1|uptime",
    b"A=1>file",
    b'A="1"&B=2&echo',
    b"g++",
    b"echo+hi",
    b"kill%1",
    b"date +%F",
    b"printf '%41'",
    b"ls&",
    b"script=ls -la&x=1",
    b"/bin/a=1",
    b"A=\xc3\xa9",
    b"sleep%5",
    "\u2028A=1".encode(),
    b"echo hello; a=b&c=d",
    b"for i in 1 2 3; do echo $i; done",
    b'{"script": "uptime"}',
]
"""Scripts as `curl -d` sends them, with the form media type."""

FORMS = [
    b"script=echo+hi&x=1",
    b"script=uptime",
    b"script=",
    b"script=&timeout=",
    b"script=echo%20hi%0Aecho%20again%0A",
    b"echo%20hi%3B%20date",
    b"%23%21%2Fbin%2Fbash%0Aecho+hi%0A",
    b"x&script=echo%20hi",
    b"a%5B%5D=1&a%5B%5D=2",
    b"a[]=1&a[0]=2",
    b"script=echo+'hi'+(x)+!&b=~",
    b"url=http://a.example:80/b,c@d?e&f=g==",
    b"first-name=J%C3%BCrgen&last.name=X*_",
]
"""Form data as browsers, `curl --data-urlencode`, Python's urlencode and jQuery send it."""


def parse(body: bytes, *headers: tuple[str, str]) -> bool:
    named = Headers()
    for name, value in headers:
        named.addRawHeader(name, value)
    return body_type(named, body).is_json


class MediaTypeTests(SynchronousTestCase):
    def assert_refused(self, code: int, *headers: tuple[str, str], body: bytes = b"") -> HTTPError:
        with self.assertRaises(HTTPError, msg=headers) as raised:
            parse(body, *headers)
        error: HTTPError = raised.exception
        self.assertEqual(code, error.code, headers)
        self.assertRegex(str(error), r"\A[ -~]{1,100}\Z")
        return error

    def test_json_and_scripts_are_distinguished_by_media_type(self) -> None:
        for kind in (
            JSON,
            "Application/JSON",
            "application/json; charset=utf-8",
            "application/json;charset=UTF-8",
            'application/json ; a="b;\\"c, d" ; charset="utf-8";',
        ):
            self.assertTrue(parse(b"", ("Content-Type", kind)), kind)
        for kind in (
            "",
            " ",
            FORM,
            "text/plain",
            "text/plain; charset=UTF-8",
            "text/plain; charset=us-ascii",
            "text/x-shellscript",
            "application/octet-stream",
            "application/x-sh",
            "text/markdown; variant=a; charset=utf8",
        ):
            self.assertFalse(parse(b"uptime", ("Content-Type", kind)), kind)
        self.assertFalse(parse(b"uptime"))

    def test_encoded_bodies_are_rejected_with_accept_encoding(self) -> None:
        for values in (
            ["gzip"],
            ["br"],
            ["deflate"],
            ["zstd"],
            ["x-gzip"],
            ["GZIP"],
            ["identity, gzip"],
            ["gzip,identity"],
            ["identity", "gzip"],
            ["aws-chunked"],
            [", br"],
            ["utf-8"],
        ):
            error = self.assert_refused(415, *[("Content-Encoding", value) for value in values])
            self.assertEqual({"Accept-Encoding": "identity"}, error.headers)
        for harmless in ("identity", "Identity", "", "identity, identity", " , "):
            self.assertFalse(parse(b"uptime", ("Content-Encoding", harmless)))

    def test_invalid_or_repeated_media_types_are_rejected(self) -> None:
        self.assert_refused(400, ("Content-Type", JSON), ("Content-Type", "text/plain"))
        self.assert_refused(400, ("Content-Type", "text/plain"), ("Content-Type", "text/plain"))
        for kind in (
            "text/plain, application/json",
            "application/json, application/json",
            "json",
            "application/",
            "/json",
            "application/json charset=utf-8",
            "application/json; charset",
            'application/json; charset="utf-8',
            "application /json",
            "text/plain" + "; " * 4000 + "!",
            "text/plain" + ";  a=b" * 2000 + "\x7f",
        ):
            self.assert_refused(400, ("Content-Type", kind))
        self.assert_refused(400, ("Content-Range", "bytes 0-5/10"))

    def test_charsets_other_than_utf8_are_rejected(self) -> None:
        for kind in (
            "text/plain; charset=utf-16",
            "text/plain; charset=UTF-16LE",
            "text/plain; charset=utf-7",
            "text/plain; charset=cp037",
            "text/plain;charset=ISO-8859-1",
            'application/json; charset="latin-1"',
            "application/json; charset=utf-8; charset=utf-16",
            f"{FORM}; Charset=windows-1252",
            "text/plain; charset=",
            'text/plain; charset=""',
        ):
            code = 400 if kind.endswith("charset=") else 415
            self.assert_refused(code, ("Content-Type", kind), body=b"uptime")

    def test_media_types_other_than_scripts_are_rejected(self) -> None:
        for kind in (
            "multipart/form-data; boundary=x",
            "multipart/mixed",
            "multipart/form-data",
            "text/json",
            "application/problem+json",
            "application/ld+json; profile=x",
            "application/vnd.api+JSON",
            "application/json-seq",
            "application/x-ndjson",
            "application/gzip",
            "application/zip",
            "application/x-tar",
            "application/zstd",
            "application/vnd.x+gzip",
            "image/png",
            "video/mp4",
        ):
            error = self.assert_refused(415, ("Content-Type", kind), body=b"uptime")
            self.assertEqual({"Accept": "text/plain, application/json, multipart/form-data"}, error.headers)

    def test_scripts_with_the_form_media_type_are_accepted(self) -> None:
        for body in SCRIPTS:
            self.assertFalse(parse(body, ("Content-Type", FORM)), body)

    def test_form_data_is_rejected(self) -> None:
        for body in FORMS:
            self.assert_refused(415, ("Content-Type", f"{FORM}; charset=utf-8"), body=body)
            self.assertFalse(parse(body, ("Content-Type", "text/plain")), body)
            self.assertFalse(parse(body), body)

    def test_large_bodies_are_checked_in_linear_time(self) -> None:
        for body in (b"a" * (1 << 20) + b"% ", b"a=b&" * (1 << 18) + b" ", b"a=" * (1 << 19) + b";"):
            self.assertFalse(parse(body, ("Content-Type", FORM)))
