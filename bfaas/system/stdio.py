"""
Standard streams and signals of the `bfaas` command, which behaves like coreutils.

Output is written to descriptors instead of `sys.stdout`, which loses data: with PYTHONUNBUFFERED it ignores
short writes, and with a non-blocking descriptor it raises an error in the middle of the data.
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

from bfaas.system.startup import open_standard_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INPUT = 64 * 1024 * 1024
"""Largest script or standard input in bytes. The default limit of coordinators is 1 MiB."""

_READ_SIZE = 1024 * 1024

_MAX_QUEUED = 1024 * 1024
"""Bytes of queued output above which the source is paused. It is resumed below half of this."""


class OutputError(Exception):
    """Output cannot be written; the message is the reason. A closed pipe is a `BrokenPipeError` instead."""


class InputError(Exception):
    """Input cannot be read; the message is one line that starts with the input's name."""


def prepare_command() -> None:
    """
    Prepare the process of a command. Call this before any file is opened.

    Streams of closed descriptors stay None, so that their use is an error. SIGINT ends the process as in C,
    without a `KeyboardInterrupt`, unless it is ignored at the start (`nohup`, a background job).
    """
    open_standard_descriptors()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_by_signal(number: int) -> NoReturn:
    """
    End the process by a signal's default action, so that a shell also ends a loop around it.

    See https://www.cons.org/cracauer/sigint.html. The first process of a PID namespace has no default
    actions; there, this raises `SystemExit` with 128 + `number`.
    """
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


def read_input() -> bytes:
    """Read standard input to its end. Raises `InputError`."""
    if sys.stdin is None:
        raise InputError("standard input: is closed")
    return _read("standard input", sys.stdin.fileno, close=False)


def read_line() -> bytes:
    """Read a line of standard input. Return b"" at its end, or if it cannot be read."""
    line = b""
    with suppress(OSError):
        while (
            sys.stdin is not None and not line.endswith(b"\n") and (byte := _read_some(sys.stdin.fileno(), 1))
        ):
            line += byte
    return line


def read_file(path: str) -> bytes:
    """Read a file, which may be a FIFO, to its end. Raises `InputError`."""
    return _read(path, lambda: os.open(path, os.O_RDONLY), close=True)


def _read(name: str, open_: Callable[[], int], *, close: bool) -> bytes:
    pieces: list[bytes] = []
    remaining = MAX_INPUT
    try:
        fd = open_()
        try:
            while piece := _read_some(fd):
                pieces.append(piece)
                remaining -= len(piece)
                if remaining < 0:
                    raise InputError(f"{name}: larger than {MAX_INPUT >> 20} MiB")
        finally:
            if close:
                os.close(fd)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    return b"".join(pieces)


def _read_some(fd: int, size: int = _READ_SIZE) -> bytes:
    """Read what is available, and wait for it even if the descriptor is non-blocking. b"" is the end."""
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
    Write all data, and wait even if the descriptor is non-blocking.

    Raises `BrokenPipeError` if the reader has closed the pipe, and `OutputError` for all other errors.
    """
    remaining = memoryview(data)
    try:
        while remaining:
            try:
                remaining = remaining[os.write(fd, remaining) :]
            except BlockingIOError:
                _wait(fd, select.POLLOUT)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror) from None


def write_output(text: str) -> None:
    """Write all of the text to standard output. Raises `BrokenPipeError` and `OutputError`."""
    if sys.stdout is None:
        raise OutputError(os.strerror(errno.EBADF))
    _write(sys.stdout, text)


def write_error(text: str) -> None:
    """Write to standard error, and ignore errors, which could not be reported anywhere."""
    if sys.stderr is not None:
        with suppress(BrokenPipeError, OutputError):
            _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        fd = stream.fileno()
    except OSError:  # a stream without a descriptor, for example of `contextlib.redirect_stdout`
        stream.write(text)
    else:
        write_all(fd, text.encode(errors="backslashreplace"))


class QueuedWriter:
    """
    Writes to descriptors from a thread of its own, in the order of the calls.

    The reactor's thread must not block on a slow reader, or it could not handle signals. Polling is not
    enough: a terminal with room for one byte is writable, but a write of two bytes blocks. The descriptor
    cannot be made non-blocking either, because other processes share that flag.

    `pause` and `resume` apply back-pressure to the source. `on_error` is called once, with `BrokenPipeError`
    or `OutputError`, and nothing is written after that.
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
        self._queued_bytes = 0
        self._paused = False
        self._failed = False
        # A daemon thread, so that a blocked write does not keep the process from exiting.
        Thread(target=self._run, daemon=True).start()

    def write(self, fd: int, data: bytes) -> None:
        """Queue data for a descriptor."""
        if self._failed or not data:
            return
        self._queued_bytes += len(data)
        self._queue.put((fd, data))
        if self._queued_bytes > _MAX_QUEUED and not self._paused:
            self._paused = True
            self._pause()

    def finish(self, on_written: Callable[[], object]) -> None:
        """Call `on_written` in the reactor's thread after all data is written; never after an error."""
        self._queue.put(on_written)

    def _run(self) -> None:
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
            self._reactor.callFromThread(self._on_written, len(data))

    def _on_written(self, size: int) -> None:
        self._queued_bytes -= size
        if self._paused and self._queued_bytes < _MAX_QUEUED // 2:
            self._paused = False
            self._resume()

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._on_error(error)
