"""The coordinator's resource: takes scripts from anyone, runs each on a worker of its own, in its time."""

from __future__ import annotations

import json
from math import ceil
from typing import TYPE_CHECKING

from klein import Klein
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from bfaas.coordinator.client_limits import ConcurrencyLimiter, client_key
from bfaas.coordinator.run_tracker import Refused
from bfaas.coordinator.ui import serve_page
from bfaas.coordinator.worker_client import NotStartedError, WorkerError
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.server import HTTPError, register_error_handlers, text_response
from bfaas.pool import PoolClosedError
from bfaas.pooling.slot import Phase
from bfaas.protocol import formats
from bfaas.protocol.request import parse_run_request
from bfaas.protocol.response import RunResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IReactorTime
    from twisted.web.server import Request

    from bfaas.coordinator.run_tracker import Run, RunTracker
    from bfaas.coordinator.worker_client import WorkerClient
    from bfaas.machines.api import Machine
    from bfaas.pool import Allocation, Pool
    from bfaas.protocol.request import RunRequest
    from bfaas.settings import CoordSettings

MAX_REPLAYED = 1_000_000
"""Bytes of a request's body that Fly's proxy replays at the most."""

REPLAYED = "bfaas-replayed"

REPLAY_TIMEOUT = "2s"
"""How long Fly's proxy tries to reach another coordinator, before it sends a request back."""

_REASONS = frozenset(formats.Reason)

UNCOMPRESSED = {"Content-Encoding": "identity"}
"""
Keeps proxies from compressing a stream: some hold it back until its end.

Of Caddy (2.6) and Fly's proxy nothing else is known to help. RFC 9110 (8.4.1) discourages the word, since it
says nothing; HTTP clients read it as such.
"""

MAX_GRACE = 5.0
"""
Seconds that a worker has to begin its answer, at the most, where its run may take less.

A run whose time is over is a timeout, however short that time was: a worker needs some milliseconds to start
bash, more on a busy host. Only a worker that does not answer at all is a failure (504).
"""

MIN_GRACE = 2.0
"""Seconds that a worker has to begin its answer at the least, where `MAXREQTIME` is less."""

STARVATION_WINDOW = 60.0
"""Seconds for which one request that waited in vain speaks for the next, unless one is served."""


