from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.http.response_parser import MAX_FIELDS, MAX_HEAD, MAX_INTERIM, ResponseParser
from tests.unit.protocol.test_parser import cut

if TYPE_CHECKING:
    from collections.abc import Iterable

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
PLAIN = OK + b"Content-Length: 4\r\n\r\nbody"
CHUNKS = b"2\r\nbo\r\n002\r\ndy\r\n0\r\n\r\n"

Outcome = tuple[int | None, bytes, bool, str | None]


def parse(data: bytes, sizes: Iterable[int], method: bytes = b"GET") -> Outcome:
    """Parse a response in pieces; return its status, body, whether it is complete, and the error."""
    parser = ResponseParser(method)
    body = b"".join([parser.feed(piece) for piece in cut(data, sizes)])
    return outcome(parser, body)


def outcome(parser: ResponseParser, body: bytes) -> Outcome:
    error = str(parser.error) if parser.error else None
    return parser.head.code if parser.head else None, body, parser.complete, error


def head(*fields: str) -> bytes:
    return OK + "".join([f"{field}\r\n" for field in fields]).encode("latin-1") + b"\r\n"


def lines(size: int) -> bytes:
    """Return a few header fields of `size` bytes in total."""
    whole, rest = divmod(size, 1000)
    if 0 < rest < 10:
        whole, rest = whole - 1, rest + 1000
    field = b"x: " + b"y" * 995 + b"\r\n"
    return field * whole + (b"x: " + b"y" * (rest - 5) + b"\r\n" if rest else b"")


