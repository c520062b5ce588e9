"""Simulated time whose timers let go of what they call once that is over, and so are not part of circles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.sim.clock import HeapClock, Timer

if TYPE_CHECKING:
    from collections.abc import Callable


class _Timer(Timer):
    def cancel(self) -> None:
        super().cancel()
        self.forget()

    def forget(self) -> None:
        self.call, self.arguments = _nothing, ()


class ForgetfulClock(HeapClock):
    """
    The simulation's clock, for nodes that never stand still: such a one would call a timer again.

    A fleet makes millions of timers, which are known to what they call. To collect such circles takes longer
    than all else that the simulation does.
    """

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Timer:
        """Call something later."""
        timer = _Timer(self, 0.0, _fire, ())
        timer.arguments = (timer, call, arguments)
        self.push(timer, self.now + seconds)
        return timer


def _fire(timer: _Timer, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    timer.forget()
    call(*arguments)


def _nothing() -> None:
    pass
