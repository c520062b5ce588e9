"""
Simulated time: one event heap for a whole world, and a clock for each of its nodes, which may be wrong.

`twisted.internet.task.Clock` keeps a sorted list, which is slow with hundreds of timers.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

if TYPE_CHECKING:
    from collections.abc import Callable


@implementer(IDelayedCall)
class Timer:
    """A scheduled call."""

    __slots__ = ("arguments", "call", "cancelled", "clock", "done", "due", "sequence")

    def __init__(self, clock: HeapClock, due: float, call: Callable[..., Any], arguments: Any) -> None:
        self.clock = clock
        self.due = due
        self.sequence = 0
        self.call = call
        self.arguments = arguments
        self.done = False
        self.cancelled = False

    def getTime(self) -> float:
        return self.due

    def active(self) -> bool:
        return not (self.done or self.cancelled)

    def cancel(self) -> None:
        self._check()
        self.cancelled = True
        self.release_call()

    def release_call(self) -> None:
        self.call, self.arguments = _nothing, ()

    def reset(self, seconds: float) -> None:
        self._check()
        self.clock.push(self, self.clock.now + seconds)

    def delay(self, seconds: float) -> None:
        self._check()
        self.clock.push(self, self.due + seconds)

    def _check(self) -> None:
        if self.done:
            raise AlreadyCalled
        if self.cancelled:
            raise AlreadyCancelled


def _nothing() -> None:
    pass


class HeapClock:
    """
    The world's time, in seconds since its start.

    A finished timer releases its call, which usually refers to the timer: there are millions of them, and
    collecting such reference cycles is slow.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._scheduled = 0
        self._heap: list[tuple[float, int, Timer]] = []

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Timer:
        timer = Timer(self, 0.0, call, arguments)
        self.push(timer, self.now + seconds)
        return timer

    def push(self, timer: Timer, due: float) -> None:
        self._scheduled += 1
        timer.due, timer.sequence = due, self._scheduled
        heapq.heappush(self._heap, (due, self._scheduled, timer))

    def run_until(self, moment: float) -> None:
        """Run all calls that are due up to a moment, in order."""
        heap = self._heap
        while heap and heap[0][0] <= moment:
            due, sequence, timer = heapq.heappop(heap)
            if timer.cancelled or timer.done or timer.sequence != sequence:
                continue
            self.now = max(self.now, due)
            timer.done = True
            timer.call(*timer.arguments)
            if timer.done:  # a paused node reschedules its timers
                timer.release_call()
        self.now = max(self.now, moment)


@implementer(IDelayedCall)
class NodeTimer:
    """A timer of one node, in the time of its clock."""

    __slots__ = ("_clock", "_timer")

    def __init__(self, clock: NodeClock, seconds: float, call: Callable[[], Any]) -> None:
        self._clock = clock
        self._timer = clock.world.call_later(seconds / clock.rate, self._fire, call)

    def _fire(self, call: Callable[[], Any]) -> None:
        clock, timer = self._clock, self._timer
        if clock.dead:
            clock.abandoned.append(call)
            return
        if clock.paused:
            timer.done = False
            clock.when_resumed(lambda: clock.world.push(timer, clock.world.now))
            return
        del clock.timers[self]
        call()

    def getTime(self) -> float:
        return self._clock.seconds() + (self._timer.due - self._clock.world.now) * self._clock.rate

    def active(self) -> bool:
        return self._timer.active()

    def cancel(self) -> None:
        if self._clock.dead:  # a coroutine of the dead node is collected, and ends what it has begun
            return
        self._timer.cancel()
        self._clock.timers.pop(self, None)

    def reset(self, seconds: float) -> None:
        self._timer.reset(seconds / self._clock.rate)

    def delay(self, seconds: float) -> None:
        self._timer.delay(seconds / self._clock.rate)


@implementer(IReactorTime)
class NodeClock:
    """
    The time of one node, with its own origin and rate.

    A paused node (as by SIGSTOP) runs no calls until it resumes; a dead one never does. The calls of a dead
    node are kept in `abandoned`: if Python collected them, it would run the cleanup of their coroutines.
    """

    def __init__(self, world: HeapClock, rate: float = 1.0, origin: float = 0.0) -> None:
        self.world = world
        self.rate = rate
        self._origin = origin - rate * world.now
        self.dead = False
        self.paused = False
        self.pauses = 0
        self.timers: dict[NodeTimer, None] = {}
        self.abandoned: list[object] = []
        self._postponed: list[Callable[[], Any]] = []

    def seconds(self) -> float:
        return self._origin + self.rate * self.world.now

    def callLater(self, delay: float, callable: Callable[..., Any], *args: Any, **kw: Any) -> NodeTimer:  # noqa: A002
        timer = NodeTimer(self, delay, lambda: callable(*args, **kw))
        self.timers[timer] = None
        return timer

    def getDelayedCalls(self) -> list[Any]:
        return list(self.timers)

    def deliver(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call something on behalf of the outside world: now, after the node resumes, or never."""
        if self.dead:
            self.abandoned.append(call)
        elif self.paused:
            self.when_resumed(lambda: self.deliver(call, *arguments))
        else:
            call(*arguments)

    def when_resumed(self, call: Callable[[], Any]) -> None:
        self._postponed.append(call)

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            postponed, self._postponed = self._postponed, []
            for call in postponed:
                self.deliver(call)
