"""What a coordinator does, in numbers, for Prometheus."""

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

from bfaas.coordinator.run_tracker import Refused
from bfaas.http.server import register_error_handlers
from bfaas.pooling.slot import Phase
from bfaas.protocol.formats import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from bfaas.coordinator.app import Coordinator
    from bfaas.coordinator.run_tracker import Run
    from bfaas.pool import Pool

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_EXIT = "exit"
_ENDINGS = (_EXIT, *Reason, "left", "error")


disable_created_metrics()  # a second series for each, that tells when it began


class Metrics:
    """
    Counts, and tells at `/metrics` what it has counted.

    Watches a pool's machines (`observe_phase`) and the runs (`ended`, `refused`); all times are in seconds.
    """

    app = Klein()
    register_error_handlers(app)

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._queue = _histogram(
            registry, "bfaas_queue_wait_seconds", "from a request to the machine that serves it"
        )
        self._first_byte = _histogram(
            registry, "bfaas_time_to_first_byte_seconds", "from the ready machine to the answer's first byte"
        )
        self._run = _histogram(
            registry, "bfaas_run_duration_seconds", "from the ready machine to the end", "ending"
        )
        self._phase = _histogram(
            registry, "bfaas_machine_phase_seconds", "of machines, in each phase", "phase", "then"
        )
        self._bytes = Counter("bfaas_response_bytes_total", "bytes of answers", registry=registry)
        self._refusals = Counter(
            "bfaas_requests_rejected_total", "requests refused", ["reason"], registry=registry
        )
        for ending in _ENDINGS:
            self._run.labels(ending)
        for reason in Refused:
            self._refusals.labels(reason)

    def register_gauges(self, pool: Pool, coordinator: Coordinator) -> None:
        """Tell of their state too, as it is whenever somebody asks."""
        machines = Gauge("bfaas_machines", "machines of the pool", ["phase"], registry=self._registry)
        for phase in Phase:
            machines.labels(phase.value).set_function(partial(pool.count, phase))
        self._gauge("bfaas_queue_length", "requests that wait for a machine", lambda: pool.waiting)
        self._gauge("bfaas_expected_wait_seconds", "of a request that comes now", lambda: pool.expected_wait)
        self._gauge(
            "bfaas_ready", "1 as long as nothing is in the way", lambda: coordinator.not_ready_reason is None
        )

    def _gauge(self, name: str, text: str, look: Callable[[], float]) -> None:
        Gauge(name, text, registry=self._registry).set_function(look)

    def observe_phase(self, old: Phase, new: Phase, seconds: float) -> None:
        """Note how long a machine was in a phase, and where it went."""
        self._phase.labels(old.value, new.value).observe(seconds)

    def ended(self, run: Run) -> None:
        """Note how long the phases of a run took."""
        assert run.ended_at is not None  # noqa: S101 - it has ended
        if run.ending not in (Refused.QUEUE_FULL, Refused.REPLAYED):
            self._queue.observe((run.ended_at if run.started_at is None else run.started_at) - run.queued_at)
        if run.started_at is None:
            return
        if run.first_byte_at is not None:
            self._first_byte.observe(run.first_byte_at - run.started_at)
        ending = run.ending.split()[0]
        if ending in _ENDINGS:
            self._run.labels(ending).observe(run.ended_at - run.started_at)
        self._bytes.inc(run.bytes)

    def refused(self, reason: str) -> None:
        """Note that a request was refused."""
        self._refusals.labels(reason).inc()

    @app.route("/metrics", methods=["GET"])
    def metrics(self, request: Request) -> bytes:
        """Tell all of it."""
        request.setHeader("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        told: bytes = generate_latest(self._registry)
        return told


def _histogram(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Histogram:
    return Histogram(name, f"seconds {text}", labels, registry=registry, buckets=_SECONDS)
