"""A server's end of a connection in memory, which closes as TCP does."""

from __future__ import annotations

from typing import Any

from twisted.internet.testing import StringTransport


class ServerTransport(StringTransport):
    """Keeps what is written; `ended` once the server's side has."""

    ended = False

    def unregisterProducer(self) -> None:
        self.producer: Any = None

    def loseWriteConnection(self) -> None:
        self.ended = True

    def loseConnection(self) -> None:
        self.ended = True

    def abortConnection(self) -> None:
        self.ended = True
