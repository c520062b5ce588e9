"""
Fixtures of the end-to-end tests: a coordinator, and a check that tests clean up.

pytest-twisted itself does not detect delayed calls, sockets, processes or logged errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import pytest_twisted
from twisted.internet import process as twisted_process
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogLevel, globalLogPublisher
from zope.interface import provider

from tests.e2e.chromium import Chromium
from tests.e2e.coordinator import Running, reactor, start_coordinator, stop

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from twisted.logger import LogEvent

T = TypeVar("T")


def _pending() -> set[Any]:
    """Return the delayed calls, selectables and child processes of the reactor."""
    selectables = {*reactor.getReaders(), *reactor.getWriters()} - set(reactor._internalReaders)
    return {*reactor.getDelayedCalls(), *selectables, *twisted_process.reapProcessHandlers.values()}


def wait_for(work: Coroutine[Deferred[Any], Any, T]) -> T:
    """Run a coroutine while the reactor runs; return its result."""
    result: T = pytest_twisted.blockon(Deferred.fromCoroutine(work))
    return result


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


def running_coordinator() -> Iterator[Running]:
    """Run a coordinator. MAXPERCLIENT is high because all clients have the same address."""
    running = wait_for(start_coordinator(MAXPERCLIENT="100"))
    yield running
    assert wait_for(stop(running)) == 0, running.program.output.decode()


@pytest.fixture(scope="session")
def shared_coordinator() -> Iterator[Running]:
    """Run the coordinator of the fixture `coordinator`."""
    yield from running_coordinator()


@pytest.fixture
def coordinator(shared_coordinator: Running) -> Running:
    """
    Return a coordinator with two local machines and a `MAXREQTIME` of 20 s, which many tests use in turn.

    No machine runs when a test begins.
    """
    wait_for(shared_coordinator.settle())
    return shared_coordinator


@pytest.fixture
def own_coordinator() -> Iterator[Running]:
    """Run a coordinator like that of `coordinator` for one test alone, which examines what it remembers."""
    yield from running_coordinator()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """Run Chromium for many tests, each with pages of its own."""
    chromium = Chromium()
    wait_for(chromium.start())
    yield chromium
    wait_for(chromium.stop())
