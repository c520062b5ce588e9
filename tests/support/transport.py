"""The server side of an in-memory connection."""

from __future__ import annotations

from typing import Any

from twisted.internet.testing import StringTransport


class ServerTransport(StringTransport):
    """Stores the written data; `ended` is true once the server has closed its side."""

    ended = False

    def unregisterProducer(self) -> None:
        self.producer: Any = None

    def loseWriteConnection(self) -> None:
        self.ended = True

    def loseConnection(self) -> None:
        self.ended = True

    def abortConnection(self) -> None:
        self.ended = True
