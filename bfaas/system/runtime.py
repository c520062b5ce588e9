"""
What a role needs of the process it is: its settings, a steady clock, an exit status, an end.

Only composition roots (`makeService`) and the `bfaas` command call this.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import react
from twisted.logger import globalLogBeginner
from twisted.python.usage import Options, UsageError
from zope.interface import implementer

from bfaas import __version__
from bfaas.settings import SettingsError
from bfaas.system.logs import is_elsewhere, observer_of
from bfaas.system.startup import StartError, in_one_line, prepare_role, report_errors_in_one_line
from bfaas.system.stdio import end_by_signal, write_output

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from twisted.application.service import IService
    from twisted.python.failure import Failure

S = TypeVar("S")

_MAX_FILES = 1 << 14
"""Open files that are enough; where Linux allows a thousand million, some programs go through them all."""

_FILES_EACH = 3
_OTHER_FILES = 64
_FEWEST_CONNECTIONS = 8


class RoleOptions(Options):
    """Command-line options of a program of ours, `role`. A usage error is one line, and exit code 1."""

    role: str

    def parseOptions(self, options: Any = None) -> None:
        """Read the options."""
        try:
            super().parseOptions(options)
        except UsageError as error:
            raise SystemExit(f"{self.role}: {in_one_line(error)}") from None

    def opt_version(self) -> None:
        """Print the version and exit."""
        write_output(f"{self.role} {__version__}\n")
        raise SystemExit(0)


def check_options(options: RoleOptions) -> None:
    """
    Have errors reported where the options say that the log goes, too.

    Raise `StartError` where twistd would itself log a traceback.
    """
    report_errors_in_one_line(options.role, logged=is_elsewhere(options))
    twistd: Mapping[str, Any] = options.parent or {}
    pid_file = twistd.get("pidfile")
    if pid_file and not os.access(Path(pid_file).parent, os.W_OK | os.X_OK):
        raise StartError(f"--pidfile {pid_file}: no such directory, or it is not writable")


def reset_signals() -> None:
    """
    Undo what the parent has set that keeps us from our children's ends and from signals.

    While SIGCHLD is ignored, the kernel keeps no exit status of a child: all seem to end with 0.
    """
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def settings_or_exit(role: str, load: Callable[[Mapping[str, str]], S]) -> S:
    """Read the environment; where it is wrong, say so in one line a variable, and exit with 1."""
    try:
        return load(os.environ)
    except SettingsError as error:
        raise SystemExit("\n".join(f"{role}: {problem}" for problem in error.problems)) from None


def configure_reactor(reactor: Any) -> None:
    """
    Make the reactor's time steady, SIGTERM, SIGINT and SIGHUP an ordinary end, and room for connections.

    SIGHUP, a terminal's end, stays ignored where it is at the start (nohup).

    Twisted's reactor counts in wall-clock time, so that a clock that is set back by an hour would
    lengthen every deadline by an hour. And it ends a signalled process by that signal (status 143), where
    service managers expect 0 of one that ended in order. Call it before anything is scheduled.
    """
    reset_signals()
    reactor.seconds = time.monotonic
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MAX_FILES)), hard))

    def stop(*_: object) -> None:
        reactor.callFromThread(_stop, reactor)

    def take_signals() -> None:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, stop)

    def run() -> None:
        take_signals()
        sys.excepthook = sys.__excepthook__

    # The reactor installs its own handlers as it starts to run.
    reactor.callWhenRunning(run)


def max_connections(others: int = 0) -> int:
    """
    Return how many connections fit into the files that may be open, of which each can need three.

    They are the connection, its body, and the connection to its worker. `others` are files that are needed
    besides, and some more are left. Raise `StartError` where next to none would fit.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    others += _OTHER_FILES
    room = (limit - others) // _FILES_EACH
    if room < _FEWEST_CONNECTIONS:
        least = others + _FILES_EACH * _FEWEST_CONNECTIONS
        raise StartError(f"{limit} open files (ulimit -n) are too few: at least {least} are needed")
    return room


def _stop(reactor: Any) -> None:
    # A second signal finds it stopping already.
    with suppress(ReactorNotRunning):
        reactor.stop()


def run_service(options: RoleOptions, make_service: Callable[[Any, Any], IService]) -> None:
    """Run a role without twistd, whose start-up a worker that boots for every run can do without."""
    prepare_role(options.role)
    options.parseOptions()
    check_options(options)
    from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

    service = make_service(options, reactor)
    observer = observer_of(options, reactor)
    assert observer is not None  # noqa: S101 - only twistd makes another
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.run()


class _EndingSignals:
    """
    SIGHUP, SIGINT and SIGTERM while a command's reactor runs: blocked, then handled, then as before.

    They are blocked at first because the reactor, when it starts, installs handlers of its own.
    """

    _NUMBERS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.caught: list[int] = []
        self._before = {number: signal.getsignal(number) for number in self._NUMBERS}

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._NUMBERS)
        return self

    def handle(self, on_signal: Callable[[], object]) -> None:
        """Note each of them in `caught`, and call `on_signal`; but those that are ignored stay ignored."""

        def take(number: int, _: object) -> None:
            self.caught.append(number)
            on_signal()

        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else take)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)
        self.end_if_caught()

    def end_if_caught(self) -> None:
        """End the process by the first that was caught."""
        if self.caught:
            end_by_signal(self.caught[0])


def run_with_reactor(work: Callable[[Any], Coroutine[Deferred[Any], Any, S]]) -> S:
    """
    Do a command's work in a reactor, and return its result or raise its exception.

    SIGHUP, SIGINT and SIGTERM cancel the work. Once it has cleaned up, the process ends by that signal. Those
    that are ignored stay ignored. A process can call this once.
    """
    done: list[S] = []
    failed: list[Exception] = []

    async def run(reactor: Any) -> None:
        running = Deferred.fromCoroutine(work(reactor))
        reactor.callWhenRunning(signals.handle, lambda: reactor.callFromThread(running.cancel))
        try:
            done.append(await running)
        except Exception as error:  # noqa: BLE001 - the caller's
            failed.append(error)
        # At once: as it stops, the reactor waits for names that are still being resolved.
        signals.end_if_caught()

    with _EndingSignals() as signals, suppress(SystemExit):
        react(lambda reactor: Deferred.fromCoroutine(run(reactor)))
    if failed:
        raise failed[0]
    return done[0]


@implementer(IReadDescriptor)
class _EndOfInput:
    """Watches standard input, which somebody else holds open, for its end."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def fileno(self) -> int:
        return 0

    def logPrefix(self) -> str:
        return "standard input"

    def doRead(self) -> None:
        if not os.read(0, 4096):
            self.connectionLost(None)

    def connectionLost(self, reason: Failure | None) -> None:  # noqa: ARG002 - the interface's signature
        self._reactor.removeReader(self)
        _stop(self._reactor)


def stop_at_end_of_input(reactor: Any) -> None:
    """Stop the reactor when standard input ends, as it does when the process that holds it dies."""
    reactor.callWhenRunning(reactor.addReader, _EndOfInput(reactor))
