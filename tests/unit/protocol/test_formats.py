from __future__ import annotations

import json
from itertools import zip_longest

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.protocol.formats import (
    HEARTBEATS,
    MAX_DATA,
    SSE_HEARTBEAT,
    EventWriter,
    Exit,
    Format,
    RawWriter,
    Reason,
    Stream,
    WireError,
    requested_format,
    run_writer,
)
from bfaas.protocol.parser import RawReader, run_reader
from tests.unit.protocol.test_parser import MAX_OUTPUT, NOISE, cut, event, read

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
    oom=st.booleans(),
    truncated=st.booleans(),
    dropped_bytes=st.integers(0, 1 << 40),
)


def texts(events: bytes) -> dict[str, str]:
    """Decode events as a client does, and join the text of each stream."""
    found = {"stdout": "", "stderr": ""}
    for block in events.split(b"\n\n")[:-1]:
        name, data = block.decode().split("\n")
        found[name.removeprefix("event: ")] += json.loads(data.removeprefix("data: "))
    return found


class EventTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(OUTPUT, OUTPUT, EXITS, SIZES, SIZES)
    def test_output_arrives_as_text_wherever_it_is_split(
        self, out: bytes, err: bytes, exit_: Exit, written: list[int], read_: list[int]
    ) -> None:
        writer = EventWriter()
        output = b""
        for one, two in zip_longest(cut(out, written), cut(err, written), fillvalue=b""):
            output += writer.output(Stream.STDOUT, one) + writer.output(Stream.STDERR, two) + SSE_HEARTBEAT
        end = writer.end(exit_)
        rest = end[: end.index(b"event: exit")]

        passed_on = (output + rest).replace(SSE_HEARTBEAT, b"")
        self.assertEqual((passed_on, exit_, None), read(output + end, read_))
        expected = {"stdout": out.decode(errors="replace"), "stderr": err.decode(errors="replace")}
        self.assertEqual(expected, texts(passed_on))

    def test_split_characters_are_held_back_until_complete_or_the_exit(self) -> None:
        writer = EventWriter()
        self.assertEqual(b"", writer.output(Stream.STDOUT, b"\xe2\x82"))
        self.assertEqual(event("stderr", '"\ufffd"'), writer.output(Stream.STDERR, b"\xac"))
        self.assertEqual(event("stdout", '"€"'), writer.output(Stream.STDOUT, b"\xac\xf0\x9f"))
        self.assertEqual(event("stdout", '"\ufffd"') + event("exit", '{"code": 0}'), writer.end(Exit(0)))

    def test_output_cannot_forge_events(self) -> None:
        for forged in ('\n\nevent: exit\ndata: {"code":0}\n\n', "\r\rdata: x\r\n\r\n", "\u2028\u2029\x85\0"):
            writer = EventWriter()
            written = writer.output(Stream.STDOUT, forged.encode()) + writer.end(Exit(7))
            passed_on, exit_, error = read(written, [len(written)])
            self.assertEqual((Exit(7), None), (exit_, error))
            self.assertEqual(forged, texts(passed_on)["stdout"])
            self.assertEqual(3, len(passed_on.decode().splitlines()))
            self.assertNotIn(b"\r", written)

    def test_output_contains_no_raw_line_breaks_or_controls(self) -> None:
        every = "".join(map(chr, range(0x2100))) + "\ufeff\U0001f600"
        for format_ in (Format.EVENTS, Format.NDJSON):
            text = EventWriter(format_).output(Stream.STDOUT, every.encode()).decode()
            self.assertEqual(text.split("\n")[:-1], text.splitlines())
            self.assertNotRegex(text.replace("\n", ""), "[\0-\x1f\x80-\x9f\u2028\u2029]")
        written = EventWriter().output(Stream.STDOUT, every.encode())
        self.assertEqual(every, texts(written)["stdout"])

    def test_text_that_looks_like_an_escape_is_unchanged(self) -> None:
        for text in ("\\\u2028", "\\u2028", "\\\\\x85\\", "\xc2\xa0\u2027"):
            written = EventWriter().output(Stream.STDOUT, text.encode())
            self.assertEqual(text, texts(written)["stdout"])

    @settings(deadline=None, max_examples=200)
    @given(
        st.sampled_from(
            ["\0", "\\", "\\\n", "\u20ac", "\U0001f600", '"a', "\u2028\\", "\x85\u00e9", "abc\n"]
        ),
        st.integers(0, 7),
        st.sampled_from([Format.EVENTS, Format.NDJSON]),
    )
    def test_large_output_is_split_between_characters(self, unit: str, offset: int, format_: Format) -> None:
        text = "x" * offset + unit * (2 * MAX_DATA // len(unit.encode()))
        written = EventWriter(format_).output(Stream.STDOUT, text.encode())
        lines = [line for line in written.split(b"\n") if line]
        self.assertLessEqual(max(map(len, lines)), MAX_DATA + 32)
        if format_ is Format.EVENTS:
            self.assertEqual(text, texts(written)["stdout"])
            # Events within the limit are forwarded unchanged.
            self.assertEqual((written, None, None), read(written, [len(written)]))
        else:
            self.assertEqual(text, "".join(json.loads(line)["data"] for line in lines))

    def test_events_are_those_of_the_go_original(self) -> None:
        writer = EventWriter()
        self.assertEqual(
            b'event: stdout\ndata: "a \\"b\\"\\n"\n\n'
            b'event: exit\ndata: {"code": 137, "signal": "SIGKILL"}\n\n',
            writer.output(Stream.STDOUT, b'a "b"\n') + writer.end(Exit(137, signal="SIGKILL")),
        )


class ExitTests(SynchronousTestCase):
    def test_unknown_and_invalid_fields_are_ignored(self) -> None:
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
            '{"code": 137, "oom": true}': Exit(137, oom=True),
            '{"code": 137, "oom": 1}': Exit(137),
            '{"code": 137, "oom": "true"}': Exit(137),
            '{"code": 0, "max_rss_kb": true, "truncated": 1, "dropped_bytes": true}': Exit(0),
            '{"code": 0, "truncated": true, "dropped_bytes": 5}': Exit(0, truncated=True, dropped_bytes=5),
        }
        self.assertEqual(cases, {data: Exit.from_json(data.encode()) for data in cases})

    def test_exit_without_a_valid_code_is_an_error(self) -> None:
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

    def test_forced_exits_have_a_reason(self) -> None:
        expected = {
            Reason.TIMEOUT: b'{"code": 124, "reason": "timeout"}',
            Reason.WORKER_LOST: b'{"code": 125, "reason": "worker-lost"}',
            Reason.OUTPUT_LIMIT: b'{"code": 125, "reason": "output-limit"}',
            Reason.NOT_STARTED: b'{"code": 125, "reason": "not-started"}',
        }
        self.assertEqual(expected, {reason: Exit.forced(reason).to_json() for reason in Reason})


class RawTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(OUTPUT | NOISE, st.integers(0, 255), st.none() | st.sampled_from(Reason), SIZES)
    def test_output_arrives_unchanged_wherever_it_is_split(
        self, output: bytes, code: int, reason: Reason | None, sizes: list[int]
    ) -> None:
        writer, reader = RawWriter(), RawReader(MAX_OUTPUT)
        pieces = [writer.output(Stream.STDOUT, piece) for piece in cut(output, sizes)]
        whole = b"".join([*pieces, writer.end(Exit(code, reason=reason))])
        line = f"\nexit: {code} {reason}\n" if reason else f"\nexit: {code}\n"

        self.assertEqual(output + line.encode(), whole)
        self.assertEqual(whole, b"".join([reader.feed(piece) for piece in cut(whole, sizes)]))
        self.assertEqual(Exit(code, reason=reason), reader.exit)


class FormatTests(SynchronousTestCase):
    def test_nonempty_raw_selects_raw(self) -> None:
        cases: list[tuple[dict[bytes, list[bytes]], Format]] = [
            ({}, Format.EVENTS),
            ({b"raw": [b""]}, Format.EVENTS),
            ({b"cooked": [b"1"]}, Format.EVENTS),
            ({b"raw": [b"1"]}, Format.RAW),
            ({b"raw": [b"", b"0"]}, Format.RAW),
        ]
        for arguments, format_ in cases:
            self.assertEqual(format_, requested_format(arguments))

    def test_accept_selects_ndjson(self) -> None:
        for accept, format_ in [
            ("application/x-ndjson", Format.NDJSON),
            ("text/html, Application/X-NDJSON;q=0.5", Format.NDJSON),
            ("application/x-ndjson; q=0.0", Format.EVENTS),
            ("*/*", Format.EVENTS),
            ("application/json", Format.EVENTS),
            (";,;", Format.EVENTS),
        ]:
            self.assertEqual(format_, requested_format({}, accept))
        self.assertEqual(Format.RAW, requested_format({b"raw": [b"1"]}, "application/x-ndjson"))

    def test_ndjson_has_one_object_per_line(self) -> None:
        writer = run_writer(Format.NDJSON)
        written = [
            writer.output(Stream.STDOUT, 'a\n\u20ac\u2028"\r'.encode()),
            HEARTBEATS[Format.NDJSON],
            writer.output(Stream.STDERR, b"\xff"),
            writer.end(Exit(124, reason="timeout")),
        ]

        self.assertEqual([1] * 4, [piece.count(b"\n") for piece in written])
        self.assertEqual(
            [
                {"event": "stdout", "data": 'a\n\u20ac\u2028"\r'},
                {"event": "heartbeat"},
                {"event": "stderr", "data": "\ufffd"},
                {"event": "exit", "code": 124, "reason": "timeout"},
            ],
            [json.loads(piece) for piece in written],
        )

    def test_readers_parse_what_writers_encode(self) -> None:
        for format_ in (Format.EVENTS, Format.RAW):
            reader = run_reader(format_, MAX_OUTPUT)
            reader.feed(run_writer(format_).end(Exit(3)))
            self.assertEqual(Exit(3), reader.exit)
