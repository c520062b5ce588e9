from __future__ import annotations

import base64
import json
from itertools import cycle
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.protocol.formats import (
    MAX_DATA,
    MAX_EXIT,
    MAX_FILE_PIECE,
    SSE_HEARTBEAT,
    EventWriter,
    Exit,
    FilePiece,
    Format,
    Stream,
    write_file,
)
from bfaas.protocol.parser import MAX_COMMENTS, MAX_EVENT, EventReader, OutputLimitError, RawReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_OUTPUT = 1 << 20
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)
# Tokens of the format, so that random input is sometimes valid.
FRAGMENTS = [
    b"event: ", b"stdout", b"file", b"exit", b"data: ", b"\n", b"\n\n", b"\r", b": ", b'"', b"\\u",
    b'{"code":', b"1", b"}", b"[", b"\xff", b"\0", b'event: stdout\ndata: "x"\n\n',
    b'event: exit\ndata: {"code": 3}\n\n', b"\nexit: 3\n",
]  # fmt: skip
NOISE = st.binary() | st.lists(st.sampled_from(FRAGMENTS)).map(b"".join)


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Split into pieces of these sizes, cyclically."""
    start = 0
    for size in cycle(sizes):
        if start >= len(data):
            return
        yield data[start : start + size]
        start += size


def event(name: str, data: str | bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (
        name.encode(),
        data.encode() if isinstance(data, str) else data,
    )


def read(
    data: bytes, sizes: Iterable[int], max_output: int = MAX_OUTPUT
) -> tuple[bytes, Exit | None, str | None]:
    """Parse events in pieces; return the forwarded data, the exit and the error."""
    reader = EventReader(max_output)
    output = b"".join([reader.feed(piece) for piece in cut(data, sizes)])
    return output, reader.exit, str(reader.error) if reader.error else None


class EventReaderTests(SynchronousTestCase):
    def test_invalid_events_are_errors(self) -> None:
        exit_ = event("exit", '{"code": 0}')
        cases = [
            b"\n\n",
            b"hello\n\n",
            b"data: 1\n\n",
            b"event: stdout\n\n",
            b'data: "x"\nevent: stdout\n\n',
            b'event: stdout\ndata: "x"\ndata: "y"\n\n',
            b'event: stdout\nid: 1\ndata: "x"\n\n',
            b'event: stdout\r\ndata: "x"\r\n\n\n',
            b': comment\nevent: stdout\ndata: "x"\n\n',
            event("stdin", '"x"'),
            event("STDOUT", '"x"'),
            event("stdout", "x"),
            event("stdout", '"x'),
            event("stdout", '"a\rb"'),
            event("stdout", '"a"\r'),
            event("stdout", '"a\0b"'),
            event("stdout", '"x" "y"'),
            event("stdout", "1"),
            event("stdout", "null"),
            event("stdout", '["x"]'),
            event("stdout", "[" * 100_000),
            event("stdout", b'"\xff"'),
            event("stdout", b'"\xed\xa0\x80"'),
            event("stdout", '"\\ud800"'),
            event("stdout", '\ufeff"x"'),
            event("stdout", '"x"'.encode("utf-16")),
            event("stdout", '"x"'.encode("utf-32-le")),
            event("exit", "[" * 100_000),
            event("exit", '{"code": 0}' + " " * MAX_EXIT),
            *(event("exit", f'{{"code": {code}}}') for code in ("256", "-2", "-1.0", "true", "null")),
            exit_ + exit_,
            exit_ + event("stdout", '"x"'),
        ]
        good = event("stderr", '"before"')
        for case in cases:
            output, _, error = read(good + case + good, [len(good + case)])
            self.assertEqual((good, True), (output, error is not None), case[:80])

    def test_comments_are_dropped(self) -> None:
        events = (
            SSE_HEARTBEAT + event("stdout", '"x"') + b":\n\n" + event("exit", '{"code": 0}') + SSE_HEARTBEAT
        )
        self.assertEqual((event("stdout", '"x"'), Exit(0), None), read(events, [len(events)]))

    def test_comments_have_a_size_limit(self) -> None:
        comments, x = MAX_COMMENTS // len(SSE_HEARTBEAT), event("stdout", '"x"')
        output, _, error = read(SSE_HEARTBEAT * comments + x, [1000])
        self.assertEqual((x, None), (output, error))
        output, _, error = read(x + SSE_HEARTBEAT * comments + x + SSE_HEARTBEAT + x, [1000])
        self.assertEqual((x + x, "too many comments"), (output, error))

    def test_space_after_a_colon_is_optional(self) -> None:
        events = b'event:stderr\ndata:"x"\n\nevent:exit\ndata:{"code":1}\n\n'
        self.assertEqual((event("stderr", '"x"'), Exit(1), None), read(events, [len(events)]))

    def test_events_have_a_size_limit(self) -> None:
        start = b'event: stdout\ndata: "'
        longest = start + b"x" * (MAX_EVENT - len(start) - 1) + b'"\n\n'
        whole, _, _ = read(longest, [len(longest)])
        self.assertEqual(longest.count(b"x"), whole.count(b"x"))
        for size in (len(longest), len(longest) - 1, 65536, 1000):
            self.assertEqual((whole, None, None), read(longest, [size]))
            output, _, error = read(longest + b'event: stdout\ndata: "x' + longest, [size])
            self.assertEqual((whole, "event too large"), (output, error))
        reader = EventReader(MAX_OUTPUT)
        for _ in range(100):
            reader.feed(start + b"x" * 65536)
        self.assertLessEqual(sum(map(len, [*reader._event, reader._line])), MAX_EVENT)

    def test_events_of_other_workers_are_split_and_escaped(self) -> None:
        # As encoded by Go, by Python with and without ensure_ascii, and by encoders that escape little.
        texts = [
            "\U0001f600" * 40_000,
            "\0" * 60_000,
            "a\u2028b\u2029c\x85d\x9b",
            "<&>\n" * 30_000,
            "\\" * 50_000,
        ]
        for text in texts:
            for ensure_ascii in (True, False):
                data = json.dumps(text, ensure_ascii=ensure_ascii)
                for format_ in (Format.EVENTS, Format.NDJSON):
                    reader = EventReader(MAX_OUTPUT, format_)
                    output = reader.feed(event("stderr", data)).decode()
                    self.assertIsNone(reader.error)
                    lines = output.splitlines()
                    self.assertEqual(output.count("\n"), len(lines))
                    self.assertLessEqual(max(len(line.encode()) for line in lines), MAX_DATA + 32)
                    if format_ is Format.NDJSON:
                        read_ = [json.loads(line)["data"] for line in lines]
                    else:
                        read_ = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
                    self.assertEqual(text, "".join(read_))
                    self.assertNotIn("", read_)

    @settings(deadline=None)
    @given(st.binary() | st.text().map(str.encode), st.binary(), SIZES)
    def test_output_within_the_limit_is_no_error(self, out: bytes, err: bytes, sizes: list[int]) -> None:
        writer = EventWriter()
        written = b"".join([writer.output(Stream.STDOUT, piece) for piece in cut(out, sizes)])
        written += writer.output(Stream.STDERR, err) + writer.end(Exit(0))
        _, exit_, error = read(written, [len(written)], len(out) + len(err))
        self.assertEqual((Exit(0), None), (exit_, error))

    def test_first_event_over_the_output_limit_is_an_error(self) -> None:
        cases = [
            (10, event("stdout", '"12345"') * 2, event("stderr", '"x"')),
            (2, event("stdout", '""') * 2, event("stdout", '""')),
            (4, event("stdout", '"\\u0041\\n"') * 2, event("stdout", '"\\u0041"')),
            (6, event("stdout", '"\u20ac\\u20ac"'), event("stdout", '"\u20ac"')),
            (4, event("stdout", '"\ufffd\\ufffd"') * 2, event("stdout", '"\ufffd"')),
        ]
        for limit, within, beyond in cases:
            for size in (1, 1000):
                self.assertEqual((within, None, None), read(within, [size], limit))
                refused = (within, None, "output limit exceeded")
                self.assertEqual(refused, read(within + beyond + within, [size], limit))
        reader = EventReader(0)
        reader.feed(event("stdout", '"x"'))
        self.assertIsInstance(reader.error, OutputLimitError)

    @settings(deadline=None)
    @given(NOISE, SIZES)
    @example(b'event: exit\ndata: {"code": 0}\n\n\n', [1])
    def test_result_does_not_depend_on_where_input_is_split(self, data: bytes, sizes: list[int]) -> None:
        self.assertEqual(read(data, [len(data) or 1]), read(data, sizes))


def file_event(name: object = "a", data: bytes = b"xyz", size: object = None, **more: object) -> bytes:
    size = len(data) if size is None else size
    payload = {"name": name, "size": size, "mode": "0644", "base64": base64.b64encode(data).decode(), **more}
    return event("file", json.dumps(payload))


class FileEventTests(SynchronousTestCase):
    def read(self, *events: bytes, max_output: int = MAX_OUTPUT) -> tuple[bytes, str | None]:
        reader = EventReader(max_output, Format.NDJSON, ["a", "d/*", "\u20ac"])
        output = b"".join(map(reader.feed, events))
        return output, None if reader.error is None else str(reader.error)

    def test_requested_files_are_forwarded_in_one_form(self) -> None:
        output, error = self.read(
            event("stdout", '"x"'),
            file_event("d/b", b"abc", 5),
            file_event("d/b", b"de", 5),
            event("file", '{"base64":"","mode":"0755","size":0,"name":"\\u20ac"}'),
            b": comment\n\n",
            event("exit", '{"code": 0}'),
        )
        self.assertIsNone(error)
        self.assertEqual(
            [
                {"event": "stdout", "data": "x"},
                {"event": "file", "name": "d/b", "size": 5, "mode": "0644", "base64": "YWJj"},
                {"event": "file", "name": "d/b", "size": 5, "mode": "0644", "base64": "ZGU="},
                {"event": "file", "name": "\u20ac", "size": 0, "mode": "0755", "base64": ""},
            ],
            [json.loads(line) for line in output.splitlines()],
        )

    def test_events_are_shorter_than_the_limit(self) -> None:
        piece = FilePiece("/".join(['\U0001f600"' * 51] * 4)[:1000], 1 << 52, 0o644, bytes(MAX_FILE_PIECE))
        self.assertLessEqual(len(write_file(Format.EVENTS, piece)), MAX_DATA)

    def test_an_incomplete_last_file_is_no_error(self) -> None:
        _, error = self.read(file_event(size=9), event("exit", '{"code": 124, "reason": "timeout"}'))
        self.assertIsNone(error)

    def test_invalid_file_events_are_errors(self) -> None:
        big = bytes(MAX_FILE_PIECE + 1)
        for events, message in [
            ([file_event("b")], "not requested"),
            ([file_event("d/e/f")], "not requested"),
            ([file_event("d/.b")], "not requested"),
            ([file_event("../a")], "invalid name"),
            ([file_event("/etc/passwd")], "invalid name"),
            ([file_event("d/..")], "invalid name"),
            ([file_event("d//b")], "invalid name"),
            ([file_event("d/" + "x" * 256)], "invalid name"),
            ([file_event("d/\n")], "invalid name"),
            ([file_event("d/\x1b[31m")], "invalid name"),
            (
                [event("file", '{"name": "d/\\ud800", "size": 0, "mode": "0644", "base64": ""}')],
                "invalid name",
            ),
            ([file_event(), file_event()], "duplicate"),
            ([file_event(size=9), file_event("d/b")], "incomplete"),
            ([file_event(size=9), file_event(size=8)], "incomplete"),
            ([file_event(size=9), file_event(size=9, mode="0755")], "incomplete"),
            ([file_event(size=2)], "invalid size"),
            ([file_event(size=5), file_event(size=5)], "invalid size"),
            ([file_event(data=b"", size=5)], "invalid size"),
            ([file_event(data=big)], "invalid size"),
            ([file_event(size=-1)], "invalid file event"),
            ([file_event(size=1 << 60)], "invalid file event"),
            ([file_event(size=3.0)], "invalid file event"),
            ([file_event(size=True)], "invalid file event"),
            ([file_event(name=1)], "invalid file event"),
            ([file_event(more=1)], "invalid file event"),
            ([event("file", '"x"')], "invalid file event"),
            ([event("file", "[]")], "invalid file event"),
            ([event("file", '{"name": "a"}')], "invalid file event"),
            ([event("file", "nonsense")], "invalid JSON"),
            ([file_event(mode="4755")], "invalid mode"),
            ([file_event(mode=420)], "invalid mode"),
            ([file_event(base64="eHl")], "invalid base64"),
            ([file_event(base64="eHl6\n")], "invalid base64"),
            ([file_event(base64=1)], "invalid file event"),
            ([file_event(), event("stdout", '"x"')], "output after a file"),
            ([event("exit", '{"code": 0}'), file_event()], "event after the exit"),
        ]:
            output, error = self.read(event("stdout", '"out"'), *events)
            self.assertIn(message, str(error), events)
            self.assertTrue(output.startswith(b'{"event": "stdout", "data": "out"}\n'))
        many = [file_event(f"d/{number}", b"") for number in range(1001)]
        self.assertEqual("duplicate file, or too many files", self.read(*many)[1])
        reader = EventReader(MAX_OUTPUT)
        reader.feed(file_event())
        self.assertEqual("a file that was not requested", str(reader.error))

    def test_output_and_files_share_a_limit(self) -> None:
        events = [event("stdout", '"abc"'), file_event(data=b"def")]
        self.assertIsNone(self.read(*events, max_output=6)[1])
        reader = EventReader(5, Format.EVENTS, ["a"])
        self.assertEqual(event("stdout", '"abc"'), reader.feed(b"".join(events)))
        self.assertIsInstance(reader.error, OutputLimitError)


class RawReaderTests(SynchronousTestCase):
    def test_exit_is_parsed_from_the_last_line_only(self) -> None:
        cases = {
            b"\nexit: 0\nmore\nexit: 3\n": Exit(3),
            b"\nexit: 0\n\nexit: 124 timeout\n": Exit(124, reason="timeout"),
            b"\nexit: -1\n": Exit(255),
            b"\nexit: 256\n": None,
            b"": None,
            b"hello\n": None,
            b"\nexit: 0\nmore": None,
            b"\nexit: 0\n\n": None,
            b"\nexit: 0": None,
            b"exit: 0\n": None,
            b"\nexit: \n": None,
            b"\nexit: 0000\n": None,
            b"\nexit: 0 timeout!\n": None,
            b"\nexit: 0 " + b"x" * 60 + b"\n": None,
        }
        for data, exit_ in cases.items():
            reader = RawReader(MAX_OUTPUT)
            self.assertEqual(data, reader.feed(data))
            self.assertEqual(exit_, reader.exit, data)

    def test_output_over_the_limit_is_an_error(self) -> None:
        for size in (1, 7, 1000):
            reader = RawReader(10)
            data = b"0123456789" + b"\nexit: 124 timeout\n" + b"x" * 100
            output = b"".join([reader.feed(piece) for piece in cut(data, [size])])
            self.assertTrue(data.startswith(output))
            self.assertTrue(30 <= len(output) <= 10 + 64, len(output))
            self.assertIsInstance(reader.error, OutputLimitError)
