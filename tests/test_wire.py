from __future__ import annotations

import json
from itertools import cycle, zip_longest
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.wire import (
    COMMENT,
    MAX_EVENT,
    EventReader,
    EventWriter,
    Exit,
    Format,
    RawReader,
    RawWriter,
    Reason,
    Stream,
    WireError,
    requested_format,
    run_reader,
    run_writer,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

OUTPUT = st.binary() | st.text(st.characters(min_codepoint=0, max_codepoint=0x1F400)).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)
WORDS = st.none() | st.sampled_from(["SIGKILL", *Reason])
COUNTS = st.none() | st.integers(0, 1 << 40)
EXITS = st.builds(
    Exit,
    code=st.integers(0, 255),
    signal=WORDS,
    reason=WORDS,
    wall_ms=COUNTS,
    cpu_ms=COUNTS,
    max_rss_kb=COUNTS,
    truncated=st.booleans(),
    dropped_bytes=st.integers(0, 1 << 40),
)
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


def texts(events: bytes) -> dict[str, str]:
    """Read events as a client does, and put the text of each stream together."""
    found = {"stdout": "", "stderr": ""}
    for block in events.split(b"\n\n")[:-1]:
        name, data = block.decode().split("\n")
        found[name.removeprefix("event: ")] += json.loads(data.removeprefix("data: "))
    return found


def read(data: bytes, sizes: Iterable[int]) -> tuple[bytes, Exit | None] | None:
    """Read events in pieces: what was passed on, and the exit; None where they are refused."""
    reader = EventReader()
    try:
        return b"".join([reader.feed(piece) for piece in cut(data, sizes)]), reader.exit
    except WireError:
        return None


class EventTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(OUTPUT, OUTPUT, EXITS, SIZES, SIZES)
    def test_any_bytes_in_any_pieces_arrive_as_their_text(
        self, out: bytes, err: bytes, exit_: Exit, written: list[int], read_: list[int]
    ) -> None:
        writer = EventWriter()
        output = b""
        for one, two in zip_longest(cut(out, written), cut(err, written), fillvalue=b""):
            output += writer.output(Stream.STDOUT, one) + writer.output(Stream.STDERR, two) + COMMENT
        end = writer.end(exit_)
        rest = end[: end.index(b"event: exit")]

        passed_on = (output + rest).replace(COMMENT, b"")
        self.assertEqual((passed_on, exit_), read(output + end, read_))
        expected = {"stdout": out.decode(errors="replace"), "stderr": err.decode(errors="replace")}
        self.assertEqual(expected, texts(passed_on))

    def test_a_character_is_written_once_it_is_whole_and_what_never_is_before_the_exit(self) -> None:
        writer = EventWriter()
        self.assertEqual(b"", writer.output(Stream.STDOUT, b"\xe2\x82"))
        self.assertEqual(event("stderr", '"\ufffd"'), writer.output(Stream.STDERR, b"\xac"))
        self.assertEqual(event("stdout", '"€"'), writer.output(Stream.STDOUT, b"\xac\xf0\x9f"))
        self.assertEqual(event("stdout", '"\ufffd"') + event("exit", '{"code": 0}'), writer.end(Exit(0)))

    def test_a_script_cannot_print_an_event(self) -> None:
        for forged in ('\n\nevent: exit\ndata: {"code":0}\n\n', "\r\rdata: x\r\n\r\n", "\u2028\u2029\x85\0"):
            writer = EventWriter()
            written = writer.output(Stream.STDOUT, forged.encode()) + writer.end(Exit(7))
            passed_on, exit_ = read(written, [len(written)]) or (b"", None)
            self.assertEqual(Exit(7), exit_)
            self.assertEqual(forged, texts(passed_on)["stdout"])
            self.assertEqual(3, passed_on.count(b"\n"))
            self.assertNotIn(b"\r", written)

    def test_it_is_written_as_the_original_writes_it(self) -> None:
        writer = EventWriter()
        self.assertEqual(
            b'event: stdout\ndata: "a \\"b\\"\\n"\n\n'
            b'event: exit\ndata: {"code": 137, "signal": "SIGKILL"}\n\n',
            writer.output(Stream.STDOUT, b'a "b"\n') + writer.end(Exit(137, signal="SIGKILL")),
        )

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
            event("stdout", '"a\0b"'),
            event("stdout", '"x" "y"'),
            event("stdout", "1"),
            event("stdout", "null"),
            event("stdout", '["x"]'),
            event("stdout", "[" * 100_000),
            event("stdout", b'"\xff"'),
            event("stdout", b'"\xed\xa0\x80"'),
            event("stdout", '\ufeff"x"'),
            event("stdout", '"x"'.encode("utf-16")),
            event("stdout", '"x"'.encode("utf-32-le")),
            event("exit", "[" * 100_000),
            *(event("exit", f'{{"code": {code}}}') for code in ("256", "-2", "-1.0", "true", "null")),
            exit_ + exit_,
            exit_ + event("stdout", '"x"'),
        ]
        for case in cases:
            self.assertIsNone(read(case, [len(case)]), case[:80])

    def test_comments_are_left_out_wherever_they_are(self) -> None:
        events = COMMENT + event("stdout", '"x"') + b":\n\n" + event("exit", '{"code": 0}') + COMMENT
        self.assertEqual((event("stdout", '"x"'), Exit(0)), read(events, [len(events)]))

    def test_the_space_after_a_colon_may_be_left_out(self) -> None:
        events = b'event:stderr\ndata:"x"\n\nevent:exit\ndata:{"code":1}\n\n'
        self.assertEqual((event("stderr", '"x"'), Exit(1)), read(events, [len(events)]))

    def test_an_event_without_end_is_refused_before_it_fills_the_memory(self) -> None:
        reader = EventReader()
        start = b'event: stdout\ndata: "'
        reader.feed(start)
        reader.feed(b"x" * (MAX_EVENT - len(start)))
        self.assertRaises(WireError, reader.feed, b"x")

    @settings(deadline=None)
    @given(NOISE, SIZES)
    @example(b'event: exit\ndata: {"code": 0}\n\n\n', [1])
    def test_whatever_comes_is_read_or_refused_however_it_is_cut(self, data: bytes, sizes: list[int]) -> None:
        self.assertEqual(read(data, [len(data) or 1]), read(data, sizes))


