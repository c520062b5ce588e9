"""
The first steps of a role's process: open standard descriptors, and one-line errors until the reactor runs.

This module imports nothing that can fail, so that errors of later imports are reported as well.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class StartError(Exception):
    """The reason why a role cannot start, in one line."""


def prepare_role(role: str) -> None:
    """Prepare a process for a role. Call this before any import that opens files, such as klein's."""
    open_standard_descriptors()
    _replace_missing_streams()
    report_errors_in_one_line(role, log=False)


def open_standard_descriptors() -> None:
    """
    Open /dev/null as each of the descriptors 0 to 2 that is closed.

    Otherwise the next file or connection would get its number, and receive what is written to standard output
    or standard error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _replace_missing_streams() -> None:
    """Replace those streams of `sys` that are None because their descriptors were closed."""
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - stays open
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115


def in_one_line(error: BaseException | None) -> str:
    """Return an error's text in one line, with the error's type if the text may be unclear without it."""
    text = " ".join(str(error).split())
    is_clear = isinstance(error, OSError | ValueError) or type(error).__module__ != "builtins"
    return text if text and is_clear else f"{type(error).__name__}: {text}".removesuffix(": ")


def report_errors_in_one_line(role: str, *, log: bool) -> None:
    """
    Report uncaught exceptions in one line on standard error, until the reactor runs.

    With `log` they are also written to `sys.stderr`, which twistd redirects to the log. Exceptions that pass
    through twistd make it remove its pid file, and report the failure to the parent of a daemon.
    """

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        line = f"{role}: {in_one_line(error)}\n"
        for stream in {sys.__stderr__, sys.stderr} if log else {sys.__stderr__}:
            if stream is not None:
                with suppress(OSError):
                    stream.write(line)
                    stream.flush()

    sys.excepthook = report
