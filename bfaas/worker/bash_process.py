"""
One run of a script as a bash process: its command, its pipes, its descendants, its exit.

A run is over when bash exits. Then all processes that it left behind are killed, whatever their session. The
rest of the output is read from the pipes, and after that the exit is reported. This process must be
the subreaper of its descendants (`bfaas.system.process_tree.become_subreaper`), and must start no other
children during a run.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.process import ProcessWriter
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from bfaas.protocol.formats import Exit, Reason, Stream
from bfaas.system import process_tree
from bfaas.system.confinement import BASH, SEARCH_PATH, STARTED_FD, first_victim_of_low_memory
from bfaas.system.out_of_memory import count_kills
from bfaas.worker.pipes import OutputReader, Pipes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twisted.internet.interfaces import IDelayedCall, IReactorProcess, IReactorTime
    from twisted.python.failure import Failure

    from bfaas.protocol.request import RunRequest
    from bfaas.system.confinement import Confinement

    class BashReactor(IReactorProcess, IReactorTime):
        """The parts of a reactor that a run needs."""


T = TypeVar("T")

_STREAMS = {1: Stream.STDOUT, 2: Stream.STDERR}

_MAX_ARGUMENT = 128 * 1024 - 1
"""Largest argument of a program on Linux in bytes (MAX_ARG_STRLEN in linux/binfmts.h), without its NUL."""

_SCRIPT_FD = 3
"""Descriptor of a script that is too long for an argument."""

# The expansion comes before the `exec`, so that the script is read before its descriptor is closed; and it
# starts on the first line, so that line numbers are right. `cat` has its path, as the client can set PATH.
_LONG_SCRIPT = f'eval "exec {_SCRIPT_FD}<&-; $(/bin/cat <&{_SCRIPT_FD})"'.encode()

_SHUTDOWN_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""
Signals that service managers and terminals send to all processes of a service. The script may receive one
before the worker does, so its death by one of them is reported after `BashRun._SHUTDOWN_DELAY`, in which the
worker may find out that it is being shut down.
"""

_MAX_STARTUP_ERRORS = 1000
"""Bytes of the confining programs' messages that are kept."""

_KILLED = 128 + signal.SIGKILL
"""Exit code of a script that SIGKILL has killed, and of one whose last command it has."""

_RSS_MARGIN = 1.25
"""
A run's peak memory is reported if it exceeds the worker's by this factor: Linux counts memory in batches.
"""


def script_environment(home: str, machine_id: str, region: str, confinement: Confinement) -> dict[str, str]:
    """Return the complete default environment of a script: it inherits nothing from the worker."""
    name = confinement.user_name
    return {
        "PATH": SEARCH_PATH,
        "HOME": home,
        "USER": name,
        "LOGNAME": name,
        "SHELL": BASH,
        "LANG": "C.UTF-8",
        "FLY_MACHINE_ID": machine_id,
        "FLY_REGION": region,
    }


