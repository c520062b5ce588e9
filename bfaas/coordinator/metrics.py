"""Prometheus metrics of a coordinator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from klein import Klein
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from bfaas.coordinator.outcome import REJECTIONS, RUN_OUTCOMES, OutcomeKind
from bfaas.coordinator.run_tracker import RunObserver
from bfaas.http.server import register_error_handlers
from bfaas.pooling.slot import Phase, PhaseObserver

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from bfaas.coordinator.app import Coordinator
    from bfaas.coordinator.run_tracker import Run
    from bfaas.pool import Pool

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of all histograms' buckets, in seconds."""

MAX_TOKEN_LABELS = 100
"""Names of access tokens that have series of their own. Others are counted together, as `other`."""

_NEVER_QUEUED = (OutcomeKind.QUEUE_FULL, OutcomeKind.REPLAYED)

disable_created_metrics()  # they would double the number of series


class Metrics(RunObserver, PhaseObserver):
    """
    Collects metrics, and serves them at `/metrics`.

    Observes a pool's machines (`observe_phase`) and a coordinator's runs (`ended`, `rejected`). All times are
    in seconds.
    """

    app = Klein()
    register_error_handlers(app)

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._queue_wait = _histogram(
            registry, "bfaas_queue_wait_seconds", "from the request to the allocation of a ready machine"
        )
        self._first_byte = _histogram(
            registry,
            "bfaas_time_to_first_byte_seconds",
            "from the allocation of a ready machine to the response's first byte",
        )
        self._run_duration = _histogram(
            registry,
            "bfaas_run_duration_seconds",
            "from the allocation of a ready machine to the end of the run",
            "outcome",
        )
        self._phase_duration = _histogram(
            registry,
            "bfaas_machine_phase_seconds",
            "that machines spent in a phase, by the phase that followed",
            "phase",
            "next_phase",
        )
        self._bytes = Counter(
            "bfaas_response_bytes_total", "bytes of run responses written", registry=registry
        )
        self._rejections = Counter(
            "bfaas_requests_rejected_total", "requests rejected", ["reason"], registry=registry
        )
        self._token_names: set[str] = set()
        self._token_runs = Counter(
            "bfaas_token_runs_total", "ended runs, by access token", ["token"], registry=registry
        )
        self._token_seconds = Counter(
            "bfaas_token_run_seconds_total",
            "seconds from the allocation of a ready machine to the end of the run, by access token",
            ["token"],
            registry=registry,
        )
        # Series exist from the start, so that rates over them are right.
        for outcome in RUN_OUTCOMES:
            self._run_duration.labels(outcome)
        for reason in REJECTIONS:
            self._rejections.labels(reason)

    def register_gauges(self, pool: Pool, coordinator: Coordinator) -> None:
        """Add gauges that read the current state of a pool and a coordinator at each scrape."""
        machines = Gauge("bfaas_machines", "machines of the pool", ["phase"], registry=self._registry)
        for phase in Phase:
            machines.labels(phase.value).set_function(partial(pool.count, phase))
        self._gauge("bfaas_queue_length", "requests waiting for a machine", lambda: pool.waiting)
        self._gauge(
            "bfaas_expected_wait_seconds", "expected wait of a new request", lambda: pool.expected_wait
        )
        self._gauge("bfaas_ready", "1 while /readyz is 200", lambda: coordinator.not_ready_reason is None)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self._registry).set_function(read)

    def observe_phase(self, old: Phase, new: Phase, seconds: float) -> None:
        """Record how long a machine was in a phase, and which phase followed."""
        self._phase_duration.labels(old.value, new.value).observe(seconds)

    def ended(self, run: Run, /) -> None:
        """Record the times and the size of an ended run."""
        assert run.ended_at is not None  # noqa: S101 - it has ended
        kind = run.outcome.kind
        if kind not in _NEVER_QUEUED:
            wait_end = run.ended_at if run.started_at is None else run.started_at
            self._queue_wait.observe(wait_end - run.queued_at)
        if run.started_at is None:
            return
        if run.first_byte_at is not None:
            self._first_byte.observe(run.first_byte_at - run.started_at)
        if kind in RUN_OUTCOMES:
            self._run_duration.labels(kind).observe(run.ended_at - run.started_at)
        self._bytes.inc(run.bytes)
        if run.client.token is not None:
            label = self._token_label(run.client.token)
            self._token_runs.labels(label).inc()
            self._token_seconds.labels(label).inc(run.ended_at - run.started_at)

    def _token_label(self, name: str) -> str:
        if len(self._token_names) < MAX_TOKEN_LABELS:
            self._token_names.add(name)
        return name if name in self._token_names else "other"

    def rejected(self, reason: OutcomeKind, /) -> None:
        """Count a rejected request."""
        self._rejections.labels(reason).inc()

    @app.route("/metrics", methods=["GET"])
    def metrics(self, request: Request) -> bytes:
        """Return all metrics in Prometheus's text format."""
        request.setHeader("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        text: bytes = generate_latest(self._registry)
        return text


def _histogram(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Histogram:
    return Histogram(name, f"seconds {text}", labels, registry=registry, buckets=_BUCKETS)
