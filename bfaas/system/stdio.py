"""
Standard streams and signals of the `bfaas` command, treated as coreutils treat theirs.

Output is written to descriptors, not through `sys.stdout`: with PYTHONUNBUFFERED that writes short without an
error, and where the descriptor does not block it raises in the middle.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INPUT = 64 * 1024 * 1024
"""Bytes that are read of a script or of its standard input; the default limit of coordinators is 1 MiB."""

_PIECE = 1024 * 1024

_MAX_QUEUED = 1024 * 1024
"""Bytes of output above which the source is paused; it is resumed below half of them."""


class OutputError(Exception):
    """Output cannot be written; the message is the reason. A reader that left is a `BrokenPipeError`."""


class InputError(Exception):
    """Input cannot be read; the message is one line that begins with the input's name."""


def prepare_command() -> None:
    """
    Prepare the process, before anything else is opened.

    Descriptors 0 to 2 are opened on /dev/null where they are closed, so that no socket takes their place;
    Python has set their streams to None. SIGINT ends the process as it does in C, instead of with a
    `KeyboardInterrupt`, but stays ignored if it was ignored at start (`nohup`, a background job).
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_by_signal(number: int) -> NoReturn:
    """
    End the process by a signal's default action, so that a shell which runs it in a loop ends the loop.

    See https://www.cons.org/cracauer/sigint.html. The first process of a PID namespace has no default
    actions: there, `SystemExit` with 128 + `number` is raised.
    """
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


def read_input() -> bytes:
    """Read standard input up to its end. Raises `InputError`."""
    if sys.stdin is None:
        raise InputError("standard input: is closed")
    return _read("standard input", sys.stdin.fileno, close=False)


def read_line() -> bytes:
    """Read a line of standard input: b"" at its end, or if it cannot be read."""
    line = b""
    with suppress(OSError):
        while (
            sys.stdin is not None
            and not line.endswith(b"\n")
            and (byte := _read_piece(sys.stdin.fileno(), 1))
        ):
            line += byte
    return line


def read_file(path: str) -> bytes:
    """Read a file, which may be a FIFO, up to its end. Raises `InputError`."""
    return _read(path, lambda: os.open(path, os.O_RDONLY), close=True)


def _read(name: str, open_: Callable[[], int], *, close: bool) -> bytes:
    pieces: list[bytes] = []
    room = MAX_INPUT
    try:
        fd = open_()
        try:
            while piece := _read_piece(fd):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise InputError(f"{name}: larger than {MAX_INPUT >> 20} MiB")
        finally:
            if close:
                os.close(fd)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    return b"".join(pieces)


def _read_piece(fd: int, size: int = _PIECE) -> bytes:
    """Read what there is, waiting for it also where the descriptor does not block; b"" is the end."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            _wait(fd, select.POLLIN)


def _wait(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


def write_all(fd: int, data: bytes) -> None:
    """
    Write all of it, waiting for room also where the descriptor does not block.

    Raises `BrokenPipeError` if the reader has left, `OutputError` for all else.
    """
    left = memoryview(data)
    try:
        while left:
            try:
                left = left[os.write(fd, left) :]
            except BlockingIOError:
                _wait(fd, select.POLLOUT)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror) from None


def write_output(text: str) -> None:
    """Write to standard output, all of it. Raises `BrokenPipeError` and `OutputError`."""
    if sys.stdout is None:
        raise OutputError(os.strerror(errno.EBADF))
    _write(sys.stdout, text)


def write_error(text: str) -> None:
    """Write to standard error, if that is possible: there is no other place to report that it is not."""
    if sys.stderr is not None:
        with suppress(BrokenPipeError, OutputError):
            _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        fd = stream.fileno()
    except OSError:  # `contextlib.redirect_stdout` and the like: a stream without a descriptor
        stream.write(text)
    else:
        write_all(fd, text.encode(errors="backslashreplace"))


class QueuedWriter:
    """
    Writes to descriptors in the order of the calls, in a thread of its own.

    The reactor's thread must not wait for a reader: it could not take a signal meanwhile. Polling is not
    enough, as a terminal with room for one byte is writable and a write of two blocks. Nor can the descriptor
    be set not to block, as other processes share that setting.

    `pause` and `resume` are called for back-pressure. `on_error` is called once, with `BrokenPipeError` or
    `OutputError`; nothing is written after that.
    """

    def __init__(
        self,
        reactor: Any,
        pause: Callable[[], object],
        resume: Callable[[], object],
        on_error: Callable[[Exception], object],
    ) -> None:
        self._reactor = reactor
        self._pause = pause
        self._resume = resume
        self._on_error = on_error
        self._queue: SimpleQueue[tuple[int, bytes] | Callable[[], object]] = SimpleQueue()
        self._queued = 0
        self._paused = False
        self._failed = False
        # A thread that waits for a reader must not hold up the end of the process.
        Thread(target=self._work, daemon=True).start()

    def write(self, fd: int, data: bytes) -> None:
        """Queue bytes for a descriptor."""
        if self._failed or not data:
            return
        self._queued += len(data)
        self._queue.put((fd, data))
        if self._queued > _MAX_QUEUED and not self._paused:
            self._paused = True
            self._pause()

    def finish(self, on_written: Callable[[], object]) -> None:
        """Have `on_written` called, in the reactor's thread, once all is written; after an error, never."""
        self._queue.put(on_written)

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if not isinstance(item, tuple):
                self._reactor.callFromThread(item)
                return
            fd, data = item
            try:
                write_all(fd, data)
            except (BrokenPipeError, OutputError) as error:
                self._reactor.callFromThread(self._fail, error)
                return
            self._reactor.callFromThread(self._written, len(data))

    def _written(self, size: int) -> None:
        self._queued -= size
        if self._paused and self._queued < _MAX_QUEUED // 2:
            self._paused = False
            self._resume()

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._on_error(error)
