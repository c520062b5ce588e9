"""Complete responses to runs, and their events."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping
    from socket import socket


@dataclass(frozen=True)
class Response:
    """A complete response. The names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def events(self) -> list[tuple[str, Any]]:
        return parse_events(self.body)

    def output(self, stream: str) -> str:
        """Return all output on "stdout" or "stderr"."""
        return "".join(data for name, data in self.events if name == stream)

    @property
    def exit(self) -> dict[str, Any]:
        """Return the data of the exit event, which must be the last event, and the only one of its kind."""
        events = self.events
        assert [name for name, _ in events].count("exit") == 1, self.body[-200:]
        name, data = events[-1]
        assert name == "exit", self.body[-200:]
        assert isinstance(data, dict), self.body[-200:]
        return data


def parse_events(body: bytes) -> list[tuple[str, Any]]:
    """
    Parse an event stream: the name of each event, and its decoded data. Heartbeats (comments) are left out.

    Raises an error unless the stream is well-formed, and complete.
    """
    *blocks, rest = body.decode().split("\n\n")
    assert rest == "", f"incomplete event: {rest!r}"
    events = []
    for block in blocks:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        assert name.startswith("event: "), block
        assert data.startswith("data: "), block
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def parse_response(data: bytes, method: str = "POST") -> tuple[HTTPResponse, bytes]:
    """
    Parse the response to a request of this method: its head, and its body.

    Raises `http.client.HTTPException` unless it is complete.
    """

    class Received:
        def makefile(self, _: str) -> io.BytesIO:
            return io.BytesIO(data)

    response = HTTPResponse(cast("socket", Received()), method=method)
    response.begin()
    return response, response.read()
