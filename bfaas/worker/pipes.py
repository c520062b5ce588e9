"""
The pipes of a script, which belong to its user: so it can open `/dev/stdout` and its like, as on any host.

Output comes in large pieces: Linux makes pipes of 64 KiB, and Twisted reads 8 KiB of one at a time. Each
piece goes through two programs on its way to a client, and where the processors are busy, each time one
waits for the other costs milliseconds.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.process import ProcessReader

if TYPE_CHECKING:
    from bfaas.system.confinement import User

PIECE = 64 * 1024
"""Bytes of a piece at the most."""

_CAPACITY = 1024 * 1024
"""Bytes that a pipe holds: what Linux lets everybody have (fs.pipe-max-size), as long as few do."""


class Pipes:
    """
    The pipes of one process by the numbers that they have there: `ours` and `theirs` are the two ends.

    `close_theirs` once the process has them; `close` where it could not be started.
    """

    def __init__(self, owner: User | None) -> None:
        self._owner = owner
        self.ours: dict[int, int] = {}
        self.theirs: dict[int, int] = {}

    def make(self, number: int, *, writable: bool = True) -> None:
        """Make a pipe that the process writes, or else reads; its owner can open it again, through /proc."""
        read, write = os.pipe()
        self.ours[number], self.theirs[number] = (read, write) if writable else (write, read)
        if self._owner is not None:
            os.fchown(read, *self._owner)

    def close_theirs(self) -> None:
        """Close the ends of the process, in this process."""
        for end in self.theirs.values():
            os.close(end)
        self.theirs = {}

    def close(self) -> None:
        """Close everything."""
        self.close_theirs()
        for end in self.ours.values():
            os.close(end)
        self.ours = {}


class OutputReader(ProcessReader):
    """Reads a pipe of a process, in large pieces."""

    def __init__(self, reactor: Any, process: Any, name: int, fileno: int) -> None:
        with suppress(OSError):  # a user that has many already gets no more
            fcntl.fcntl(fileno, fcntl.F_SETPIPE_SZ, _CAPACITY)
        super().__init__(reactor, process, name, fileno)

    def doRead(self) -> BaseException | None:
        """Read a piece; what comes back is what a reactor expects of `doRead`."""
        try:
            piece = os.read(self.fileno(), PIECE)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not piece:
            return CONNECTION_DONE
        self.dataReceived(piece)
        return None
