"""
The pipes of a script's process.

They belong to the script's user, so that it can open `/dev/stdout` and the like, as on any host.

Output is read in large pieces. By default, Linux pipes hold 64 KiB and Twisted reads 8 KiB at a time. Each
piece passes through two programs on its way to the client, and on busy processors each handover costs
milliseconds.
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

READ_SIZE = 64 * 1024
"""Largest number of bytes in a piece of output."""

_PIPE_CAPACITY = 1024 * 1024
"""Bytes in a pipe: the most that Linux allows every user for a few pipes (fs.pipe-max-size)."""


class Pipes:
    """
    The pipes of one process, by their descriptor numbers in that process.

    `parent_ends` stay in this process, `child_ends` go to the new one.
    """

    def __init__(self, owner: User | None) -> None:
        self._owner = owner
        self.parent_ends: dict[int, int] = {}
        self.child_ends: dict[int, int] = {}

    def add_input(self, number: int) -> None:
        """Create a pipe that the process reads."""
        self.child_ends[number], self.parent_ends[number] = self._create()

    def add_output(self, number: int) -> None:
        """Create a pipe that the process writes."""
        self.parent_ends[number], self.child_ends[number] = self._create()

    def _create(self) -> tuple[int, int]:
        read_end, write_end = os.pipe()
        if self._owner is not None:
            # Both ends are one inode, whose owner can open it again through /proc.
            os.fchown(read_end, *self._owner)
        return read_end, write_end

    def release_parent_ends(self) -> None:
        """Leave the parent's ends open: their new owner closes them."""
        self.parent_ends = {}

    def close(self) -> None:
        """Close all ends in this process."""
        for end in (*self.child_ends.values(), *self.parent_ends.values()):
            os.close(end)
        self.child_ends = {}
        self.parent_ends = {}


class OutputReader(ProcessReader):
    """Reads a pipe of a process in pieces of up to `READ_SIZE` bytes."""

    def __init__(self, reactor: Any, process: Any, name: int, fileno: int) -> None:
        with suppress(OSError):  # Linux refuses it to a user that already has many pipes
            fcntl.fcntl(fileno, fcntl.F_SETPIPE_SZ, _PIPE_CAPACITY)
        super().__init__(reactor, process, name, fileno)

    def doRead(self) -> BaseException | None:
        """Read one piece. Return the reason for a disconnection, or None, as reactors expect."""
        try:
            piece = os.read(self.fileno(), READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not piece:
            return CONNECTION_DONE
        self.dataReceived(piece)
        return None