class Coordinator:
    """
    The coordinator's resource.

    `wall` tells the time that tickets are signed with, in seconds since the epoch.
    """

    app = Klein()
    register_error_handlers(app)
    serve_page(app)
    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        settings: CoordSettings,
        pool: Pool,
        proxy: WorkerClient,
        wall: Callable[[], float],
        runs: RunTracker,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._pool = pool
        self._proxy = proxy
        self._wall = wall
        self._runs = runs
        self._draining = False
        self._last_queue_timeout: float | None = None
        self._shares = ConcurrencyLimiter(settings.max_per_client)

    @app.route(formats.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """
        Run the script that is the body, or in it, on a machine from the pool.

        A request of a script counts as any other: among those of the address that it comes from.
        """
        run_id = self._runs.new_id()
        request.setHeader(formats.RUN_ID, run_id)
        try:
            await self._run(request, run_id)
        except HTTPError as refusal:
            self._runs.refused(refusal.reason)
            raise

    async def _run(self, request: Request, run_id: str) -> None:
        ask = parse_run_request(request)
        if self._draining:
            raise self._refusal(503, "shutting down", Refused.SHUTTING_DOWN)
        client = client_key(request, on_fly=self._settings.fly is not None)
        if not self._shares.acquire(client):
            raise self._refusal(429, "too many requests of yours are under way", Refused.CLIENT_LIMIT)
        run = self._runs.begin(run_id, client)
        try:
            self._replay_elsewhere(request, ask)
            allocation = await self._allocate(client)
            self._runs.served(run, allocation.machine.id)
            try:
                await self._answer(request, ask, run, allocation.machine)
            finally:
                allocation.release()
        except HTTPError as refusal:
            run.ending = refusal.reason
            raise
        except CancelledError:
            run.ending = "left"
            raise
        finally:
            self._shares.release(client)
            self._runs.end(run)

    @app.route(formats.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Tell that we are alive."""
        return text_response(request, "ok")

    @app.route("/readyz", methods=["GET"])
    def readyz(self, request: Request) -> bytes:
        """Tell whether a run that came now would find a machine, as far as we know; 503 and why if not."""
        reason = self.not_ready_reason
        if reason is not None:
            raise HTTPError(503, reason, {"Retry-After": self._retry_after})
        return text_response(request, "ready")

    @app.route("/status", methods=["GET"])
    def status(self, request: Request) -> bytes:
        """Tell, as JSON, what the pool and the line look like, and what became of the latest runs."""
        settings, pool = self._settings, self._pool
        phases = {phase.value: count for phase in Phase if (count := pool.count(phase))}
        told = {
            "pool": {
                "name": settings.machine_id, "size": settings.pool_size, "standby": settings.standby,
                "machines": phases,
            },
            "queue": {
                "waiting": pool.waiting, "limit": settings.max_queue,
                "expected_wait_ms": round(1000 * pool.expected_wait),
            },
            "max_req_time_ms": round(1000 * settings.max_req_time),
            "draining": self._draining,
            "runs": self._runs.status(),
        }  # fmt: skip
        return text_response(request, json.dumps(told), "application/json")

    async def drain(self) -> None:
        """Take no more runs, and wait until those that are under way have ended."""
        self._draining = True
        await self._runs.wait_idle()

    @property
    def not_ready_reason(self) -> str | None:
        """What speaks against a machine, in time, for a request that comes now; None where nothing does."""
        settings, pool = self._settings, self._pool
        if self._draining:
            return "shutting down"
        if (reason := pool.not_ready_reason) is not None:
            return reason
        if pool.queue_depth_ahead > settings.max_queue:
            return "too many requests are waiting"
        waited = self._last_queue_timeout
        in_vain = waited is not None and self._clock.seconds() - waited < STARVATION_WINDOW
        return "requests wait in vain" if in_vain and not pool.count(Phase.READY) else None

    async def _allocate(self, client: str) -> Allocation:
        settings = self._settings
        if self._pool.queue_depth_ahead > settings.max_queue:
            raise self._refusal(503, "too many requests are waiting", Refused.QUEUE_FULL)
        try:
            allocation = await Deadline(self._clock, settings.max_wait).run(self._pool.allocate(client))
        except DeadlineExceededError:
            self._last_queue_timeout = self._clock.seconds()
            line = f"no worker within {settings.max_wait:g} s"
            raise self._refusal(503, line, Refused.QUEUE_TIMEOUT) from None
        except PoolClosedError:
            raise self._refusal(503, "shutting down", Refused.SHUTTING_DOWN) from None
        self._last_queue_timeout = None
        return allocation

    def _replay_elsewhere(self, request: Request, ask: RunRequest) -> None:
        """
        Where that is wanted, let Fly's proxy take the request to a coordinator that may have a machine.

        Once: the proxy sends the next coordinator in `fly-replay-src` the state that this one set. If the
        proxy reaches no other machine within `REPLAY_TIMEOUT`, it sends the request back with
        `fly-replay-failed`, and the request waits here. Without that fallback the client would get an empty
        502 (https://fly.io/docs/networking/dynamic-request-routing/#replay-timeout-and-fallback).
        """
        settings = self._settings
        if not settings.replay or ask.size > MAX_REPLAYED or self._pool.queue_depth_ahead == 0:
            return
        source = request.getHeader(b"fly-replay-src") or b""
        is_replayed = f"state={REPLAYED}".encode() in [part.strip() for part in source.split(b";")]
        if not is_replayed and not request.requestHeaders.hasHeader(b"fly-replay-failed"):
            where = f"elsewhere=true;timeout={REPLAY_TIMEOUT};fallback=force_self;state={REPLAYED}"
            refusal = self._refusal(503, "no worker here; trying elsewhere", Refused.REPLAYED)
            refusal.headers["fly-replay"] = where
            raise refusal

    def _refusal(self, code: int, line: str, reason: Refused) -> HTTPError:
        """Refuse a request, with when to come back."""
        return HTTPError(code, line, {"Retry-After": self._retry_after}, reason)

    @property
    def _retry_after(self) -> str:
        """
        Choose when a client should come back: in whole seconds, at least one.

        By then all requests that wait now should have been served, by what the pool expects. If that is
        wrong, they have ended after `MAXWAIT`, and the last to be served has had its `MAXREQTIME`.
        """
        longest = self._settings.max_wait + self._settings.max_req_time
        return str(max(1, ceil(min(self._pool.expected_wait, longest))))

    async def _answer(self, request: Request, ask: RunRequest, run: Run, machine: Machine) -> None:
        """Relay one run within its time; whatever happens, the answer has one ending."""
        settings = self._settings
        started = self._clock.seconds()
        limit = ask.effective_timeout(settings.max_req_time)
        deadline = Deadline(self._clock, limit)
        first = Deadline(self._clock, max(limit, min(settings.max_req_time, MAX_GRACE), MIN_GRACE))
        format_ = formats.requested_format(request.args, request.getHeader("Accept") or "")
        answer = RunResponse(request, format_, self._clock)
        headers = {formats.WORKER: machine.id, formats.COORD: settings.machine_id, **UNCOMPRESSED}
        ticket = settings.signer.sign(machine.id, self._wall())
        try:
            response = await first.run(self._proxy.begin(machine, ticket, run.id, ask, format_))
            exit_ = await deadline.run(self._proxy.stream(response, format_, answer, headers))
            run.ending = exit_.reason if exit_.reason in _REASONS else f"exit {exit_.code}"
        except DeadlineExceededError:
            run.ending = formats.Reason.TIMEOUT
            if not answer.started:
                line = "the worker did not answer in time"
                raise HTTPError(504, line, reason=Refused.WORKER_TIMEOUT) from None
            answer.end(formats.Exit.forced(formats.Reason.TIMEOUT, self._since(started)))
        except WorkerError as error:
            self._log.warn(
                "run {run}: {machine} failed: {error}", run=run.id, machine=machine.id, error=error
            )
            if isinstance(error, NotStartedError):
                line = "the worker could not start the script"
                raise HTTPError(502, line, reason=Refused.NOT_STARTED) from None
            raise HTTPError(502, "the worker failed", reason=Refused.WORKER_FAILED) from None
        finally:
            answer.close()
            run.response_at, run.first_byte_at = answer.started_at, answer.first_byte_at
            run.bytes = answer.bytes_written

    def _since(self, moment: float) -> int:
        """Milliseconds since then."""
        return round(1000 * (self._clock.seconds() - moment))
