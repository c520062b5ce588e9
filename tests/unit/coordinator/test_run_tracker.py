"""Tests of what the coordinator records of runs, and of the log line of each."""

from __future__ import annotations

import json
from random import Random

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from bfaas.coordinator.client_limits import Client
from bfaas.coordinator.outcome import Outcome, OutcomeKind
from bfaas.coordinator.run_tracker import RECENT_RUNS, RunTracker

EPOCH = 1_800_000_000.0


class RunTrackerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.runs = RunTracker(self.clock, lambda: EPOCH + self.clock.seconds(), Random(1))
        self.events = self.enterContext(capturedLogs())

    def test_identifiers_are_16_hex_digits_and_differ(self) -> None:
        ids = {self.runs.new_id() for _ in range(100)}

        self.assertEqual(100, len(ids))
        for run_id in ids:
            self.assertRegex(run_id, "^[0-9a-f]{16}$")

    def test_run_has_one_log_line_with_its_times(self) -> None:
        run = self.runs.begin("00000000000000ab", Client("192.0.2.7"))
        self.clock.advance(0.25)
        self.runs.started(run, "m1")
        self.clock.advance(0.5)
        run.response_at = run.first_byte_at = self.clock.seconds()
        self.assertEqual(1, self.runs.status()["running"])
        self.clock.advance(1)
        run.outcome, run.bytes = Outcome(OutcomeKind.EXIT, 3), 12
        self.runs.end(run)

        [line] = [formatEvent(event) for event in self.events]
        times = "waited 250 ms, response after 500 ms, first byte after 500 ms, ran 1500 ms"
        self.assertEqual(f"run 00000000000000ab of 192.0.2.7 on m1: exit 3, 12 bytes; {times}", line)
        recent = {
            "id": "00000000000000ab",
            "ended_at": 1_800_000_002,
            "wait_ms": 250,
            "run_ms": 1500,
            "outcome": "exit 3",
        }
        self.assertEqual({"running": 0, "recent": [recent]}, self.runs.status())

    def test_access_token_names_the_client_in_the_log_and_the_status(self) -> None:
        run = self.runs.begin("00000000000000ab", Client("alice", "alice"))
        self.runs.started(run, "m1")
        self.runs.end(run)

        [line] = [formatEvent(event) for event in self.events]
        self.assertTrue(line.startswith("run 00000000000000ab of alice on m1: "), line)
        [recent] = json.loads(json.dumps(self.runs.status()))["recent"]
        self.assertEqual("alice", recent["client"])

    def test_request_without_a_machine_is_in_the_status_but_not_in_the_log(self) -> None:
        run = self.runs.begin(self.runs.new_id(), Client("192.0.2.7"))
        self.assertEqual(0, self.runs.status()["running"])
        self.clock.advance(2)
        self.runs.end(run)

        [recent] = json.loads(json.dumps(self.runs.status()))["recent"]
        self.assertEqual(
            (2000, 0, "internal-error"), (recent["wait_ms"], recent["run_ms"], recent["outcome"])
        )
        self.assertEqual([], self.events)

    def test_wait_idle_waits_for_active_runs(self) -> None:
        first, second = self.runs.begin("1" * 16, Client("c")), self.runs.begin("2" * 16, Client("c"))
        waiting = Deferred.fromCoroutine(self.runs.wait_idle())
        self.runs.end(first)
        self.assertNoResult(waiting)
        self.runs.end(second)
        self.successResultOf(waiting)

        self.successResultOf(Deferred.fromCoroutine(self.runs.wait_idle()))

    def test_status_lists_a_limited_number_of_recent_runs(self) -> None:
        for number in range(RECENT_RUNS + 5):
            self.runs.end(self.runs.begin(f"{number:016x}", Client("c")))

        recent = json.loads(json.dumps(self.runs.status()))["recent"]
        expected = [f"{number:016x}" for number in range(5, RECENT_RUNS + 5)]
        self.assertEqual(expected, [run["id"] for run in recent])
