"""What is kept of runs, and the line in the log that each has."""

from __future__ import annotations

import json
from random import Random

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import provider

from bfaas.coordinator.run_tracker import LATEST, RunTracker

EPOCH = 1_800_000_000.0


class RunsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.runs = RunTracker(self.clock, lambda: EPOCH + self.clock.seconds(), Random(1))
        self.said: list[LogEvent] = []

        @provider(ILogObserver)
        def observe(event: LogEvent) -> None:
            self.said.append(event)

        observer: ILogObserver = observe
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)

    def test_identifiers_are_16_hex_digits_and_differ(self) -> None:
        ids = {self.runs.new_id() for _ in range(100)}

        self.assertEqual(100, len(ids))
        for run_id in ids:
            self.assertRegex(run_id, "^[0-9a-f]{16}$")

    def test_a_run_is_one_line_with_its_phases(self) -> None:
        run = self.runs.begin("00000000000000ab", "192.0.2.7")
        self.clock.advance(0.25)
        self.runs.served(run, "m1")
        self.clock.advance(0.5)
        run.response_at = run.first_byte_at = self.clock.seconds()
        self.assertEqual(1, self.runs.status()["running"])
        self.clock.advance(1)
        run.ending, run.bytes = "exit 3", 12
        self.runs.end(run)

        [line] = [formatEvent(event) for event in self.said]
        phases = "waited 250 ms, answered after 500 ms, first byte after 500 ms, ran 1500 ms"
        self.assertEqual(f"run 00000000000000ab of 192.0.2.7 on m1: exit 3, 12 bytes; {phases}", line)
        told = {"run": "00000000000000ab", "ended": 1_800_000_002, "wait_ms": 250, "run_ms": 1500}
        self.assertEqual({"running": 0, "recent": [{**told, "ending": "exit 3"}]}, self.runs.status())

    def test_one_that_never_had_a_machine_is_told_of_but_has_no_line(self) -> None:
        run = self.runs.begin(self.runs.new_id(), "192.0.2.7")
        self.assertEqual(0, self.runs.status()["running"])
        self.clock.advance(2)
        self.runs.end(run)

        [told] = json.loads(json.dumps(self.runs.status()))["recent"]
        self.assertEqual((2000, 0, "error"), (told["wait_ms"], told["run_ms"], told["ending"]))
        self.assertEqual([], self.said)

    def test_a_drain_waits_for_those_that_are_under_way(self) -> None:
        one, other = self.runs.begin("1" * 16, "c"), self.runs.begin("2" * 16, "c")
        waiting = Deferred.fromCoroutine(self.runs.wait_idle())
        self.runs.end(one)
        self.assertNoResult(waiting)
        self.runs.end(other)
        self.successResultOf(waiting)

        self.successResultOf(Deferred.fromCoroutine(self.runs.wait_idle()))

    def test_the_latest_are_remembered_and_no_more(self) -> None:
        for number in range(LATEST + 5):
            run = self.runs.begin(f"{number:016x}", "c")
            self.runs.end(run)

        recent = json.loads(json.dumps(self.runs.status()))["recent"]
        latest = [f"{number:016x}" for number in range(5, LATEST + 5)]
        self.assertEqual(latest, [run["run"] for run in recent])
