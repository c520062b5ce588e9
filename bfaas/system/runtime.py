"""
The process of a role or of a command at run time: options, settings, reactor, signals, and its end.

Only composition roots (`makeService`) and the `bfaas` command use this module.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import react
from twisted.logger import globalLogBeginner
from twisted.python.usage import Options, UsageError
from zope.interface import implementer

from bfaas import __version__
from bfaas.settings import SettingsError
from bfaas.system.logs import LOG_FORMAT, logs_to_standard_output, make_observer
from bfaas.system.startup import StartError, in_one_line, prepare_role, report_errors_in_one_line
from bfaas.system.stdio import end_by_signal, write_output

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from twisted.application.service import IService
    from twisted.python.failure import Failure

T = TypeVar("T")

_MAX_OPEN_FILES = 1 << 14
"""
The limit of open files is not raised above this. Where Linux allows a billion, programs that close all
possible descriptors take long.
"""

_FILES_PER_CONNECTION = 3
"""The connection, its body, and the connection to a worker."""

_SPARE_FILES = 64
_MIN_CONNECTIONS = 8


# Options and settings of roles


class RoleOptions(Options):
    """Command-line options of a role. A usage error is one line on standard error, with exit code 1."""

    role: str
    optParameters: ClassVar = [LOG_FORMAT]

    def parseOptions(self, options: Any = None) -> None:
        """Parse the options, or exit."""
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
    Check twistd's options, and report start errors to the log, too, if it is not standard output.

    Raises `StartError` where twistd would log a traceback.
    """
    report_errors_in_one_line(options.role, log=not logs_to_standard_output(options))
    twistd: Mapping[str, Any] = options.parent or {}
    pid_file = twistd.get("pidfile")
    if pid_file and not os.access(Path(pid_file).parent, os.W_OK | os.X_OK):
        raise StartError(f"--pidfile {pid_file}: no such directory, or it is not writable")


def settings_or_exit(role: str, load: Callable[[Mapping[str, str]], T]) -> T:
    """Load settings from the environment. If they are invalid, print one line per problem and exit with 1."""
    try:
        return load(os.environ)
    except SettingsError as error:
        raise SystemExit("\n".join(f"{role}: {problem}" for problem in error.problems)) from None


# The reactor of roles


def configure_reactor(reactor: Any) -> None:
    """
    Configure signals, the reactor's clock, and the limit of open files. Call this before scheduling anything.

    SIGTERM, SIGINT and SIGHUP stop the reactor, and the exit code is then 0, as service managers expect.
    With Twisted's own handlers, the process would end by the signal (exit code 143). If SIGHUP is ignored at
    the start, as with nohup, it stays ignored.

    The clock becomes monotonic. Twisted's is the wall clock, so that setting it back by an hour would extend
    every deadline by an hour.
    """
    _reset_inherited_signals()
    reactor.seconds = time.monotonic
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MAX_OPEN_FILES)), hard))

    def stop(*_: object) -> None:
        reactor.callFromThread(_stop, reactor)

    def on_running() -> None:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, stop)
        sys.excepthook = sys.__excepthook__

    # The reactor installs its own handlers when it starts to run.
    reactor.callWhenRunning(on_running)


def _reset_inherited_signals() -> None:
    """Undo signal settings of the parent process that hide exit statuses of children, or block signals."""
    # While SIGCHLD is ignored, Linux discards exit statuses, and all children seem to exit with 0.
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def max_connections(other_files: int = 0) -> int:
    """
    Return how many connections the limit of open files allows, besides `other_files`.

    Raises `StartError` if it allows hardly any.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    other_files += _SPARE_FILES
    connections = (limit - other_files) // _FILES_PER_CONNECTION
    if connections < _MIN_CONNECTIONS:
        minimum = other_files + _FILES_PER_CONNECTION * _MIN_CONNECTIONS
        raise StartError(f"{limit} open files (ulimit -n) are too few: at least {minimum} are needed")
    return connections


def run_service(options: RoleOptions, make_service: Callable[[Any, Any], IService]) -> None:
    """Run a role without twistd, which takes longer to start than a worker should."""
    prepare_role(options.role)
    options.parseOptions()
    check_options(options)
    from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

    service = make_service(options, reactor)
    observer = make_observer(options, reactor)
    assert observer is not None  # noqa: S101 - it is None only under twistd
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.run()


def stop_at_end_of_input(reactor: Any) -> None:
    """Stop the reactor at the end of standard input, which comes when the process at its other end dies."""
    reactor.callWhenRunning(reactor.addReader, _EndOfInput(reactor))


@implementer(IReadDescriptor)
class _EndOfInput:
    """Reads and discards standard input, and stops the reactor at its end."""

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


def _stop(reactor: Any) -> None:
    with suppress(ReactorNotRunning):  # a second signal, or the end of input after a signal
        reactor.stop()


# The reactor of commands


def run_with_reactor(work: Callable[[Any], Coroutine[Deferred[Any], Any, T]]) -> T:
    """
    Run a command's work in a reactor, and return its result or raise its exception.

    SIGHUP, SIGINT and SIGTERM cancel the work, and the process ends by the signal after the cleanup. Signals
    that are ignored stay ignored. A process can call this only once.
    """
    results: list[T] = []
    errors: list[Exception] = []

    async def run(reactor: Any) -> None:
        running = Deferred.fromCoroutine(work(reactor))
        reactor.callWhenRunning(signals.handle, lambda: reactor.callFromThread(running.cancel))
        try:
            results.append(await running)
        except Exception as error:  # noqa: BLE001 - the caller handles it
            errors.append(error)
        # Before the reactor stops, which would wait for name resolutions that are still running.
        signals.end_if_caught()

    with _TerminationSignals() as signals, suppress(SystemExit):
        react(lambda reactor: Deferred.fromCoroutine(run(reactor)))
    if errors:
        raise errors[0]
    return results[0]


class _TerminationSignals:
    """
    SIGHUP, SIGINT and SIGTERM while a command's reactor runs: first blocked, then handled, finally restored.

    They are blocked at first because the reactor installs its own handlers when it starts.
    """

    _NUMBERS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._caught: list[int] = []
        self._original = {number: signal.getsignal(number) for number in self._NUMBERS}

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._NUMBERS)
        return self

    def handle(self, on_signal: Callable[[], object]) -> None:
        """Record each of the signals, and call `on_signal`. Signals that are ignored stay ignored."""

        def record(number: int, _: object) -> None:
            self._caught.append(number)
            on_signal()

        for number, handler in self._original.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else record)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._original.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)
        self.end_if_caught()

    def end_if_caught(self) -> None:
        """End the process by the first signal that was caught, if any."""
        if self._caught:
            end_by_signal(self._caught[0])