class ResponseTests(SynchronousTestCase):
    def assert_read(self, data: bytes, expected: Outcome, method: bytes = b"GET") -> None:
        for size in (1, 7, len(data)):
            self.assertEqual(expected, parse(data, [size], method), (data[:200], size))

    def test_valid_responses(self) -> None:
        cases: list[tuple[bytes, bytes]] = [
            (PLAIN, b"body"),
            (CHUNKED + CHUNKS, b"body"),
            (INTERIM + PLAIN, b"body"),
            (INTERIM * MAX_INTERIM + PLAIN, b"body"),
            (head("Content-Length: 0"), b""),
            (CHUNKED + b"0\r\n\r\n", b""),
            (CHUNKED + b'4;a=b;c="d"\r\nbody\r\n0;x\r\nTrailer: x\r\n\r\n', b"body"),
            (head("TRANSFER-ENCODING:\t Chunked \t") + CHUNKS, b"body"),
            (head("content-length:4", "Empty:", "X: a\tb \xe9") + b"body", b"body"),
            (b"HTTP/1.1 200 \r\n" + PLAIN.partition(b"\r\n")[2], b"body"),
            (head(*["a: b"] * (MAX_FIELDS - 1), "Content-Length: 4") + b"body", b"body"),
        ]
        for data, body in cases:
            self.assert_read(data, (200, body, True, None))
            # Data after the response is discarded.
            self.assert_read(data + b"HTTP/1.1 500 Hello\r\n\r\nmore", (200, body, True, None))
            self.assertFalse(parse(data[:-1], [len(data)])[2], data)

    def test_statuses(self) -> None:
        for status in (b"204 No Content", b"304 Not Modified"):
            self.assert_read(
                b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nbody",
                (int(status[:3]), b"", True, None),
            )
        self.assert_read(PLAIN, (200, b"", True, None), b"HEAD")
        self.assert_read(PLAIN.replace(b"200", b"599"), (599, b"body", True, None))
        no_status = (None, b"", False, "invalid HTTP/1.1 status line")
        for line in (
            b"HTTP/1.1 -200 OK", b"HTTP/1.1 99999999 OK", b"HTTP/1.1 2_0 OK", b"HTTP/1.1 +20 OK",
            b"HTTP/1.1 000 OK", b"HTTP/1.1 600 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 0200 OK",
            b"HTTP/1.1 200", b"HTTP/1.1  200 OK", b"SSH-2.0-OpenSSH",
            b"HTTP/1.0 200 OK", b"HTTP/2 200 OK", b"http/1.1 200 OK", b" HTTP/1.1 200 OK", b"", b"\r\n",
            b"HTTP/1.1 200 O\0K", b"HTTP/1.1 200 O\nK", b"HTTP/1.1 200 O\rK", b"ICY 200 OK",
            "HTTP/1.1 \u0662\u0660\u0660 OK".encode(),
        ):  # fmt: skip
            self.assert_read(line + b"\r\n" + PLAIN.partition(b"\r\n")[2], no_status)

    def test_body_without_framing_is_never_complete(self) -> None:
        self.assert_read(OK + b"\r\nbody", (200, b"body", False, None))

    def test_header_lines(self) -> None:
        refused = (None, b"", False, "invalid header")
        for field in (
            "X : a", " X: a", "\tX: a", ": a", "X", "X\0: a", "X: a\0", "X: a\x7f", "X: a\nY: b",
            "X: a\rY: b", "X Y: a", "X(: a", "X: a\r\n fly-replay: app=x", "\xe9: a", "X\r\n\tY: a",
        ):  # fmt: skip
            self.assert_read(head(field, "Content-Length: 4") + b"body", refused)

    def test_only_crlf_ends_a_line(self) -> None:
        for data in (PLAIN, CHUNKED + CHUNKS):
            self.assertFalse(parse(data.replace(b"\r\n", b"\n"), [len(data)])[2])
            self.assertFalse(parse(data.replace(b"\r\n", b"\r"), [len(data)])[2])
        self.assert_read(CHUNKED + b"2\nbo\r\n", (200, b"", False, "invalid chunk size"))
        self.assert_read(CHUNKED + b"2\r\nbo\n0\r\n\r\n", (200, b"bo", False, "line too long"))

    def test_framing(self) -> None:
        twice, unknown, length = (
            "more than one Content-Length or Transfer-Encoding",
            "unsupported Transfer-Encoding",
            "invalid Content-Length",
        )
        for error, *fields in (
            (twice, "Content-Length: 4", "Transfer-Encoding: chunked"),
            (twice, "Content-Length: 4", "Content-Length: 5"),
            (twice, "Content-Length: 4", "Content-Length: 4"),
            (twice, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
            (unknown, "Transfer-Encoding: gzip"),
            (unknown, "Transfer-Encoding: gzip, chunked"),
            (unknown, "Transfer-Encoding: chunked, chunked"),
            (unknown, "Transfer-Encoding: xchunked"),
            (unknown, "Transfer-Encoding:"),
            (unknown, "Transfer-Encoding: identity"),
            *((length, f"Content-Length: {value}") for value in (
                "-1", "+4", "0x4", "4, 4", "4,5", "4.0", "4_0", "4 4", "", "\xb2", "1" * 16,
            )),
            ("unexpected Content-Encoding", "Content-Length: 4", "Content-Encoding: gzip"),
        ):  # fmt: skip
            self.assert_read(head(*fields) + b"body", (None, b"", False, error))

    def test_content_encoding_identity_is_accepted(self) -> None:
        self.assert_read(
            head("Content-Length: 4", "Content-Encoding: Identity") + b"body", (200, b"body", True, None)
        )

    def test_chunk_sizes(self) -> None:
        for size in (
            b"-1", b"+4", b"0x4", b"4 ", b" 4", b"4_0", b"", b"g", b"f" * 9, b"000000004", b"4, 4", b"4;\0",
            b"4;a\nb", "\u0664".encode(),
        ):  # fmt: skip
            self.assert_read(CHUNKED + size + b"\r\nbody\r\n", (200, b"", False, "invalid chunk size"))
        self.assert_read(CHUNKED + b"2\r\nbody\r\n", (200, b"bo", False, "line too long"))
        self.assert_read(CHUNKED + b"4\r\nbod\r\n0\r\n\r\n", (200, b"bod\r", False, "line too long"))
        self.assert_read(CHUNKED + b"ffffffff\r\nbody", (200, b"body", False, None))

    def test_head_limits(self) -> None:
        rest = len(b"Content-Length: 4\r\n\r\n")
        fits = OK + lines(MAX_HEAD - len(OK) - rest) + b"Content-Length: 4\r\n\r\nbody"
        self.assertEqual(MAX_HEAD + 4, len(fits))
        self.assert_read(fits, (200, b"body", True, None))
        self.assertIsNotNone(parse(fits.replace(b"x:", b"x: ", 1), [len(fits)])[3])
        coding = b"Transfer-Encoding: chunked\r\n\r\n"
        fits = OK + lines(MAX_HEAD - len(OK) - len(coding)) + coding
        beside = b"4;" + b"x" * 3000 + b"\r\nbody\r\n0\r\n" + lines(3000) + b"\r\n"
        self.assert_read(fits + beside, (200, b"body", True, None))
        for endless in (
            b"H" * (MAX_HEAD + 2),
            OK + b"x: " + b"y" * MAX_HEAD,
            OK + b"x" * MAX_HEAD,
            OK + lines(2 * MAX_HEAD),
            OK + b"a: b\r\n" * (MAX_FIELDS + 1),
            INTERIM * (MAX_INTERIM + 1),
            INTERIM * 1000 + PLAIN,
            b"HTTP/1.1 100 Continue\r\n"
            + lines(5000)
            + b"\r\n"
            + b"HTTP/1.1 100 Continue\r\n"
            + lines(11500),
            (b"HTTP/1.1 103 Early Hints\r\n" + b"a: b\r\n" * 20 + b"\r\n") * 4,
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + PLAIN,
            b"\n" * 2 * MAX_HEAD,
        ):
            status, body, complete, error = parse(endless, [len(endless)])
            self.assertEqual(
                (None, b"", False, True), (status, body, complete, error is not None), endless[:50]
            )
            self.assertEqual(parse(endless, [1]), parse(endless, [len(endless)]))

    def test_chunk_extension_and_trailer_limits(self) -> None:
        for beside in (
            b"1;" + b"x" * (MAX_HEAD + 9),
            b"1;xxxxxxx\r\nx\r\n" * (MAX_HEAD // 8 + 1),
            b"0\r\n" + lines(MAX_HEAD + 1),
            b"0\r\n" + b"a: b\r\n" * (MAX_FIELDS + 1),
            b"0\r\nfly-replay : x\r\n\r\n",
        ):
            status, _, complete, error = parse(CHUNKED + beside, [len(CHUNKED + beside)])
            self.assertEqual((200, False, True), (status, complete, error is not None), beside[:50])
            self.assertEqual(parse(CHUNKED + beside, [1]), parse(CHUNKED + beside, [1000]))

    def test_memory_is_bounded_by_one_piece(self) -> None:
        piece = 65536
        for data in (
            CHUNKED + b"1\r\nx\r\n" * 50_000,
            CHUNKED + b"ffffffff\r\n" + b"x" * (2 << 20),
            CHUNKED + (b"%x\r\n" % piece + b"x" * piece + b"\r\n") * 32,
            head("Content-Length: 999999999999999") + b"x" * (2 << 20),
            OK + b"\r\n" + b"x" * (2 << 20),
            OK + b"x: " + b"y" * (2 << 20),
            OK + lines(2 << 20),
            INTERIM * 50_000,
            CHUNKED + b"0\r\n" + lines(2 << 20),
        ):
            pieces = list(cut(data, [piece]))
            parser = ResponseParser()
            tracemalloc.start()
            for part in pieces:
                parser.feed(part)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.assertLess(peak, 1 << 20, data[:60])


# Tokens of the protocol, so that random input is sometimes valid.
WORDS = st.sampled_from([
    OK, CHUNKED, PLAIN, CHUNKS, INTERIM, b"HTTP/1.1 ", b"200 ", b"204 x", b"\r\n", b"\r", b"\n", b"\r\n\r\n",
    b"0\r\n", b"0\r\n\r\n", b"1\r\nx\r\n", b"4\r\n", b"4;x\r\nbody\r\n", b"ff", b"Content-Length: 4\r\n",
    b"x: y\r\n", b" ", b":", b"\0", b"Transfer-Encoding: chunked\r\n", b"x: " + b"y" * 5000 + b"\r\n",
    b";" + b"z" * 5000, b"body",
])  # fmt: skip
NOISE = st.lists(WORDS | st.binary(max_size=9), max_size=12).map(b"".join)


class FuzzTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=400)
    @given(
        st.sampled_from([b"", OK, CHUNKED, INTERIM, head("Content-Length: 9")]),
        NOISE,
        st.lists(st.integers(1, 9000), min_size=1, max_size=5),
    )
    @example(CHUNKED, b"4;" + b"z" * 16383 + b"\r", [1])
    @example(CHUNKED, b"4\r\nbody\r", [1])
    def test_result_does_not_depend_on_where_input_is_split(
        self, start: bytes, data: bytes, sizes: list[int]
    ) -> None:
        data = start + data
        parser = ResponseParser()
        body = b""
        for piece in cut(data, sizes):
            body += parser.feed(piece)
            self.assertLessEqual(len(parser._data) - parser._position, MAX_HEAD + 16)
        self.assertEqual(parse(data, [len(data) or 1]), outcome(parser, body))
        self.assertLessEqual(len(body), len(data))