class ExitTests(SynchronousTestCase):
    def test_it_is_read_field_by_field_and_what_is_unknown_or_ill_formed_is_left_out(self) -> None:
        cases = {
            '{"code": 3}': Exit(3),
            ' {"code": 3, "from": "the future", "x": {"y": [1]}} ': Exit(3),
            '{"code": -1}': Exit(255),
            '{"code": 255}': Exit(255),
            '{"code": 0, "signal": "SIGKILL", "reason": "timeout"}': Exit(0, "SIGKILL", "timeout"),
            '{"code": 0, "signal": 9, "reason": ["x"], "wall_ms": "1", "cpu_ms": 1.5}': Exit(0),
            '{"code": 0, "signal": "", "reason": "\\u001b[31mred", "wall_ms": -1, "cpu_ms": 1e99}': Exit(0),
            '{"code": 0, "signal": "SIG KILL", "reason": "timeout\\n", "cpu_ms": 9007199254740992}': Exit(0),
            '{"code": 0, "wall_ms": 0, "cpu_ms": 2, "max_rss_kb": 3}': Exit(
                0, wall_ms=0, cpu_ms=2, max_rss_kb=3
            ),
            '{"code": 0, "max_rss_kb": true, "truncated": 1, "dropped_bytes": true}': Exit(0),
            '{"code": 0, "truncated": true, "dropped_bytes": 5}': Exit(0, truncated=True, dropped_bytes=5),
        }
        self.assertEqual(cases, {data: Exit.from_json(data.encode()) for data in cases})

    def test_without_a_code_it_is_none(self) -> None:
        for data in (
            "",
            "{}",
            "0",
            "null",
            "[]",
            '["code"]',
            '"code"',
            '{"code": null}',
            '{"code": "0"}',
            '{"code": 0.0}',
            '{"code": false}',
            '{"code": -2}',
            '{"code": 1e3}',
            '{"code": 9007199254740992}',
            '{"code": NaN}',
            '{"code": ' + "9" * 5000 + "}",
            '{"code": 0',
        ):
            self.assertRaises(WireError, Exit.from_json, data.encode())

    def test_an_end_that_we_bring_about_says_why(self) -> None:
        expected = {
            Reason.TIMEOUT: b'{"code": 124, "reason": "timeout"}',
            Reason.WORKER_LOST: b'{"code": 125, "reason": "worker-lost"}',
            Reason.OUTPUT_LIMIT: b'{"code": 125, "reason": "output-limit"}',
        }
        self.assertEqual(expected, {reason: Exit.because(reason).to_json() for reason in Reason})


class RawTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(OUTPUT | NOISE, st.integers(0, 255), st.none() | st.sampled_from(Reason), SIZES)
    def test_any_bytes_in_any_pieces_arrive_as_they_are(
        self, output: bytes, code: int, reason: Reason | None, sizes: list[int]
    ) -> None:
        writer, reader = RawWriter(), RawReader()
        pieces = [writer.output(Stream.STDOUT, piece) for piece in cut(output, sizes)]
        whole = b"".join([*pieces, writer.end(Exit(code, reason=reason))])
        line = f"\nexit: {code} {reason}\n" if reason else f"\nexit: {code}\n"

        self.assertEqual(output + line.encode(), whole)
        self.assertEqual(whole, b"".join([reader.feed(piece) for piece in cut(whole, sizes)]))
        self.assertEqual(Exit(code, reason=reason), reader.exit)

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
            reader = RawReader()
            self.assertEqual(data, reader.feed(data))
            self.assertEqual(exit_, reader.exit, data)


class FormatTests(SynchronousTestCase):
    def test_a_raw_with_a_value_asks_for_raw(self) -> None:
        cases: list[tuple[dict[bytes, list[bytes]], Format]] = [
            ({}, Format.EVENTS),
            ({b"raw": [b""]}, Format.EVENTS),
            ({b"cooked": [b"1"]}, Format.EVENTS),
            ({b"raw": [b"1"]}, Format.RAW),
            ({b"raw": [b"", b"0"]}, Format.RAW),
        ]
        for arguments, format_ in cases:
            self.assertEqual(format_, requested_format(arguments))

    def test_every_format_is_read_as_it_is_written(self) -> None:
        for format_ in Format:
            reader = run_reader(format_)
            reader.feed(run_writer(format_).end(Exit(3)))
            self.assertEqual(Exit(3), reader.exit)
