"""Wait for conditions: `wait_until` in the reactor, `block_until` without one."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.task import deferLater

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

reactor: Any = _reactor

TIMEOUT = 60.0
"""Seconds until a wait fails: far more than any condition takes on a busy machine."""

_MIN_INTERVAL, _MAX_INTERVAL = 0.001, 0.05


@overload
async def wait_until(
    condition: Callable[[], Awaitable[T]], what: str = ..., *, timeout: float = ...
) -> T: ...
@overload
async def wait_until(condition: Callable[[], object], what: str = ..., *, timeout: float = ...) -> object: ...
async def wait_until(
    condition: Callable[[], object], what: str = "the condition", *, timeout: float = TIMEOUT
) -> object:
    """
    Run the reactor until a condition holds: until a function, or a coroutine function, returns a true value.

    Returns the coroutine's value. Raises AssertionError, which names `what`, after `timeout` seconds.
    """
    try:
        return await Deferred.fromCoroutine(_poll(condition)).addTimeout(timeout, reactor)
    except DeferredTimeoutError:
        raise AssertionError(f"{what}: not within {timeout:g} s") from None


async def _poll(condition: Callable[[], object]) -> object:
    interval = _MIN_INTERVAL
    while True:
        result = condition()
        if inspect.isawaitable(result):
            if value := await result:
                return value
        elif result:
            return None  # not the result: a coroutine that returns a Failure fails
        await deferLater(reactor, interval)
        interval = min(1.5 * interval, _MAX_INTERVAL)


def block_until(
    condition: Callable[[], object], what: str = "the condition", *, timeout: float = TIMEOUT
) -> None:
    """
    Block until a condition holds.

    Raises AssertionError, which names `what`, unless that is within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    interval = _MIN_INTERVAL
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout:g} s")
        time.sleep(interval)
        interval = min(1.5 * interval, _MAX_INTERVAL)
