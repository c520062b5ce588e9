"""Forms as HTTP libraries send them, and hostile ones."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
import time
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.http.media_type import JSON
from bfaas.protocol.files import MAX_FILES, File
from bfaas.protocol.form import parse_form
from bfaas.protocol.request import InvalidRequestError, RunRequest

LIMIT = 1 << 20
BINARY = bytes(range(256))


def part(name: str, data: bytes | str, *more: str, filename: str | None = None) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    head = "\r\n".join(["--B", disposition, *more, "", ""]).encode()
    return head + (data.encode() if isinstance(data, str) else data) + b"\r\n"


def parse(*parts: bytes, end: bytes = b"--B--\r\n", limit: int = LIMIT) -> RunRequest:
    return parse_form(b"".join(parts) + end, b"B", limit)


def archive(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def entry(name: str, kind: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


SCRIPT = part("script", "cat")


class FormTests(SynchronousTestCase):
    def test_all_parts_reach_the_worker(self) -> None:
        request = parse(
            part("script", "cat\n"),
            part("stdin", BINARY, filename="x"),
            part("env", "A=b=c"),
            part("env", "B="),
            part("timeout", "2.5s"),
            part("file", BINARY, "Content-Type: application/octet-stream", filename="in.bin"),
            part("file", "", filename=".empty"),
            part(
                "tar", archive(entry("./", tarfile.DIRTYPE), ("./d/x", b"1"), entry("run", b"0", mode=0o750))
            ),
            part("outputs", "a.txt"),
            part("outputs", "*.png"),
        )

        worker = RunRequest.from_json(request.body)
        self.assertEqual(JSON, request.content_type)
        for decoded in (request, worker):
            self.assertEqual(
                (b"cat\n", BINARY, {"A": "b=c", "B": ""}, 2.5, ["a.txt", "*.png"]),
                (decoded.script, decoded.stdin, decoded.env, decoded.timeout, decoded.outputs),
            )
            self.assertEqual(
                {"in.bin": File(BINARY), ".empty": File(b""), "d/x": File(b"1"), "run": File(b"", 0o750)},
                decoded.files,
            )

    def test_script_alone_is_sent_as_a_plain_body(self) -> None:
        request = parse(SCRIPT)
        self.assertEqual((b"cat", None), (request.body, request.content_type))

    def test_httpx_forms(self) -> None:
        name = 'caf\u00e9 "q".txt'
        sent = httpx.Request(
            "POST",
            "http://localhost/",
            data={"script": "cat", "env": ["A=1", "B=2"]},
            files=[("file", (name, BINARY)), ("file", ("b", b"2"))],
        )
        boundary = sent.headers["content-type"].partition("boundary=")[2].encode()
        request = parse_form(sent.read(), boundary, LIMIT)
        self.assertEqual({"A": "1", "B": "2"}, request.env)
        self.assertEqual({name: File(BINARY), "b": File(b"2")}, request.files)

    def test_line_ends_of_form_values_are_converted_but_not_those_of_files(self) -> None:
        request = parse(part("script", "a\r\nb"), part("stdin", "a\r\nb"), part("env", "A=a\r\nb"))
        self.assertEqual((b"a\nb", b"a\r\nb", {"A": "a\nb"}), (request.script, request.stdin, request.env))
        self.assertEqual(b"a\r\nb", parse(part("script", "a\r\nb", filename="x.sh")).script)

    def test_encoded_filenames(self) -> None:
        for parameter, name in (
            ("filename=\"a\"; filename*=UTF-8''%e2%82%ac", "\u20ac"),
            ('filename="a%22b"', 'a"b'),
            ('filename="a\\"b"', 'a"b'),
            ('filename="a;b"', "a;b"),
        ):
            form = b'--B\r\nContent-Disposition: form-data; name="file"; %b\r\n\r\nx\r\n' % parameter.encode()
            self.assertEqual([name], list(parse(SCRIPT, form).files))

    def test_gzip_archives_are_unpacked_up_to_the_limit(self) -> None:
        data = archive(("a", b"x" * 1000))
        self.assertEqual({"a": File(b"x" * 1000)}, parse(SCRIPT, part("tar", gzip.compress(data))).files)
        bomb = gzip.compress(archive(("a", bytes(64 << 20))), 9)
        for bad, message in (
            (bomb, "larger than 1048576 bytes uncompressed"),
            (gzip.compress(data)[:-20], "cut off"),
            (b"\x1f\x8b" + b"x" * 600, "invalid gzip"),
            (gzip.compress(gzip.compress(data)), "cut off"),
        ):
            error = self.assertRaises(InvalidRequestError, parse, SCRIPT, part("tar", bad))
            self.assertIn(message, str(error))

    def test_errors_name_the_reason(self) -> None:
        for parts, message in [
            ([], "script is missing"),
            ([part("stdin", "x")], "script is missing"),
            ([SCRIPT, SCRIPT], "duplicate part script"),
            ([SCRIPT, part("stdin", "a"), part("stdin", "b")], "duplicate part stdin"),
            ([SCRIPT, part("timeout", "1s"), part("timeout", "2s")], "duplicate part timeout"),
            ([SCRIPT, part("tar", archive()), part("tar", archive())], "duplicate part tar"),
            ([SCRIPT, part("env", "A=1"), part("env", "A=2")], 'duplicate variable "A"'),
            ([SCRIPT, part("env", "A")], "not NAME=VALUE"),
            ([SCRIPT, part("env", "1=2")], "is not a name"),
            ([SCRIPT, part("Script", "x")], 'unknown part "Script"'),
            ([SCRIPT, part("", "x")], 'unknown part ""'),
            ([SCRIPT, part("_charset_", "utf-8")], "unknown part"),
            ([SCRIPT, part("files", "x", filename="a")], "unknown part"),
            ([SCRIPT, b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n"], 'unknown part "None"'),
            ([SCRIPT, b"--B\r\nX: y\r\n\r\nx\r\n"], "not a complete multipart form"),
            ([SCRIPT, b"--B\r\n\r\nx\r\n"], "not a complete multipart form"),
            ([SCRIPT, b"--B\r\nContent-Disposition: form-data; name=\xff\r\n\r\nx\r\n"], "not a complete"),
            ([part("script", b"\xff")], "script is not UTF-8, at byte 0"),
            ([part("script", "a\0b")], "NUL"),
            ([part("script", b"\xef\xbb\xbfa")], "byte order mark"),
            ([part("script", "x", "Content-Type: text/plain; charset=utf-16")], "unsupported charset"),
            ([part("script", "x", "Content-Transfer-Encoding: base64")], "Content-Transfer-Encoding"),
            ([SCRIPT, part("timeout", "5")], "not a duration"),
            ([SCRIPT, part("file", "x")], "no filename"),
            ([SCRIPT, part("file", "x", filename="")], "no filename"),
            ([SCRIPT, part("file", "x", filename="a/b")], "has a path"),
            ([SCRIPT, part("file", "x", filename="/etc/passwd")], "has a path"),
            ([SCRIPT, part("file", "x", filename="..")], "relative path"),
            ([SCRIPT, part("file", "x", filename=".")], "relative path"),
            ([SCRIPT, part("file", "x", filename="a\0b")], "control character"),
            ([SCRIPT, part("file", "x", filename="x" * 256)], "longer than 255"),
            ([SCRIPT, part("file", "x", filename="a"), part("file", "y", filename="a")], "duplicate file"),
            ([SCRIPT, part("file", "x", filename="a"), part("tar", archive(("a", b"")))], "duplicate file"),
            ([SCRIPT, part("file", "x", filename="a"), part("tar", archive(("a/b", b"")))], "both a file"),
            ([SCRIPT, part("outputs", "../x")], "relative path"),
            ([SCRIPT, *[part("outputs", "x")] * 21], "more than 20 patterns"),
            ([SCRIPT, *[part("file", "", filename=f"{n}") for n in range(MAX_FILES + 1)]], "more than"),
            ([SCRIPT, *[part("env", f"A{number}=") for number in range(2001)]], "more than 2000 parts"),
        ]:  # fmt: skip
            error = self.assertRaises(InvalidRequestError, parse, *parts)
            self.assertIn(message, str(error))
            self.assertRegex(str(error), r"\A[ -~]{1,140}\Z")

    def test_archives_with_anything_but_files_below_are_rejected(self) -> None:
        for data, message in [
            (archive(("../a", b"")), "relative path"),
            (archive(("/etc/passwd", b"")), "relative path"),
            (archive(("a/../../b", b"")), "relative path"),
            (archive(("a//b", b"")), "relative path"),
            (archive(("a\nb", b"")), "control character"),
            (archive(("d/" * 16 + "a", b"")), "components"),
            (archive(("x" * 256, b"")), "longer than 255"),
            (archive(("a", b""), ("a", b"")), "duplicate file"),
            (archive(("a", b""), ("./a", b"")), "duplicate file"),
            (archive(("a", b""), ("a/b", b"")), "both a file and"),
            (archive(entry("a", tarfile.SYMTYPE, linkname="/etc/passwd")), "neither a regular file"),
            (archive(entry("a", tarfile.LNKTYPE, linkname="../b")), "neither a regular file"),
            (archive(entry("a", tarfile.CHRTYPE, devmajor=1, devminor=3)), "neither a regular file"),
            (archive(entry("a", tarfile.BLKTYPE)), "neither a regular file"),
            (archive(entry("a", tarfile.FIFOTYPE)), "neither a regular file"),
            (archive(entry("a", tarfile.GNUTYPE_SPARSE)), "neither a regular file"),
            (archive(*[(f"{number}", b"") for number in range(MAX_FILES + 1)]), "more than"),
            (archive(*[entry("d", tarfile.DIRTYPE)] * 4001), "more than"),
            (archive(("a", b"x" * 600))[:1000], "cut off"),
            (b"x" * 2000, "not a tar archive"),
            (archive(("caf\udce9", b"")), "not UTF-8"),
        ]:  # fmt: skip
            error = self.assertRaises(InvalidRequestError, parse, SCRIPT, part("tar", data))
            self.assertIn(message, str(error))
            self.assertRegex(str(error), r"\A[ -~]{1,160}\Z")

    def test_incomplete_forms_are_rejected(self) -> None:
        form = SCRIPT + part("file", "x" * 100, filename="a") + b"--B--"
        for length in range(len(form)):
            self.assertRaises(InvalidRequestError, parse_form, form[:length], b"B", LIMIT)
        self.assertEqual(["a"], list(parse_form(form, b"B", LIMIT).files))

    def test_the_preamble_and_the_epilogue_are_ignored(self) -> None:
        request = parse(b"preamble\r\n", SCRIPT, end=b"--B--\r\nepilogue\r\n" + part("script", "evil"))
        self.assertEqual(b"cat", request.script)

    def test_nested_boundaries_are_data(self) -> None:
        inner = "--C\r\nContent-Disposition: form-data; name=script\r\n\r\nevil\r\n--C--"
        request = parse(
            SCRIPT, part("file", inner, "Content-Type: multipart/mixed; boundary=C", filename="a")
        )
        self.assertEqual((b"cat", inner.encode()), (request.script, request.files["a"].data))

    def test_hostile_forms_are_parsed_in_bounded_time(self) -> None:
        size = 1 << 20
        started = time.process_time()
        for body in (
            b"--B\r" * (size // 4),
            b"\r\n--B " + b" " * size,
            b"\r\n--B" * (size // 5),
            b"--B\r\nContent-Disposition: form-data; name=x" + b";a=b" * (size // 4) + b"\r\n\r\n",
            b"--B\r\n" + b"a: b\r\n" * (size // 6) + b"\r\n",
            b"--B\r\n" + b"a: b\r\n " * (size // 7) + b"\r\n",
            b'--B\r\nContent-Disposition: form-data; name="' + b"\\" * size + b"\r\n\r\n",
            SCRIPT + part("file", b"\r\n" * (size // 2), filename="a") + b"--B--",
            SCRIPT + part("file", b"\r" * size, filename="a") + b"--B--",
            SCRIPT + part("file", b"\r\n--" * (size // 4), filename="a") + b"--B--",
            SCRIPT + part("env", "A=" + "=" * 1000) * 900,
        ):
            with contextlib.suppress(InvalidRequestError):
                parse_form(body, b"B", LIMIT)
        self.assertLess(time.process_time() - started, 10)

    @given(
        st.lists(st.sampled_from([b"--B", b"--", b"\r\n", b"\r", b"\n", b"a: b", SCRIPT, b"x"])).map(b"".join)
    )
    def test_any_form_is_parsed_or_a_one_line_error(self, body: bytes) -> None:
        try:
            parse_form(body, b"B", LIMIT)
        except InvalidRequestError as error:
            self.assertRegex(str(error), r"\A[ -~]{1,140}\Z")


class FilesInJSONTests(SynchronousTestCase):
    def test_text_base64_and_modes(self) -> None:
        files = {"a": "\u20ac", "b": {"base64": "AP8="}, "d/c": {"base64": "", "mode": "0755"}}
        request = RunRequest.from_json(json.dumps({"script": "", "files": files}).encode())
        expected = {"a": File("\u20ac".encode()), "b": File(b"\0\xff"), "d/c": File(b"", 0o755)}
        self.assertEqual(expected, request.files)
        self.assertEqual(expected, RunRequest.from_json(request.body).files)

    def test_invalid_values_are_rejected(self) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"files": []}, "files is not an object"),
            ({"files": {"a": 1}}, 'files: "a" is not a string'),
            ({"files": {"a": None}}, 'files: "a" is not a string'),
            ({"files": {"a": {}}}, "neither text nor an object"),
            ({"files": {"a": {"base64": "", "x": 1}}}, "neither text nor an object"),
            ({"files": {"a": {"base64": 1}}}, "is not a string"),
            ({"files": {"a": {"base64": "", "mode": 420}}}, "mode is not"),
            ({"files": {"a": {"base64": "", "mode": "4755"}}}, "mode is not"),
            ({"files": {"a": {"base64": "", "mode": "0888"}}}, "mode is not"),
            ({"files": {"../a": ""}}, "relative path"),
            ({"files": {"": ""}}, "relative path"),
            ({"files": {"a\0": ""}}, "control character"),
            ({"files": {"\ud800": ""}}, "not UTF-8"),
            ({"files": {"a": "\ud800"}}, "lone surrogate"),
            ({"files": {"a": "", "a/b": ""}}, "both a file and a directory"),
            ({"files": {str(number): "" for number in range(MAX_FILES + 1)}}, "more than 1000"),
            ({"stdin": "", "stdin_base64": ""}, "both stdin and stdin_base64"),
            ({"stdin_base64": 1}, "is not a string"),
            ({"outputs": "a"}, "outputs is not a list"),
            ({"outputs": [1]}, "outputs is not a list"),
            ({"outputs": [""]}, "relative path"),
            ({"outputs": ["x"] * 21}, "more than 20"),
        ]
        for fields, message in cases:
            error = self.assertRaises(
                InvalidRequestError, RunRequest.from_json, json.dumps({"script": "", **fields}).encode()
            )
            self.assertIn(message, str(error))
        for encoded in (
            "A",
            "AA",
            "AA=",
            "AA==\n",
            " AA==",
            "AA===",
            "A-A_",
            "AA==AA==",
            "AAA=A",
            "=",
            "\u20ac",
        ):
            for fields in ({"stdin_base64": encoded}, {"files": {"a": {"base64": encoded}}}):
                error = self.assertRaises(
                    InvalidRequestError, RunRequest.from_json, json.dumps({"script": "", **fields}).encode()
                )
                self.assertIn("is not base64", str(error))
