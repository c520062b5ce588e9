"""
Fixtures of the end-to-end tests: a coordinator, and a check that tests clean up.

pytest-twisted itself does not detect delayed calls, sockets, processes or logged errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import process as twisted_process
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogLevel, globalLogPublisher
from zope.interface import provider

from tests.e2e.coordinator import Running, reactor, start_coordinator, stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from twisted.logger import LogEvent


def _pending() -> set[Any]:
    """Return the delayed calls, selectables and child processes of the reactor."""
    selectables = {*reactor.getReaders(), *reactor.getWriters()} - set(reactor._internalReaders)
    return {*reactor.getDelayedCalls(), *selectables, *twisted_process.reapProcessHandlers.values()}


@pytest.fixture(autouse=True)
def clean_reactor() -> Iterator[None]:
    """Fail a test that leaves delayed calls, sockets, processes or logged errors."""
    errors: list[LogEvent] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event.get("log_level", LogLevel.info) >= LogLevel.error:
            errors.append(event)

    before = _pending()
    globalLogPublisher.addObserver(observe)
    try:
        yield
        for _ in range(100):
            if _pending() <= before:
                break
            pytest_twisted.blockon(deferLater(reactor, 0.02))
    finally:
        globalLogPublisher.removeObserver(observe)
    assert _pending() - before == set()
    assert errors == []


@pytest_twisted.async_yield_fixture
async def coordinator() -> AsyncIterator[Running]:
    """
    Run a coordinator with two local machines and a `MAXREQTIME` of 20 s.

    MAXPERCLIENT is high because all clients of a test have the same address.
    """
    running = await start_coordinator(MAXPERCLIENT="100")
    yield running
    assert await stop(running) == 0, running.program.output.decode()
