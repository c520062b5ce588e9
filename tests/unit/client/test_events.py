"""Events of a response, and the result of a run, wherever the response is split."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from bfaas.client.errors import ResponseLostError, ScriptFailedError
from bfaas.client.events import Event, EventDecoder, Output, OutputFile, Result, ResultBuilder
from bfaas.protocol.formats import (
    EventWriter,
    Exit,
    FilePiece,
    Format,
    Stream,
    write_exit,
    write_file,
)

PIECES = [
    FilePiece("a/b", 5, 0o600, b"abc"),
    FilePiece("a/b", 5, 0o600, b"de"),
    FilePiece("empty", 0, 0o644, b""),
]


def response() -> bytes:
    writer = EventWriter()
    output = writer.output(Stream.STDOUT, "größe\n".encode()) + writer.output(Stream.STDERR, b"err")
    files = b"".join(write_file(Format.EVENTS, piece) for piece in PIECES)
    return output + b": \n\n" + files + write_exit(Format.EVENTS, Exit(3, wall_ms=7))


class EventDecoderTests(SynchronousTestCase):
    def decode(self, *pieces: bytes) -> list[Event]:
        decoder = EventDecoder(["**"])
        events = [event for piece in pieces for event in decoder.feed(piece)]
        decoder.end()
        self.assertEqual(decoder.exit, events[-1])
        return events

    def test_events_are_the_same_however_the_response_is_split(self) -> None:
        expected = [
            Output(Stream.STDOUT, "größe\n"),
            Output(Stream.STDERR, "err"),
            OutputFile("a/b", b"abcde", 0o600),
            OutputFile("empty", b"", 0o644),
            Exit(3, wall_ms=7),
        ]
        data = response()
        for size in (1, 2, 7, len(data)):
            pieces = [data[start : start + size] for start in range(0, len(data), size)]
            self.assertEqual(expected, self.decode(*pieces))

    def test_incomplete_and_invalid_responses_are_errors(self) -> None:
        data = response()
        for broken in (b"", data[:-1], data[:20], data.replace(b"event: exit", b"event: exits")):
            self.assertRaises(ResponseLostError, self.decode, broken)
        self.assertRaises(ResponseLostError, self.decode, data.replace(b'"a/b"', b'"../b"'))

    def test_output_before_an_error_is_not_lost(self) -> None:
        decoder = EventDecoder([])
        self.assertEqual([Output(Stream.STDOUT, "a")], decoder.feed(b'event: stdout\ndata: "a"\n\n'))
        self.assertRaises(ResponseLostError, decoder.feed, b"garbage\n\n")
        self.assertRaises(ResponseLostError, decoder.end)


class ResultTests(SynchronousTestCase):
    def test_a_result_has_everything(self) -> None:
        builder = ResultBuilder("r1", "m1")
        for event in EventDecoder(["**"]).feed(response()):
            builder.add(event)
        result = builder.build()
        self.assertEqual(("r1", "m1"), (result.run_id, result.machine))
        self.assertEqual(("größe\n", "err"), (result.stdout, result.stderr))
        contents = {name: file.data for name, file in result.files.items()}
        self.assertEqual({"a/b": b"abcde", "empty": b""}, contents)
        error = self.assertRaises(ScriptFailedError, result.check)
        self.assertIs(result, error.result)
        self.assertRaises(ResponseLostError, ResultBuilder("r1", "m1").build)

    def test_a_successful_result_is_returned(self) -> None:
        result = Result("r1", "m1", "", "", Exit(0), {})
        self.assertIs(result, result.check())


class OutputFileTests(SynchronousTestCase):
    def test_a_saved_file_replaces_a_link_and_not_its_target(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            other = directory / "other"
            other.write_text("kept")
            (directory / "a").mkdir()
            (directory / "a" / "b").symlink_to(other)
            previous = os.umask(0o022)
            try:
                path = OutputFile("a/b", b"new", 0o777).save(directory)
            finally:
                os.umask(previous)
            self.assertEqual(directory / "a" / "b", path)
            self.assertEqual((b"new", 0o755), (path.read_bytes(), path.lstat().st_mode & 0o777))
            self.assertEqual("kept", other.read_text())
