"""
Simulated time: one heap of events for a whole world, and for each of its nodes a clock that may be wrong.

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
    """An event that is to come."""

    __slots__ = ("arguments", "call", "cancelled", "clock", "done", "due", "turn")

    def __init__(self, clock: HeapClock, due: float, call: Callable[..., Any], arguments: Any) -> None:
        self.clock = clock
        self.due = due
        self.turn = 0
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
        self.forget()

    def forget(self) -> None:
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
    The world's time, in seconds from its beginning.

    A timer that is over lets go of what it called, which mostly knows it: there are millions, and to collect
    such circles takes long.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = 0
        self._heap: list[tuple[float, int, Timer]] = []

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Timer:
        timer = Timer(self, 0.0, call, arguments)
        self.push(timer, self.now + seconds)
        return timer

    def push(self, timer: Timer, due: float) -> None:
        self.turns += 1
        timer.due, timer.turn = due, self.turns
        heapq.heappush(self._heap, (due, self.turns, timer))

    def run_until(self, moment: float) -> None:
        """Let everything happen that falls due until then."""
        heap = self._heap
        while heap and heap[0][0] <= moment:
            due, turn, timer = heapq.heappop(heap)
            if timer.cancelled or timer.done or timer.turn != turn:
                continue
            self.now = max(self.now, due)
            timer.done = True
            timer.call(*timer.arguments)
            if timer.done:  # a node that stands still takes its timers up again
                timer.forget()
        self.now = max(self.now, moment)


@implementer(IDelayedCall)
class NodeTimer:
    """A timer of one node, by its own clock."""

    __slots__ = ("_clock", "_timer")

    def __init__(self, clock: NodeClock, seconds: float, call: Callable[[], Any]) -> None:
        self._clock = clock
        self._timer = clock.world.call_later(seconds / clock.rate, self._fire, call)

    def _fire(self, call: Callable[[], Any]) -> None:
        clock, timer = self._clock, self._timer
        if clock.dead:
            clock.grave.append(call)
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
        self._timer.cancel()
        self._clock.timers.pop(self, None)

    def reset(self, seconds: float) -> None:
        self._timer.reset(seconds / self._clock.rate)

    def delay(self, seconds: float) -> None:
        self._timer.delay(seconds / self._clock.rate)


@implementer(IReactorTime)
class NodeClock:
    """
    The time of one node: it starts anywhere, and runs at a rate of its own.

    A node that is paused, as by SIGSTOP, notices nothing until it goes on; one that is dead never does.
    What waits for ever in a dead one is kept in its `grave`: were it to go, Python would run its clean-up.
    """

    def __init__(self, world: HeapClock, rate: float = 1.0, origin: float = 0.0) -> None:
        self.world = world
        self.rate = rate
        self._origin = origin - rate * world.now
        self.dead = False
        self.paused = False
        self.pauses = 0
        self.timers: dict[NodeTimer, None] = {}
        self.grave: list[object] = []
        self._missed: list[Callable[[], Any]] = []

    def seconds(self) -> float:
        return self._origin + self.rate * self.world.now

    def callLater(self, delay: float, callable: Callable[..., Any], *args: Any, **kw: Any) -> NodeTimer:  # noqa: A002
        timer = NodeTimer(self, delay, lambda: callable(*args, **kw))
        self.timers[timer] = None
        return timer

    def getDelayedCalls(self) -> list[Any]:
        return list(self.timers)

    def deliver(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Let something that comes from outside reach the node, if and when it can."""
        if self.dead:
            self.grave.append(call)
        elif self.paused:
            self.when_resumed(lambda: self.deliver(call, *arguments))
        else:
            call(*arguments)

    def when_resumed(self, call: Callable[[], Any]) -> None:
        self._missed.append(call)

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            missed, self._missed = self._missed, []
            for call in missed:
                self.deliver(call)
