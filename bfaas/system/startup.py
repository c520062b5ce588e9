"""
The first that a program of ours does: its standard files, and what its errors look like until it runs.

Nothing is imported here that could fail: what fails to be imported after it is reported as well.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class StartError(Exception):
    """Why a program of ours cannot start, in one line."""


def prepare_role(role: str) -> None:
    """Prepare a process for a role, before anything opens a file that stays, as klein's import does."""
    hold_standard_files()
    report_errors_in_one_line(role, logged=False)


def in_one_line(error: BaseException | None) -> str:
    """Describe an error in one line, with its type where its text may mean little by itself."""
    text = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError) or type(error).__module__ != "builtins"
    return text if text and plain else f"{type(error).__name__}: {text}".removesuffix(": ")


def report_errors_in_one_line(role: str, *, logged: bool) -> None:
    """
    Have an exception that ends this process before its reactor runs be one line on standard error.

    `logged`: the log, which is elsewhere, gets it too. Exceptions that go through twistd have it remove its
    pid file, and report to the process that waits for a daemon's start.
    """

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        line = f"{role}: {in_one_line(error)}\n"
        for out in {sys.__stderr__, sys.stderr} if logged else {sys.__stderr__}:
            if out is not None:
                with suppress(OSError):
                    out.write(line)
                    out.flush()

    sys.excepthook = report


def hold_standard_files() -> None:
    """
    Open /dev/null where standard input, output or error is closed.

    Otherwise the next files, which may be connections, get their numbers, and what is written to standard
    output or error goes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
