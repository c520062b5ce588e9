"""
One bash run as a process: its tree, its pipes, its end.

The run is over when bash exits. What it left running is then killed, whatever session it moved to, what is
in the pipes is delivered, and only then is the exit told. For that, the process that this is in must be
the subreaper of its descendants (see `bfaas.system.process_tree.become_subreaper`), and have no other use
for children.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.process import ProcessWriter
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from bfaas.protocol.formats import Exit, Reason, Stream
from bfaas.system import process_tree
from bfaas.system.confinement import BASH, BEGUN, SEARCH_PATH, command_prefix, in_bubblewrap, name_of
from bfaas.worker.pipes import OutputReader, Pipes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from twisted.internet.interfaces import IDelayedCall, IReactorProcess, IReactorTime
    from twisted.python.failure import Failure

    from bfaas.protocol.request import RunRequest
    from bfaas.system.confinement import User

    class BashReactor(IReactorProcess, IReactorTime):
        """What a run needs of the reactor."""


_MAX_ARGUMENT = 128 * 1024 - 1
"""Bytes that Linux takes as one argument of a program (MAX_ARG_STRLEN in linux/binfmts.h, less the NUL)."""

# Expansion comes first, so descriptor 3 is closed with the whole script read, and lines keep their numbers.
# By its path, since PATH can be the client's.
_LONG_SCRIPT = 'eval "exec 3<&-; $(/bin/cat <&3)"'

_STREAMS = {1: Stream.STDOUT, 2: Stream.STDERR}

_SHUTDOWN_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""
What service managers and terminals send to all processes at once. The script can be the first to notice, so
a death by one of these is told a moment later, in which we may learn that we are shut down too.
"""

_MAX_COMPLAINT = 1000
"""Bytes that are kept of what the confining programs write."""

_CERTAINTY = 1.25
"""How many times our own memory a run must have had, to be surely not ours: the kernel counts in batches."""

T = TypeVar("T")


