"""
The descendants of a process, found in /proc, and how to stop, kill and reap all of them.

A process is signalled through a pidfd, after a check of its start time, so that a reused pid is never hit.
On systems without /proc, no processes are found and nothing is done.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet.task import deferLater

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from twisted.internet.interfaces import IReactorTime

KILL_TIMEOUT = 2.0
"""Seconds after which `kill_descendants` gives up on processes that survive SIGKILL."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_MAX_ROUNDS = 20


class Process(NamedTuple):
    """A process. Its start time, in clock ticks since boot, distinguishes it from others of the same pid."""

    pid: int
    parent: int
    start_time: int
    state: str

    @property
    def dead(self) -> bool:
        """Whether it has ended; it may still have to be reaped."""
        return self.state in "ZX"


# Finding processes


def children(pid: int) -> list[int]:
    """Return the pids of the direct children of a process, including dead ones that are not reaped."""
    return [process.pid for process in _all_processes() if process.parent == pid]


def descendants(pid: int, exclude: Container[int] = ()) -> list[Process]:
    """Return all descendants of a process, parents first, without excluded pids and their descendants."""
    listed = _listed_children(pid)
    if listed is not None and all(child in exclude for child in listed):
        return []  # as usual: reading all of /proc takes a hundred times as long
    by_parent: dict[int, list[Process]] = {}
    for process in _all_processes():
        by_parent.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    parents = [pid]
    for parent in parents:  # grows while it is iterated
        included = [process for process in by_parent.pop(parent, ()) if process.pid not in exclude]
        found += included
        parents += [process.pid for process in included]
    return found


def process_and_descendants(pid: int) -> list[Process]:
    """Return a process and all of its descendants, parents first; nothing if there is no such process."""
    root = _read_process(pid)
    return [root, *descendants(pid)] if root else []


def is_running(process: Process) -> bool:
    """Return whether the process still runs; a later one with the same pid does not count."""
    current = _read_process(process.pid)
    return current is not None and current.start_time == process.start_time and not current.dead


def _listed_children(pid: int) -> list[int] | None:
    """
    Return the pids of direct children as the kernel lists them; None if it does not.

    If a child is reaped meanwhile the list may lack others, but it is empty only if there was no child
    (Documentation/filesystems/proc.rst, 3.7). Not all kernels have these lists.
    """
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - see `_pids`
            with open(f"/proc/{pid}/task/{thread}/children", "rb", 0) as file:  # noqa: PTH123
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return found


def _all_processes() -> Iterable[Process]:
    """Return all processes, without missing any that is alive."""
    found: dict[int, Process] = {}
    for pid in _every_pid(()):
        known = found.get(pid)
        # A process whose parent was not found may have been reparented since.
        if (known is None or known.parent not in found) and (process := _read_process(pid)):
            found[pid] = process
    return found.values()


def _every_pid(known: Container[int]) -> Iterable[int]:
    """
    Yield the pids of all processes that are not known, which the caller may extend.

    Reading /proc takes time, in which processes that fork and exit at once could all be missed. So it is
    listed again, which is much faster, until no pid was assigned in the meantime.
    """
    for _ in range(_MAX_ROUNDS):
        last_pid = _last_pid()
        yield from (pid for pid in _pids() if pid not in known)
        if last_pid == _last_pid():
            break


def _last_pid() -> bytes:
    """Return the pid that was assigned last in this pid namespace."""
    try:
        return Path("/proc/loadavg").read_bytes().rpartition(b" ")[2]
    except FileNotFoundError:
        return b""


def _pids() -> list[int]:
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - ten times faster than Path.iterdir
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdigit()]


