from __future__ import annotations

import json
from itertools import cycle
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.protocol.formats import MAX_DATA, MAX_EXIT, SSE_HEARTBEAT, EventWriter, Exit, Format, Stream
from bfaas.protocol.parser import MAX_COMMENTS, MAX_EVENT, EventReader, OutputLimitError, RawReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_OUTPUT = 1 << 20
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)
# Whole words of the format, so that chance makes sense of them now and then.
FRAGMENTS = [
    b"event: ", b"stdout", b"exit", b"data: ", b"\n", b"\n\n", b"\r", b": ", b'"', b"\\u",
    b'{"code":', b"1", b"}", b"[", b"\xff", b"\0", b'event: stdout\ndata: "x"\n\n',
    b'event: exit\ndata: {"code": 3}\n\n', b"\nexit: 3\n",
]  # fmt: skip
NOISE = st.binary() | st.lists(st.sampled_from(FRAGMENTS)).map(b"".join)


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut into pieces of these sizes, over and over."""
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
    """Read events in pieces: what was passed on, the exit, and what was wrong."""
    reader = EventReader(max_output)
    passed_on = b"".join([reader.feed(piece) for piece in cut(data, sizes)])
    return passed_on, reader.exit, str(reader.error) if reader.error else None


class EventReaderTests(SynchronousTestCase):
    def test_what_is_no_event_is_refused(self) -> None:
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
            passed_on, _, error = read(good + case + good, [len(good + case)])
            self.assertEqual((good, True), (passed_on, error is not None), case[:80])

    def test_comments_are_left_out_wherever_they_are(self) -> None:
        events = (
            SSE_HEARTBEAT + event("stdout", '"x"') + b":\n\n" + event("exit", '{"code": 0}') + SSE_HEARTBEAT
        )
        self.assertEqual((event("stdout", '"x"'), Exit(0), None), read(events, [len(events)]))

    def test_but_not_without_end(self) -> None:
        comments, x = MAX_COMMENTS // len(SSE_HEARTBEAT), event("stdout", '"x"')
        passed_on, _, error = read(SSE_HEARTBEAT * comments + x, [1000])
        self.assertEqual((x, None), (passed_on, error))
        passed_on, _, error = read(x + SSE_HEARTBEAT * comments + x + SSE_HEARTBEAT + x, [1000])
        self.assertEqual((x + x, "too many comments"), (passed_on, error))

    def test_the_space_after_a_colon_may_be_left_out(self) -> None:
        events = b'event:stderr\ndata:"x"\n\nevent:exit\ndata:{"code":1}\n\n'
        self.assertEqual((event("stderr", '"x"'), Exit(1), None), read(events, [len(events)]))

    def test_an_event_without_end_is_refused_before_it_fills_the_memory(self) -> None:
        start = b'event: stdout\ndata: "'
        longest = start + b"x" * (MAX_EVENT - len(start) - 1) + b'"\n\n'
        whole, _, _ = read(longest, [len(longest)])
        self.assertEqual(longest.count(b"x"), whole.count(b"x"))
        for size in (len(longest), len(longest) - 1, 65536, 1000):
            self.assertEqual((whole, None, None), read(longest, [size]))
            passed_on, _, error = read(longest + b'event: stdout\ndata: "x' + longest, [size])
            self.assertEqual((whole, "event too large"), (passed_on, error))
        reader = EventReader(MAX_OUTPUT)
        for _ in range(100):
            reader.feed(start + b"x" * 65536)
        self.assertLessEqual(sum(map(len, [*reader._event, reader._line])), MAX_EVENT)

    def test_events_of_other_workers_are_cut_and_escaped_as_our_own_are(self) -> None:
        # As Go's encoder, Python's with and without ensure_ascii, and careless ones would write them.
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
                    passed_on = reader.feed(event("stderr", data)).decode()
                    self.assertIsNone(reader.error)
                    lines = passed_on.splitlines()
                    self.assertEqual(passed_on.count("\n"), len(lines))
                    self.assertLessEqual(max(len(line.encode()) for line in lines), MAX_DATA + 32)
                    if format_ is Format.NDJSON:
                        read_ = [json.loads(line)["data"] for line in lines]
                    else:
                        read_ = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
                    self.assertEqual(text, "".join(read_))
                    self.assertNotIn("", read_)

    @settings(deadline=None)
    @given(st.binary() | st.text().map(str.encode), st.binary(), SIZES)
    def test_an_honest_run_stays_within_its_limit(self, out: bytes, err: bytes, sizes: list[int]) -> None:
        writer = EventWriter()
        written = b"".join([writer.output(Stream.STDOUT, piece) for piece in cut(out, sizes)])
        written += writer.output(Stream.STDERR, err) + writer.end(Exit(0))
        _, exit_, error = read(written, [len(written)], len(out) + len(err))
        self.assertEqual((Exit(0), None), (exit_, error))

    def test_output_beyond_the_limit_is_refused_at_the_event_that_brings_it(self) -> None:
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
    def test_whatever_comes_is_read_or_refused_however_it_is_cut(self, data: bytes, sizes: list[int]) -> None:
        self.assertEqual(read(data, [len(data) or 1]), read(data, sizes))


class RawReaderTests(SynchronousTestCase):
    def test_only_the_last_line_counts(self) -> None:
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

    def test_output_beyond_the_limit_is_left_out(self) -> None:
        for size in (1, 7, 1000):
            reader = RawReader(10)
            said = b"0123456789" + b"\nexit: 124 timeout\n" + b"x" * 100
            passed_on = b"".join([reader.feed(piece) for piece in cut(said, [size])])
            self.assertTrue(said.startswith(passed_on))
            self.assertTrue(30 <= len(passed_on) <= 10 + 64, len(passed_on))
            self.assertIsInstance(reader.error, OutputLimitError)