def script_environment(home: str, machine_id: str, region: str, user: User | None = None) -> dict[str, str]:
    """Make a script's whole environment; nothing is inherited. `SHELL` is what runs the script."""
    name = name_of(user)
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
    A script, running. As a producer it pauses its pipes, and so the script; stopping it kills it.

    `on_output` is called with each piece of output, in the order of its stream, until `ended` fires.
    Past `max_output` bytes, output is dropped and counted; the script goes on.
    """

    transport: Any  # a process's transport has more than the interface tells
    _log = Logger()
    _DRAIN_LIMIT = 1.0
    _REAP_PERIOD = 0.1
    _SHUTDOWN_PAUSE = 0.1

    def __init__(
        self, clock: IReactorTime, on_output: Callable[[Stream, bytes], None], max_output: int
    ) -> None:
        self._clock = clock
        self._on_output = on_output
        self._room = max_output
        self._dropped = 0
        self._reason: Reason | None = None
        self._killed = False
        self._status: int | None = None
        self._swept = False
        self._pipes_closed = False
        self._drain_timer: IDelayedCall | None = None
        self._reaping: IDelayedCall | None = None
        self._begun: _Once[bool] = _Once()
        self._ended: _Once[Exit] = _Once()
        self._complaint = b""
        self._signals_are_codes = False
        self._preexisting_children = frozenset(process_tree.children(os.getpid()))
        self._started = self._exited = clock.seconds()
        self._usage = resource.getrusage(resource.RUSAGE_CHILDREN)

    def start(
        self,
        reactor: BashReactor,
        ask: RunRequest,
        environment: Mapping[str, str],
        sandbox: Sequence[str] = (),
        user: User | None = None,
        *,
        merged: bool = False,
    ) -> None:
        """
        Start bash, in a session of its own, behind the sandbox's command prefix, as a user or as ourselves.

        The client's variables come over `environment` as the last step: set any earlier, PATH or LD_PRELOAD
        would have the programs that confine the script (the first of them root's) do the client's bidding.

        Where output is `merged`, both streams are one pipe, so that they keep their order, and come as
        standard output.

        Raises `OSError` when it cannot be started, `ValueError` for a script with a NUL in it.
        """
        # bwrap tells the death of what it runs as 128+n, and no other way.
        self._signals_are_codes = in_bubblewrap(sandbox)
        self._reactor = reactor
        with ExitStack() as files:
            pipes = self._pipes = Pipes(user)
            files.callback(pipes.close)
            descriptors = {}
            for number in (1, BEGUN) if merged else (1, 2, BEGUN):
                pipes.make(number)
            if ask.stdin:
                pipes.make(0, writable=False)
            else:
                descriptors[0] = null = os.open(os.devnull, os.O_RDONLY)
                files.callback(os.close, null)
            command = ask.script
            if len(command) > _MAX_ARGUMENT:
                descriptors[3] = memory = _in_memory(command)
                files.callback(os.close, memory)
                command = _LONG_SCRIPT.encode()
            descriptors |= pipes.theirs
            descriptors.setdefault(2, pipes.theirs[1])
            variables = [f"{name}={value}".encode() for name, value in ask.env.items()]
            setting = [b"/usr/bin/env", *variables] if variables else []
            prefix = command_prefix(user, sandbox)
            words: list[bytes | str] = [*prefix, *setting, BASH, "-c", "--", command]
            reactor.spawnProcess(self, prefix[0], words, env=environment, childFDs=descriptors)
            pipes.ours = {}  # the transport's now
        if self._status is None:  # it may have ended already
            if ask.stdin:
                # Written as the script reads, beside its output; what it never reads goes with the pipe.
                self.transport.write(ask.stdin)
                self.transport.closeStdin()
            self._reap()

    def when_begun(self) -> Deferred[bool]:
        """
        Wait until bash itself has begun: True. False where the run ended before.

        Then its exit has a reason: `NOT_STARTED` unless we ended it; and `complaint` tells more.
        """
        return self._begun.wait()

    def when_ended(self) -> Deferred[Exit]:
        """Wait for the end of the run: nothing of it is left then, and all its output has been given."""
        return self._ended.wait()

    @property
    def complaint(self) -> str:
        """What the programs that confine the script wrote before bash began, its beginning, as one line."""
        return "; ".join(self._complaint.decode("utf-8", "replace").split("\n")).strip("; ")

    def kill(self, reason: Reason | None = None) -> None:
        """
        End the run now, for a reason that its exit will tell. Without effect once bash has exited.

        But where the worker is shut down, bash may just have died of a signal that was sent to both, as
        systemd does: that is the shutdown as well.
        """
        if self._killed or self._ended.happened:
            return
        if self._status is not None:
            if reason is Reason.WORKER_LOST and self._signal_number():
                self._reason = reason
            return
        self._killed, self._reason = True, reason
        pid = self.transport.pid
        # Bash is not reaped yet, so its number is still its own; setsid may not have made the group yet.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        self.transport.signalProcess("KILL")

    # The producer, which the client's pace drives.

    def pauseProducing(self) -> None:
        """Leave output in the pipes, until they are full and the script waits."""
        if self._status is None:
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Read on."""
        if self._status is None:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Nobody reads any more: kill the run."""
        self.kill()

    # The process.

    def connectionMade(self) -> None:
        """Have the transport use our pipes: those that it makes could not be opened again by the script."""
        for number, end in self._pipes.ours.items():
            kind = ProcessWriter if number == 0 else OutputReader
            self.transport.pipes[number] = kind(self._reactor, self.transport, number, end)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Pass a piece of output on, as far as there is room for it."""
        if childFD == BEGUN:
            self._begun.happen(True)
            return
        self._look_whether_begun()
        if not self._begun.is_true:  # also where it is known that it never will: output can come last
            self._complaint += data[: _MAX_COMPLAINT - len(self._complaint)]
            return
        kept = data[: self._room]
        self._room -= len(kept)
        self._dropped += len(data) - len(kept)
        if kept:
            self._on_output(_STREAMS[childFD], kept)

    def _look_whether_begun(self) -> None:
        # The line is written before any output, but the reactor may come to the output first.
        if not self._begun.happened and BEGUN in self.transport.pipes:
            self.transport.pipes[BEGUN].doRead()

    def processExited(self, reason: Failure) -> None:
        """Bash has ended, so the run is over: read what is left in the pipes, kill what is left of it."""
        self._status = getattr(reason.value, "status", 0)
        self._exited = self._clock.seconds()
        self._look_whether_begun()
        if not self._begun.happened:
            if not self._killed:
                self._reason = Reason.NOT_STARTED
            self._begun.happen(False)
        if self._reaping is not None:
            self._reaping.cancel()
        # Whatever the client's pace: with its writers gone, what a pipe holds has an end, at a megabyte.
        self.transport.resumeProducing()
        sweep = Deferred.fromCoroutine(self._sweep())
        sweep.addErrback(lambda failure: self._log.failure("while killing what a script left", failure))
        sweep.addCallback(lambda _: self._note_swept())

    def processEnded(self, _: Failure) -> None:
        """Note that the pipes are read to their end."""
        self._pipes_closed = True
        if self._drain_timer is not None and self._drain_timer.active():
            self._drain_timer.cancel()
        self._maybe_finish()

    def _reap(self) -> None:
        # Orphans fall to us. Dead ones would count as the script's processes until its end, and be its last.
        process_tree.reap_dead_until(self._preexisting_children | {self.transport.pid})
        self._reaping = self._clock.callLater(self._REAP_PERIOD, self._reap)

    async def _sweep(self) -> None:
        """Kill and reap until nothing is left that descends from us and was not there before the run."""
        left = await process_tree.kill_descendants(self._clock, lambda: self._preexisting_children)
        if left:
            self._log.error("{count} processes of a script survive SIGKILL", count=left)
        if not self._killed and self._signal_number() in _SHUTDOWN_SIGNALS:
            await deferLater(self._clock, self._SHUTDOWN_PAUSE)

    def _note_swept(self) -> None:
        self._swept = True
        if not self._pipes_closed:
            self._drain_timer = self._clock.callLater(self._DRAIN_LIMIT, self._give_up_on_pipes)
        self._maybe_finish()

    def _give_up_on_pipes(self) -> None:
        self._log.warn("a script's pipes are held open by a process that is not its own")
        for number in list(self.transport.pipes):
            self.transport.closeChildFD(number)

    def _maybe_finish(self) -> None:
        if not self._ended.happened and self._swept and self._pipes_closed:
            self._ended.happen(self._tell_exit())

    def _signal_number(self) -> int:
        """Return the signal that bash died of, as far as that is known; 0 where it exited."""
        assert self._status is not None  # noqa: S101 - processExited comes before processEnded
        code = os.waitstatus_to_exitcode(self._status)
        number = -code if code < 0 else code - 128 if self._signals_are_codes else 0
        return number if _signal_name(number) else 0

    def _tell_exit(self) -> Exit:
        assert self._status is not None  # noqa: S101 - processExited comes before processEnded
        code = os.waitstatus_to_exitcode(self._status)
        name = _signal_name(self._signal_number())
        if code < 0:
            code = 128 - code
        if self._reason is not None:
            code, name = self._reason.code, None
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = usage.ru_utime + usage.ru_stime - self._usage.ru_utime - self._usage.ru_stime
        return Exit(
            code,
            signal=name,
            reason=self._reason,
            wall_ms=round(1000 * (self._exited - self._started)),
            cpu_ms=round(1000 * cpu),
            max_rss_kb=self._max_rss_kb(usage.ru_maxrss),
            truncated=self._dropped > 0,
            dropped_bytes=self._dropped,
        )

    def _max_rss_kb(self, seen: int) -> int | None:
        """
        Return the largest resident set of the run's processes, if it is known: if it is larger than ours.

        The memory of the process that starts a program counts as that program's (`exec_mmap` in Linux's
        fs/exec.c), so that nothing smaller than us can be told from us.
        """
        ours = _peak_kb()
        if ours is None or seen <= max(_CERTAINTY * ours, self._usage.ru_maxrss):
            return None
        return seen


class _Once(Generic[T]):
    """Something that happens once, and has a value then."""

    def __init__(self) -> None:
        self._values: list[T] = []
        self._waiters: list[Deferred[T]] = []

    @property
    def happened(self) -> bool:
        return bool(self._values)

    @property
    def is_true(self) -> bool:
        """Whether it has happened, and its value counts as true."""
        return any(self._values)

    def happen(self, value: T) -> None:
        """Give it to all who wait; only the first time counts."""
        if self._values:
            return
        self._values.append(value)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(value)

    def wait(self) -> Deferred[T]:
        """Wait for the value; cancelling that leaves other waits alone."""
        waiter: Deferred[T] = Deferred(self._waiters.remove)
        if self._values:
            waiter.callback(self._values[0])
        else:
            self._waiters.append(waiter)
        return waiter


def _peak_kb() -> int | None:
    """Return the largest resident set that this process has had, in KiB, where the system says so."""
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


def _in_memory(script: bytes) -> int:
    descriptor = os.memfd_create("script")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(script)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