@implementer(IPushProducer)
class BashRun(ProcessProtocol):
    """
    One run of a script, and the push producer of its output.

    `on_output` is called with each piece of output, in order for each stream, until `wait_ended` fires. After
    `max_output` bytes, output is dropped and counted, and the script continues. Pausing the producer leaves
    output in the pipes, so that the script blocks once they are full; stopping it kills the run.
    """

    transport: Any  # uses more of a process transport than its interface declares
    _log = Logger()
    _DRAIN_TIMEOUT = 1.0
    _REAP_INTERVAL = 0.1
    _SHUTDOWN_DELAY = 0.1

    def __init__(
        self, reactor: BashReactor, on_output: Callable[[Stream, bytes], None], max_output: int
    ) -> None:
        self._reactor = reactor
        self._on_output = on_output
        self._output_budget = max_output
        self._dropped_bytes = 0

        self._script_started: _OneShot[bool] = _OneShot()
        self._ended: _OneShot[Exit] = _OneShot()
        self._startup_errors = b""
        self._killed = False
        self._reason: Reason | None = None
        self._signals_are_exit_codes = False

        # The run has ended once all three are set, in any order.
        self._status: int | None = None
        self._descendants_killed = False
        self._pipes_closed = False

        self._drain_timer: IDelayedCall | None = None
        self._reap_timer: IDelayedCall | None = None
        self._preexisting_children = frozenset(process_tree.children(os.getpid()))
        self._started_at = self._exited_at = reactor.seconds()
        self._initial_usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._initial_kills = count_kills()

    def start(
        self,
        request: RunRequest,
        environment: Mapping[str, str],
        confinement: Confinement,
        *,
        merge_output: bool = False,
    ) -> None:
        """
        Start bash, confined, in a session of its own.

        The request's variables override `environment` in the last step before bash. Any earlier, its PATH or
        LD_PRELOAD would control the programs that confine the script, the first of which may run as root.

        With `merge_output`, both output streams are one pipe, which keeps their order, and are reported as
        standard output.

        Raises `OSError` if bash cannot be started, and `ValueError` if the script contains a NUL.
        """
        # Bubblewrap reports the death of its child only as exit code 128+n.
        self._signals_are_exit_codes = confinement.uses_bubblewrap
        prefix = confinement.command_prefix()
        variables = [f"{name}={value}".encode() for name, value in request.env.items()]
        set_variables = [b"/usr/bin/env", *variables] if variables else []
        with ExitStack() as files:
            self._pipes = pipes = Pipes(confinement.user)
            files.callback(pipes.close)
            child_files: dict[int, int] = {}

            pipes.add_output(1)
            if not merge_output:
                pipes.add_output(2)
            pipes.add_output(STARTED_FD)

            if request.stdin:
                pipes.add_input(0)
            else:
                child_files[0] = null = os.open(os.devnull, os.O_RDONLY)
                files.callback(os.close, null)

            script = request.script
            if len(script) > _MAX_ARGUMENT:
                child_files[_SCRIPT_FD] = memory = _memory_file(script)
                files.callback(os.close, memory)
                script = _LONG_SCRIPT

            child_files |= pipes.child_ends
            child_files.setdefault(2, pipes.child_ends[1])
            command: list[bytes | str] = [*prefix, *set_variables, BASH, "-c", "--", script]
            with first_victim_of_low_memory():
                self._reactor.spawnProcess(self, prefix[0], command, env=environment, childFDs=child_files)
            pipes.release_parent_ends()  # the transport closes them
        # Bash may have exited already: Twisted tries to reap a process as soon as it is started.
        if self._status is None:
            if request.stdin:
                # Written as the script reads; unread input is dropped with the pipe.
                self.transport.write(request.stdin)
                self.transport.closeStdin()
            self._reap_orphans()

    def wait_started(self) -> Deferred[bool]:
        """
        Wait until the script has started. Fires with False if the run ended before that.

        In that case its exit has a reason: `NOT_STARTED`, unless the run was killed. See `startup_errors`.
        """
        return self._script_started.wait()

    def wait_ended(self) -> Deferred[Exit]:
        """Wait until all processes of the run are dead and all of its output has been passed on."""
        return self._ended.wait()

    @property
    def startup_errors(self) -> str:
        """The beginning of what the confining programs wrote before the script started, in one line."""
        return "; ".join(self._startup_errors.decode("utf-8", "replace").split("\n")).strip("; ")

    def kill(self, reason: Reason | None = None) -> None:
        """
        Kill the run, and report `reason` in its exit. After bash has exited, this usually does nothing.

        The exception is `WORKER_LOST`: a signal that was sent to all processes of a service, as systemd does,
        may have killed bash just before the worker received it. The exit then reports the shutdown.
        """
        if self._killed or self._ended.is_set:
            return
        if self._status is not None:
            if reason is Reason.WORKER_LOST and self._signal_number():
                self._reason = reason
            return
        self._killed = True
        self._reason = reason
        # Bash is not reaped yet, so its pid is still valid. Its group may not exist: setsid creates it. With
        # bubblewrap there is none: all processes in it die with the one that is killed.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.transport.pid, signal.SIGKILL)
        self.transport.signalProcess("KILL")

    # IPushProducer, called at the client's pace

    def pauseProducing(self) -> None:
        """Leave output in the pipes, so that the script blocks once they are full."""
        if self._status is None:
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Read output again."""
        if self._status is None:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Kill the run, whose client has disconnected."""
        self.kill()

    # ProcessProtocol, in the order of the calls

    def connectionMade(self) -> None:
        """Install the pipes of `start`, in place of Twisted's own, which the script could not reopen."""
        for number, end in self._pipes.parent_ends.items():
            kind = ProcessWriter if number == 0 else OutputReader
            self.transport.pipes[number] = kind(self._reactor, self.transport, number, end)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Note that the script has started, or pass on output within the limit."""
        if childFD == STARTED_FD:
            self._script_started.set(True)
            return
        self._check_started()
        if not self._script_started.value:  # unknown, or False: the confining programs wrote it
            self._startup_errors += data[: _MAX_STARTUP_ERRORS - len(self._startup_errors)]
            return
        output = data[: self._output_budget]
        self._output_budget -= len(output)
        self._dropped_bytes += len(data) - len(output)
        if output:
            self._on_output(_STREAMS[childFD], output)

    def _check_started(self) -> None:
        # The line on STARTED_FD is written before any output, but the reactor may read the output first.
        if not self._script_started.is_set and STARTED_FD in self.transport.pipes:
            self.transport.pipes[STARTED_FD].doRead()

    def processExited(self, reason: Failure) -> None:
        """Bash has exited, so the run is over: kill its other processes, and read the rest of the output."""
        self._status = getattr(reason.value, "status", 0)
        self._exited_at = self._reactor.seconds()
        self._check_started()
        if not self._script_started.is_set:
            if not self._killed:
                self._reason = Reason.NOT_STARTED
            self._script_started.set(False)
        if self._reap_timer is not None:
            self._reap_timer.cancel()
        # Whatever the client's pace: without writers, the pipes hold no more than their capacity.
        self.transport.resumeProducing()
        killing = Deferred.fromCoroutine(self._kill_descendants())
        killing.addErrback(lambda failure: self._log.failure("cannot kill a script's processes", failure))
        killing.addCallback(lambda _: self._on_descendants_killed())

    async def _kill_descendants(self) -> None:
        """Kill and reap all descendants of this process that did not exist before the run."""
        survivors = await process_tree.kill_descendants(self._reactor, lambda: self._preexisting_children)
        if survivors:
            self._log.error("{count} processes of a script survive SIGKILL", count=survivors)
        if not self._killed and self._signal_number() in _SHUTDOWN_SIGNALS:
            await deferLater(self._reactor, self._SHUTDOWN_DELAY)

    def _on_descendants_killed(self) -> None:
        self._descendants_killed = True
        if not self._pipes_closed:
            self._drain_timer = self._reactor.callLater(self._DRAIN_TIMEOUT, self._close_pipes)
        self._maybe_finish()

    def _close_pipes(self) -> None:
        self._log.warn("closing a script's pipes: a process outside of the run holds them open")
        for number in list(self.transport.pipes):
            self.transport.closeChildFD(number)

    def processEnded(self, _: Failure) -> None:
        """All pipes have been read to their end, or closed."""
        self._pipes_closed = True
        if self._drain_timer is not None and self._drain_timer.active():
            self._drain_timer.cancel()
        self._maybe_finish()

    def _maybe_finish(self) -> None:
        if self._status is not None and self._descendants_killed and self._pipes_closed:
            self._ended.set(self._exit(self._status))

    def _reap_orphans(self) -> None:
        # Orphans become children of this process. Dead ones that are not reaped would count towards the
        # script's limit of processes.
        process_tree.reap_until_excluded(self._preexisting_children | {self.transport.pid})
        self._reap_timer = self._reactor.callLater(self._REAP_INTERVAL, self._reap_orphans)

    # The exit

    def _exit(self, status: int) -> Exit:
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            code = 128 - code
        signal_name = _signal_name(self._signal_number())
        if self._reason is not None:
            code = self._reason.code
            signal_name = None
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        initial = self._initial_usage
        cpu_seconds = usage.ru_utime + usage.ru_stime - initial.ru_utime - initial.ru_stime
        return Exit(
            code,
            signal=signal_name,
            reason=self._reason,
            wall_ms=round(1000 * (self._exited_at - self._started_at)),
            cpu_ms=round(1000 * cpu_seconds),
            max_rss_kb=self._max_rss_kb(usage.ru_maxrss),
            oom=code == _KILLED and self._is_out_of_memory(),
            truncated=self._dropped_bytes > 0,
            dropped_bytes=self._dropped_bytes,
        )

    def _is_out_of_memory(self) -> bool:
        """Return whether Linux has killed a process for lack of memory since the run began."""
        kills = count_kills()
        return kills is not None and self._initial_kills is not None and kills > self._initial_kills

    def _signal_number(self) -> int:
        """Return the signal that killed bash, as far as that is known, or 0 if it exited."""
        if self._status is None:
            return 0
        code = os.waitstatus_to_exitcode(self._status)
        number = 0
        if code < 0:
            number = -code
        elif self._signals_are_exit_codes:
            number = code - 128
        return number if _signal_name(number) else 0

    def _max_rss_kb(self, children_peak: int) -> int | None:
        """
        Return the largest resident set of the run's processes in KiB, or None if it is unknown.

        Linux counts the memory of the process that starts a program as that program's (`exec_mmap` in
        fs/exec.c). So a peak that is not larger than the worker's may be the worker's own.
        """
        worker_peak = _peak_rss_kb()
        if worker_peak is None:
            return None
        minimum = max(_RSS_MARGIN * worker_peak, self._initial_usage.ru_maxrss)
        return children_peak if children_peak > minimum else None


class _OneShot(Generic[T]):
    """A value that is set once, and that any number of callers can wait for."""

    def __init__(self) -> None:
        self._waiters: list[Deferred[T]] = []
        self.is_set = False
        self.value: T | None = None

    def set(self, value: T) -> None:
        """Set the value and pass it to all waiters, unless it is set already."""
        if self.is_set:
            return
        self.is_set = True
        self.value = value
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(value)

    def wait(self) -> Deferred[T]:
        """Wait for the value. Cancelling one wait does not affect the others."""
        if self.is_set:
            return succeed(cast("T", self.value))
        waiter: Deferred[T] = Deferred(self._waiters.remove)
        self._waiters.append(waiter)
        return waiter


def _memory_file(content: bytes) -> int:
    """Return the descriptor of an anonymous file with this content, open at its start."""
    descriptor = os.memfd_create("script")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _peak_rss_kb() -> int | None:
    """Return the largest resident set that this process has had, in KiB, or None if it is unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)


def _signal_name(number: int) -> str | None:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None
