"""Tests of the metrics of runs, rejections and machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from twisted.trial.unittest import SynchronousTestCase

from bfaas.coordinator.client_limits import Client
from bfaas.coordinator.metrics import MAX_TOKEN_LABELS, Metrics
from bfaas.coordinator.outcome import Outcome, OutcomeKind
from bfaas.coordinator.run_tracker import Run
from bfaas.pooling.slot import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping


class MetricsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.metrics = Metrics()

    def samples(self, name: str) -> Mapping[tuple[str, ...], float]:
        """Return the samples of a name by the values of their labels, which are sorted by label name."""
        families = text_string_to_metric_families(generate_latest(self.metrics._registry).decode())
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }

    def end(self, outcome: Outcome, *, machine: str | None = "m1", token: str | None = None) -> None:
        """Record a run that waited for a second, and ran for three if it had a machine."""
        run = Run("0" * 16, Client("c", token), 10.0, machine, outcome=outcome, bytes=7, ended_at=14.0)
        if machine is not None:
            run.started_at = 11.0
        self.metrics.ended(run)

    def test_run_is_counted_by_its_kind_of_outcome(self) -> None:
        for code in (0, 3):
            self.end(Outcome(OutcomeKind.EXIT, code))
        self.end(Outcome(OutcomeKind.CLIENT_DISCONNECTED))

        counts = self.samples("bfaas_run_duration_seconds_count")
        counted = {labels: count for labels, count in counts.items() if count}
        self.assertEqual({("exit",): 2.0, ("client-disconnected",): 1.0}, counted)
        self.assertIn(("internal-error",), counts)
        self.assertEqual(6.0, self.samples("bfaas_run_duration_seconds_sum")["exit",])
        self.assertEqual({(): 21.0}, self.samples("bfaas_response_bytes_total"))

    def test_runs_are_counted_by_token_with_a_limited_number_of_labels(self) -> None:
        for number in range(MAX_TOKEN_LABELS + 3):
            self.end(Outcome(OutcomeKind.EXIT, 0), token=f"t{number}")
        self.end(Outcome(OutcomeKind.TIMEOUT), token="t0")
        self.end(Outcome(OutcomeKind.QUEUE_TIMEOUT), token="t0", machine=None)
        self.end(Outcome(OutcomeKind.EXIT, 0))

        runs = self.samples("bfaas_token_runs_total")
        self.assertEqual(MAX_TOKEN_LABELS + 1, len(runs))
        self.assertEqual((2.0, 1.0, 3.0), (runs["t0",], runs["t1",], runs["other",]))
        self.assertEqual(6.0, self.samples("bfaas_token_run_seconds_total")["t0",])

    def test_rejected_run_with_a_machine_has_no_duration(self) -> None:
        self.end(Outcome(OutcomeKind.WORKER_FAILED))
        self.assertEqual(0.0, sum(self.samples("bfaas_run_duration_seconds_count").values()))
        self.assertEqual({(): 1.0}, self.samples("bfaas_queue_wait_seconds_count"))

    def test_only_queued_requests_have_a_wait(self) -> None:
        for kind in (OutcomeKind.QUEUE_FULL, OutcomeKind.REPLAYED):
            self.end(Outcome(kind), machine=None)
        self.assertEqual({(): 0.0}, self.samples("bfaas_queue_wait_seconds_count"))
        self.end(Outcome(OutcomeKind.QUEUE_TIMEOUT), machine=None)
        self.assertEqual({(): 4.0}, self.samples("bfaas_queue_wait_seconds_sum"))

    def test_rejections_are_counted_by_reason(self) -> None:
        self.metrics.rejected(OutcomeKind.CLIENT_LIMIT)
        counts = self.samples("bfaas_requests_rejected_total")
        self.assertEqual(1.0, counts["client-limit",])
        self.assertEqual(0.0, counts["invalid-request",])

    def test_phase_is_recorded_with_the_next_one(self) -> None:
        self.metrics.observe_phase(Phase.STOPPING, Phase.STOPPED, 2.5)
        self.assertEqual({("stopped", "stopping"): 2.5}, self.samples("bfaas_machine_phase_seconds_sum"))
