"""The events of a run, and its result."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bfaas.client.errors import ResponseLostError, ScriptFailedError
from bfaas.protocol.formats import Exit, Format, Stream
from bfaas.protocol.parser import EventReader

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_LIMIT = 1 << 62  # the coordinator has one


@dataclass(frozen=True)
class Output:
    """A piece of output. Bytes that are not UTF-8 are U+FFFD in it; a character is never split."""

    stream: Stream
    text: str


@dataclass(frozen=True)
class OutputFile:
    """A file that a run returns: its path in the script's working directory, content and permission bits."""

    name: str
    data: bytes = field(repr=False)
    mode: int

    def save(self, directory: str | os.PathLike[str] = ".") -> Path:
        """
        Write the file below a directory, replace one that is there, and return its path.

        The name is relative and has no `..`. Raises `OSError`.
        """
        path = Path(directory, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self.mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.data)
        return path


Event = Output | OutputFile | Exit
"""What a run yields: output, then files, then its exit. The exit ends every complete run."""


@dataclass(frozen=True)
class Result:
    """
    A run that has ended.

    `files` are by name; `exit.output_errors` lists those that could not be returned. `run_id` names the run
    in the logs of coordinator and worker, `machine` the machine that ran it.
    """

    run_id: str
    machine: str
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)
    exit: Exit
    files: dict[str, OutputFile] = field(repr=False)

    def check(self) -> Result:
        """Return this result. Raises `ScriptFailedError` if the exit code is not 0."""
        if self.exit.code != 0:
            raise ScriptFailedError(self)
        return self


class EventDecoder:
    """Decodes the bytes of a response into events; `outputs` are the patterns of the request."""

    def __init__(self, outputs: Sequence[str]) -> None:
        self._reader = EventReader(_NO_LIMIT, Format.NDJSON, outputs)
        self._pieces: list[bytes] = []  # of the current file,
        self._received = 0  # and their size
        self.exit: Exit | None = None

    def feed(self, data: bytes) -> list[Event]:
        """Decode a piece of the response. Raises `ResponseLostError` if it is invalid."""
        if self.exit is not None:
            return []
        decoded = map(self._decode, map(json.loads, self._reader.feed(data).splitlines()))
        events: list[Event] = [event for event in decoded if event is not None]
        if self._reader.error is not None:
            raise ResponseLostError(f"invalid response: {self._reader.error}") from self._reader.error
        self.exit = self._reader.exit
        return events if self.exit is None else [*events, self.exit]

    def end(self) -> None:
        """Raise `ResponseLostError` unless the response was complete."""
        if self.exit is None:
            raise ResponseLostError("the response ended before the exit of the run")

    def _decode(self, event: dict[str, Any]) -> Output | OutputFile | None:
        """Return an event, or None for a piece of a file that is not its last one."""
        if event["event"] != "file":
            return Output(Stream(event["event"]), event["data"])
        piece = base64.b64decode(event["base64"])
        self._pieces.append(piece)
        self._received += len(piece)
        if self._received < event["size"]:
            return None
        file = OutputFile(event["name"], b"".join(self._pieces), int(event["mode"], 8))
        self._pieces, self._received = [], 0
        return file


class ResultBuilder:
    """Collects the events of a complete run."""

    def __init__(self, run_id: str, machine: str) -> None:
        self._run_id = run_id
        self._machine = machine
        self._output: dict[Stream, list[str]] = {stream: [] for stream in Stream}
        self._files: dict[str, OutputFile] = {}
        self._exit: Exit | None = None

    def add(self, event: Event) -> None:
        """Add an event in the order of arrival."""
        match event:
            case Output(stream, text):
                self._output[stream].append(text)
            case OutputFile(name):
                self._files[name] = event
            case Exit():
                self._exit = event

    def build(self) -> Result:
        """Return the result of the run."""
        if self._exit is None:
            raise ResponseLostError("the response ended before the exit of the run")
        stdout, stderr = ("".join(self._output[stream]) for stream in (Stream.STDOUT, Stream.STDERR))
        return Result(self._run_id, self._machine, stdout, stderr, self._exit, self._files)