def _read_process(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:  # noqa: PTH123 - twice as fast as Path.read_bytes
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # PermissionError: mounted with hidepid
        return None
    # The fields follow the program's name, which is in parentheses and may contain parentheses and spaces.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[19]), fields[0].decode())


# Stopping and killing them


def kill_descendants_once(pid: int, exclude: Container[int] = ()) -> int:
    """
    Send SIGKILL to all descendants of a process, without excluded pids and their descendants.

    Returns how many there were, counting dead ones only if they are unreaped children of this process.
    Processes that were forked during the search may have been missed. So call this until it returns 0, with
    pauses in which the processes can die; below a subreaper none escapes.
    """
    found = _stop_all(lambda: descendants(pid, exclude))
    _send_signal(found, signal.SIGKILL)
    return sum(not process.dead or process.parent == os.getpid() for process in found)


async def kill_descendants(
    clock: IReactorTime, exclude: Callable[[], Container[int]], timeout: float = KILL_TIMEOUT
) -> int:
    """
    Kill and reap all descendants of this process.

    `exclude` returns pids that are left alone, with their descendants. Returns how many processes are left
    after `timeout` seconds, usually 0. This process must be a subreaper.
    """
    pause = 0.001
    end = clock.seconds() + timeout
    while left := kill_descendants_once(os.getpid(), exclude()):
        if clock.seconds() > end:
            break
        await deferLater(clock, pause)
        pause = min(2 * pause, 0.05)
        reap_orphans(exclude())
    return left


def kill_tree(pid: int) -> list[Process]:
    """Kill a process and all of its descendants, and return them."""
    found = stop_tree(pid)
    _send_signal(found, signal.SIGKILL)
    return found


def kill_user(uid: int) -> bool:
    """
    Kill all processes of a user, whatever their parents. Return False if any survive. Blocks.

    The user must not have any processes but those of scripts.
    """
    for _ in range(_MAX_ROUNDS):
        found = [process for process in _stop_all(lambda: _processes_of_user(uid)) if not process.dead]
        if not found:
            return True
        _send_signal(found, signal.SIGKILL)
        time.sleep(0.001)
    return False


def stop_tree(pid: int) -> list[Process]:
    """Send SIGSTOP to a process and all of its descendants, and return them."""
    return _stop_all(lambda: process_and_descendants(pid))


def continue_tree(pid: int) -> None:
    """Send SIGCONT to a process and all of its descendants."""
    _send_signal(process_and_descendants(pid), signal.SIGCONT)


def _processes_of_user(uid: int) -> list[Process]:
    found: dict[int, Process | None] = {}
    for pid in _every_pid(found):
        found[pid] = _read_process(pid) if uid in _user_ids(pid) else None
    return [process for process in found.values() if process is not None]


def _user_ids(pid: int) -> tuple[int, ...]:
    # The owner of /proc/PID is no substitute: it is root if the process is not dumpable.
    try:
        with open(f"/proc/{pid}/status", "rb", 0) as file:  # noqa: PTH123 - see `_read_process`
            status = file.read()
    except OSError:
        return ()
    return tuple(map(int, status.partition(b"\nUid:")[2].partition(b"\n")[0].split()))


def _stop_all(find: Callable[[], list[Process]]) -> list[Process]:
    # Stopped processes cannot fork. Two rounds are usual; more mean a fork bomb.
    stopped: set[tuple[int, int]] = set()
    found: list[Process] = []
    for _ in range(_MAX_ROUNDS):
        found = find()
        new = [p for p in found if not p.dead and (p.pid, p.start_time) not in stopped]
        if not new:
            break
        _send_signal(new, signal.SIGSTOP)
        stopped.update((p.pid, p.start_time) for p in new)
    return found


def _send_signal(processes: Iterable[Process], number: signal.Signals) -> None:
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


# Reaping them


def reap_orphans(exclude: Container[int]) -> int:
    """Reap all dead children of this process, except excluded ones, and return their number."""
    reaped = 0
    for process in _all_processes():
        if process.parent == os.getpid() and process.dead and process.pid not in exclude:
            with suppress(ChildProcessError):
                reaped += os.waitpid(process.pid, os.WNOHANG)[0] != 0
    return reaped


def reap_until_excluded(exclude: Container[int]) -> None:
    """
    Reap dead children of this process in the order in which Linux reports them, up to an excluded one.

    Unlike `reap_orphans` this does not read /proc, so it can be called often.
    """
    with suppress(ChildProcessError):
        while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if dead.si_pid in exclude:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)


# This process


def become_subreaper() -> bool:
    """Become the parent of orphaned descendants. Return whether the system supports that."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_non_dumpable() -> bool:
    """
    Protect memory, environment and descriptors from other processes of the same user.

    Linux then also forbids them to trace this process, but not to signal it; root is not restricted. Returns
    whether the system supports that.
    """
    return _prctl(_PR_SET_DUMPABLE, 0)


def set_death_signal(number: int) -> bool:
    """Have this process receive a signal when its parent dies. Return whether the system supports that."""
    return _prctl(_PR_SET_PDEATHSIG, number)


def set_name(name: bytes) -> bool:
    """Set the name of this process, of at most 15 bytes. Return whether the system supports that."""
    return _prctl(_PR_SET_NAME, name)


def _prctl(option: int, value: int | bytes) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes  # noqa: PLC0415 - takes time to load, and only processes that run scripts need it

    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
