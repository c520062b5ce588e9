"""
A program's output in large pieces.

Linux makes pipes of 64 KiB, and Twisted reads 8 KiB of one at a time: each piece goes through two programs on
its way to a client, and where the processors are busy, each time one waits for the other costs milliseconds.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST

if TYPE_CHECKING:
    from twisted.internet.process import ProcessReader

PIECE = 64 * 1024
"""Bytes of a piece at the most."""

_CAPACITY = 1024 * 1024
"""Bytes that a pipe holds: what Linux lets everybody have (fs.pipe-max-size), as long as few do."""


def widen(reader: ProcessReader) -> None:
    """Have the end of a pipe that we read hold more, and read it in larger pieces."""
    with suppress(OSError):  # whoever has many already gets no more
        fcntl.fcntl(reader.fileno(), fcntl.F_SETPIPE_SZ, _CAPACITY)
    reader.doRead = partial(_read, reader)  # type: ignore[method-assign]  # Twisted's own reads 8 KiB


def _read(reader: ProcessReader) -> BaseException | None:
    """Read a piece; what comes back is what a reactor expects of `doRead`."""
    try:
        piece = os.read(reader.fileno(), PIECE)
    except BlockingIOError:
        return None
    except OSError:
        return CONNECTION_LOST
    if not piece:
        return CONNECTION_DONE
    reader.dataReceived(piece)
    return None
