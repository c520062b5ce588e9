"""Notification about removals from directories, by inotify(7)."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IReadDescriptor
from zope.interface import implementer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from twisted.python.failure import Failure

# linux/inotify.h: IN_MOVED_FROM, IN_DELETE, IN_MOVE_SELF, IN_ONLYDIR
_EVENTS = 0x40 | 0x200 | 0x800 | 0x01000000


@implementer(IReadDescriptor)
class RemovalWatch:
    """
    Calls `notify` soon after an entry of a watched directory was removed or moved, or the directory moved.

    `notify` has no arguments and has to check what is missing. The kernel drops the watch of a directory
    that is removed itself; Twisted's `INotify` would then stop altogether. Raises `OSError` if the system has
    no inotify, or no instance is left.
    """

    def __init__(self, reactor: Any, notify: Callable[[], object]) -> None:
        if sys.platform != "linux":
            raise OSError("only Linux has inotify")
        self._reactor = reactor
        self._notify = notify
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        reactor.addReader(self)

    def add(self, directory: Path) -> None:
        """Watch a directory. Raises `OSError`."""
        self._checked(self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), _EVENTS))

    def close(self) -> None:
        """Stop watching."""
        self._reactor.removeReader(self)
        os.close(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor that the reactor waits for."""
        return self._descriptor

    def logPrefix(self) -> str:
        """Return a name for the reactor's log."""
        return "removals"

    def doRead(self) -> None:
        """Discard the events and call `notify`."""
        with suppress(BlockingIOError):
            os.read(self._descriptor, 1 << 16)
        self._notify()

    def connectionLost(self, reason: Failure) -> None:  # noqa: ARG002 - signature of IReadDescriptor
        """Close the descriptor when the reactor stops."""
        self.close()

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
