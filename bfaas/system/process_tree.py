"""
Everything that descends from a process, found in /proc, and what can be done to all of it.

A process is signalled through a descriptor of it whose start time was checked, so that a number that was
reaped and given to another is never hit. Where there is no /proc, nothing is found and nothing is done.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet.task import deferLater

from bfaas.backoff import BackoffSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from twisted.internet.interfaces import IReactorTime

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 20


class Process(NamedTuple):
    """A process; `started` (clock ticks since boot) tells it from a later one of the same number."""

    pid: int
    parent: int
    started: int
    state: str

    @property
    def dead(self) -> bool:
        """It has ended, and is at most waiting to be reaped."""
        return self.state in "ZX"


def children(pid: int) -> list[int]:
    """Tell the numbers of its direct children, the dead that were not reaped among them."""
    return [process.pid for process in _all() if process.parent == pid]


def descendants(pid: int, exclude: Container[int] = ()) -> list[Process]:
    """Tell everything below it, parents first, but for the spared and what is below those alone."""
    by_parent: dict[int, list[Process]] = {}
    for process in _all():
        by_parent.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    parents = [pid]
    for parent in parents:
        below = [process for process in by_parent.pop(parent, ()) if process.pid not in exclude]
        found += below
        parents += [process.pid for process in below]
    return found


def kill_descendants_once(pid: int, exclude: Container[int] = ()) -> int:
    """
    Kill everything below it. Tell how many there were: 0 means that nothing is left, and no zombie of ours.

    What they forked while they were looked for may be left, so call it until it answers 0, with pauses in
    which the killed can die. Below a subreaper nothing gets away.
    """
    found = _stop_all(lambda: descendants(pid, exclude))
    _signal(found, signal.SIGKILL)
    return sum(not process.dead or process.parent == os.getpid() for process in found)


_KILL_BACKOFF = BackoffSchedule(initial=0.001, maximum=0.05)

KILL_TIMEOUT = 2.0
"""Seconds after which descendants that survive SIGKILL are left."""


async def kill_descendants(
    clock: IReactorTime, exclude: Callable[[], Container[int]], timeout: float = KILL_TIMEOUT
) -> int:
    """
    Kill and reap until nothing is left below us but what `exclude` tells, and what is below that.

    Gives up after `timeout` seconds. Tells how many are left. We must be a subreaper.
    """
    end = clock.seconds() + timeout
    for attempts in count():
        left = kill_descendants_once(os.getpid(), exclude())
        if not left or clock.seconds() > end:
            break
        await deferLater(clock, _KILL_BACKOFF.delay(attempts))
        reap_orphans(exclude())
    return left


def kill_tree(pid: int) -> list[Process]:
    """Kill it and everything below it. Return what was killed."""
    found = stop_tree(pid)
    _signal(found, signal.SIGKILL)
    return found


def kill_user(uid: int) -> bool:
    """
    Kill every process of a user, wherever it descends from. Return False if some survive. Blocks.

    The user must be one whose processes are all ours to kill.
    """
    for _ in range(_ROUNDS):
        found = [process for process in _stop_all(lambda: _of_user(uid)) if not process.dead]
        if not found:
            return True
        _signal(found, signal.SIGKILL)
        time.sleep(0.001)
    return False


def _of_user(uid: int) -> list[Process]:
    return [process for process in _all() if uid in _user_ids(process.pid)]


def _user_ids(pid: int) -> tuple[int, ...]:
    # Not the owner of /proc/PID, which is root where a process is not dumpable.
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return ()
    return tuple(map(int, status.partition(b"\nUid:")[2].partition(b"\n")[0].split()))


def stop_tree(pid: int) -> list[Process]:
    """Freeze it and everything below it, where it stands."""
    return _stop_all(lambda: process_and_descendants(pid))


def continue_tree(pid: int) -> None:
    """Thaw what was frozen."""
    _signal(process_and_descendants(pid), signal.SIGCONT)


def process_and_descendants(pid: int) -> list[Process]:
    """Tell it, and everything below it, parents first."""
    root = _look(pid)
    return [root, *descendants(pid)] if root else []


def become_subreaper() -> bool:
    """Let orphans among our descendants become our children, where the system can do that."""
    return _control(_PR_SET_CHILD_SUBREAPER, 1)


def set_non_dumpable() -> bool:
    """
    Close our memory, environment and descriptors to other processes of our user, where the system can.

    Linux then also lets none of them trace us. It still lets them signal us, and root do anything.
    """
    return _control(_PR_SET_DUMPABLE, 0)


def reap_orphans(known: Container[int]) -> int:
    """Reap our dead children other than the known ones, which somebody else waits for. Tells how many."""
    us, reaped = os.getpid(), 0
    for process in _all():
        if process.parent == us and process.dead and process.pid not in known:
            with suppress(ChildProcessError):
                reaped += os.waitpid(process.pid, os.WNOHANG)[0] != 0
    return reaped


def _control(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes  # noqa: PLC0415 - only who runs scripts pays for it

    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


def _last_pid() -> bytes:
    """Tell the pid that was given out last, in our pid namespace."""
    try:
        return Path("/proc/loadavg").read_bytes().rpartition(b" ")[2]
    except FileNotFoundError:
        return b""


def reap_dead_until(known: Container[int]) -> None:
    """
    Reap our dead children in the order in which the system tells them, up to one that is known.

    That takes no look at all processes, so it can be done often.
    """
    with suppress(ChildProcessError):
        while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if dead.si_pid in known:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)


def _stop_all(find: Callable[[], list[Process]]) -> list[Process]:
    # A stopped process forks no more: two rounds are usual, more mean a fork bomb.
    stopped: set[tuple[int, int]] = set()
    found: list[Process] = []
    for _ in range(_ROUNDS):
        found = find()
        new = [p for p in found if not p.dead and (p.pid, p.started) not in stopped]
        if not new:
            break
        _signal(new, signal.SIGSTOP)
        stopped.update((p.pid, p.started) for p in new)
    return found


def _all() -> Iterable[Process]:
    """
    Tell all processes; whatever lives is among them.

    To read them takes time, in which those that end as soon as they have forked can all be missed. So look
    for new ones, which takes far less, until no pid was given out meanwhile: then nothing was forked.
    """
    found: dict[int, Process] = {}
    for _ in range(_ROUNDS):
        last = _last_pid()
        for pid in _pids():
            known = found.get(pid)
            # One whose parent was not met may have got another.
            if (known is None or known.parent not in found) and (process := _look(pid)):
                found[pid] = process
        if last == _last_pid():
            break
    return found.values()


def _pids() -> list[int]:
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - ten times the speed of Path.iterdir
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdigit()]


def _look(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:  # noqa: PTH123 - twice the speed of Path.read_bytes
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last where others' are hidden
        return None
    # The name before it is in brackets, and may contain brackets and spaces.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[19]), fields[0].decode())


def is_running(process: Process) -> bool:
    """Return whether this very process, not a later one of the same number, still runs."""
    now = _look(process.pid)
    return now is not None and now.started == process.started and not now.dead


def _signal(processes: Iterable[Process], number: signal.Signals) -> None:
    if sys.platform != "linux":
        return
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            descriptor = os.pidfd_open(process.pid)
            try:
                if is_running(process):
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
