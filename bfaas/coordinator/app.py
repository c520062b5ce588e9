"""The coordinator's HTTP application: runs each script on its own worker machine, within its time limit."""

from __future__ import annotations

import json
from math import ceil
from typing import TYPE_CHECKING

from klein import Klein
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from bfaas import __version__
from bfaas.coordinator.client_limits import Client, ConcurrencyLimiter, client_key
from bfaas.coordinator.outcome import Outcome, OutcomeKind
from bfaas.coordinator.ui import serve_page
from bfaas.coordinator.worker_client import NotStartedError, WorkerError
from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.errors import HTTPError
from bfaas.http.server import register_error_handlers, text_response
from bfaas.pool import PoolClosedError
from bfaas.pooling.config import worker_max_body
from bfaas.pooling.slot import Phase
from bfaas.protocol import formats
from bfaas.protocol.http_request import parse_run_request, response_format
from bfaas.protocol.response import RunResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IReactorTime
    from twisted.web.server import Request

    from bfaas.coordinator.access import AccessControl
    from bfaas.coordinator.run_tracker import Run, RunTracker
    from bfaas.coordinator.worker_client import WorkerClient
    from bfaas.machines.api import Machine
    from bfaas.pool import Allocation, Pool
    from bfaas.protocol.request import RunRequest
    from bfaas.settings import CoordSettings

MAX_REPLAY_BODY = 1_000_000
"""Largest request body, in bytes, that Fly's proxy replays."""

REPLAY_STATE = "bfaas-replayed"
"""The `state` of `fly-replay` that marks a request as replayed."""

REPLAY_TIMEOUT = "2s"
"""How long Fly's proxy tries to reach another coordinator before it returns a request."""

UNCOMPRESSED = {"Content-Encoding": "identity"}
"""
Keeps proxies from compressing a stream: some buffer it until its end.

Nothing else is known to stop Caddy (2.6) and Fly's proxy. RFC 9110 (8.4.1) discourages `identity` as
redundant; HTTP clients accept it as such.
"""

MAX_GRACE = 5.0
"""
Seconds that a worker has to start its response if the run's limit is shorter, but at most `MAXREQTIME`.

A run that exceeds its limit is a timeout, however short the limit: a worker needs some milliseconds to start
bash, more on a busy host. Only a worker that does not respond at all is a failure (504).
"""

MIN_GRACE = 2.0
"""Seconds that a worker has to start its response even if `MAXREQTIME` is shorter."""

REQUEST_ID = b"Request-Id"
"""The header with which a client names its request, so that `/status` can tell its place in the queue."""

STARVATION_WINDOW = 60.0
"""Seconds after a queue timeout during which `/readyz` reports 503, unless a request gets a machine."""


class RunRejectedError(HTTPError):
    """A request is answered with this error; `kind` is its outcome."""

    def __init__(self, code: int, message: str, kind: OutcomeKind, retry_after: str | None = None) -> None:
        super().__init__(code, message, None if retry_after is None else {"Retry-After": retry_after})
        self.kind = kind


class Coordinator:
    """
    The coordinator's HTTP application.

    `wall_clock` returns the time in seconds since the epoch, for auth tokens. `sandbox` is what separates
    scripts from each other and from the host, for users to read. Without `access`, clients need no token.
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
        worker_client: WorkerClient,
        wall_clock: Callable[[], float],
        runs: RunTracker,
        sandbox: str,
        access: AccessControl | None = None,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._pool = pool
        self._worker_client = worker_client
        self._wall_clock = wall_clock
        self._runs = runs
        self._sandbox = sandbox
        self._access = access
        self._draining = False
        self._last_queue_timeout: float | None = None
        self._limiter = ConcurrencyLimiter(settings.max_per_client)

    @app.route(formats.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """
        Run the script in the request's body on a machine from the pool.

        Requests that come from inside a script count towards the limit of the address that they come from.
        """
        run_id = self._runs.new_id()
        request.setHeader(formats.RUN_ID, run_id)
        try:
            client = self._identify(request)
        except HTTPError:
            self._runs.rejected(OutcomeKind.UNAUTHORIZED)
            raise
        try:
            run_request = self._parse(request)
        except HTTPError:
            self._runs.rejected(OutcomeKind.INVALID_REQUEST)
            raise
        try:
            await self._run(request, run_request, run_id, client)
        except RunRejectedError as error:
            self._runs.rejected(error.kind)
            raise

    def _identify(self, request: Request) -> Client:
        """Return the client of a request. Raises `HTTPError` if it needs a token and has no valid one."""
        if self._access is None:
            return Client(client_key(request, on_fly=self._settings.fly is not None))
        name = self._access.client_name(request)
        return Client(name, name)

    def _parse(self, request: Request) -> RunRequest:
        max_body = self._settings.max_body
        run_request = parse_run_request(request, max_unpacked=max_body)
        if len(run_request.body) > worker_max_body(max_body):
            raise HTTPError(413, "the form is too large as JSON: its text has too many control characters")
        return run_request

    async def _run(self, request: Request, run_request: RunRequest, run_id: str, client: Client) -> None:
        if self._draining:
            raise self._rejection(503, "shutting down", OutcomeKind.SHUTTING_DOWN)
        if not self._limiter.acquire(client.key):
            message = "too many concurrent requests from this client"
            raise self._rejection(429, message, OutcomeKind.CLIENT_LIMIT)
        run = self._runs.begin(run_id, client)
        run.request_id = (request.getHeader(REQUEST_ID) or b"").decode("latin-1")
        try:
            self._replay_elsewhere(request, run_request)
            allocation = await self._allocate(run)
            self._runs.started(run, allocation.machine.id)
            try:
                await self._run_on(allocation.machine, request, run_request, run)
            finally:
                allocation.release()
        except RunRejectedError as error:
            run.outcome = Outcome(error.kind)
            raise
        except CancelledError:
            run.outcome = Outcome(OutcomeKind.CLIENT_DISCONNECTED)
            raise
        finally:
            self._limiter.release(client.key)
            self._runs.end(run)

    @app.route(formats.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Report that the process is alive."""
        return text_response(request, "ok")

    @app.route("/readyz", methods=["GET"])
    def readyz(self, request: Request) -> bytes:
        """Report whether a new request could get a machine; 503 with the reason if not."""
        reason = self.not_ready_reason
        if reason is not None:
            raise HTTPError(503, reason, {"Retry-After": self._retry_after})
        return text_response(request, "ready")

    @app.route("/status", methods=["GET"])
    def status(self, request: Request) -> bytes:
        """
        Return the state of the pool and the queue, and the latest runs, as JSON.

        The argument `request` has the `Request-Id` of a request, whose place in the queue is returned too. If
        clients need access tokens, this needs one too, and runs have the names of theirs.
        """
        self._identify(request)
        settings, pool = self._settings, self._pool
        queue: dict[str, object] = {
            "waiting": pool.waiting,
            "limit": settings.max_queue,
            "expected_wait_ms": round(1000 * pool.expected_wait),
        }
        for request_id in request.args.get(b"request", [])[:1]:
            queue["position"] = self._queue_position(request_id.decode("latin-1"))
        payload = {
            "version": __version__,
            "sandbox": self._sandbox,
            "pool": {
                "name": settings.machine_id,
                "size": settings.pool_size,
                "standby": settings.standby,
                "machines": {phase.value: count for phase in Phase if (count := pool.count(phase))},
            },
            "queue": queue,
            "max_req_time_ms": round(1000 * settings.max_req_time),
            "max_body_bytes": settings.max_body,
            "max_output_bytes": settings.max_output,
            "draining": self._draining,
            "runs": self._runs.status(),
        }
        return text_response(request, json.dumps(payload), "application/json")

    def _queue_position(self, request_id: str) -> int | None:
        run = self._runs.find(request_id)
        if run is None or run.queue_entry is None:
            return None
        return self._pool.queue_position(run.client.key, run.queue_entry)

    async def drain(self) -> None:
        """Reject new requests, and wait until the active ones have ended."""
        self._draining = True
        await self._runs.wait_idle()

    @property
    def not_ready_reason(self) -> str | None:
        """Why a new request could not get a machine in time; None if it could."""
        settings, pool = self._settings, self._pool
        if self._draining:
            return "shutting down"
        if (reason := pool.not_ready_reason) is not None:
            return reason
        if pool.queue_depth_ahead > settings.max_queue:
            return "too many requests are waiting"
        last_timeout = self._last_queue_timeout
        is_starved = last_timeout is not None and self._clock.seconds() - last_timeout < STARVATION_WINDOW
        return (
            "recent requests timed out in the queue" if is_starved and not pool.count(Phase.READY) else None
        )

    async def _allocate(self, run: Run) -> Allocation:
        """Wait for a machine. Raise `RunRejectedError` if the queue is full, or after `MAXWAIT`."""
        settings = self._settings
        if self._pool.queue_depth_ahead > settings.max_queue:
            raise self._rejection(503, "too many requests are waiting", OutcomeKind.QUEUE_FULL)
        run.queue_entry = self._pool.allocate(run.client.key)
        try:
            allocation = await Deadline(self._clock, settings.max_wait).run(run.queue_entry)
        except DeadlineExceededError:
            self._last_queue_timeout = self._clock.seconds()
            message = f"no worker available within {settings.max_wait:g} s"
            raise self._rejection(503, message, OutcomeKind.QUEUE_TIMEOUT) from None
        except PoolClosedError:
            raise self._rejection(503, "shutting down", OutcomeKind.SHUTTING_DOWN) from None
        finally:
            run.queue_entry = None
        self._last_queue_timeout = None
        return allocation

    def _replay_elsewhere(self, request: Request, run_request: RunRequest) -> None:
        """
        Raise a `RunRejectedError` that has Fly's proxy replay the request elsewhere, if configured.

        A request is replayed only if it would have to wait here, and only once: the proxy returns the state
        set here in `fly-replay-src`. If the proxy reaches no other machine within `REPLAY_TIMEOUT`,
        it returns the request with `fly-replay-failed`, and the request waits here. Without that fallback the
        client would get an empty 502
        (https://fly.io/docs/networking/dynamic-request-routing/#replay-timeout-and-fallback).
        """
        settings = self._settings
        if (
            not settings.replay
            or run_request.size > MAX_REPLAY_BODY
            or self._pool.queue_depth_ahead == 0
            or request.requestHeaders.hasHeader(b"fly-replay-failed")
        ):
            return
        source = request.getHeader(b"fly-replay-src") or b""
        if f"state={REPLAY_STATE}".encode() in [part.strip() for part in source.split(b";")]:
            return
        message = "no worker available here; trying another coordinator"
        rejection = self._rejection(503, message, OutcomeKind.REPLAYED)
        rejection.headers["fly-replay"] = (
            f"elsewhere=true;timeout={REPLAY_TIMEOUT};fallback=force_self;state={REPLAY_STATE}"
        )
        raise rejection

    def _rejection(self, code: int, message: str, kind: OutcomeKind) -> RunRejectedError:
        """Return a rejection with `Retry-After`."""
        return RunRejectedError(code, message, kind, self._retry_after)

    @property
    def _retry_after(self) -> str:
        """
        The value of `Retry-After`: whole seconds, at least 1.

        This is the pool's estimate of when all queued requests have been served, but at most `MAXWAIT` plus
        `MAXREQTIME`: by then each of them has timed out in the queue or has been served.
        """
        max_delay = self._settings.max_wait + self._settings.max_req_time
        return str(max(1, ceil(min(self._pool.expected_wait, max_delay))))

    async def _run_on(self, machine: Machine, request: Request, run_request: RunRequest, run: Run) -> None:
        """
        Run the script on a machine, and stream its output to the client, within the run's time limit.

        Set the outcome, the times and the size of `run`. Raise `RunRejectedError` if no response was started.
        """
        if run_request.content_type is not None and self._worker_client.scripts_only:
            message = "the workers of this coordinator support scripts only: no input, files or other options"
            raise RunRejectedError(400, message, OutcomeKind.INVALID_REQUEST)
        settings = self._settings
        started_at = self._clock.seconds()
        limit = run_request.effective_timeout(settings.max_req_time)
        deadline = Deadline(self._clock, limit)
        response_limit = max(limit, min(settings.max_req_time, MAX_GRACE), MIN_GRACE)
        response_deadline = Deadline(self._clock, response_limit)
        format_ = response_format(request)
        response = RunResponse(request, format_, self._clock)
        headers = {formats.WORKER: machine.id, formats.COORD: settings.machine_id, **UNCOMPRESSED}
        auth_token = settings.signer.sign(machine.id, self._wall_clock())
        client = self._worker_client
        try:
            worker_response = await response_deadline.run(
                client.start_run(machine, auth_token, run.id, run_request, format_)
            )
            exit_ = await deadline.run(
                client.stream(
                    machine, run.id, worker_response, format_, response, headers, run_request.outputs
                )
            )
            run.outcome = Outcome.from_exit(exit_)
        except DeadlineExceededError:
            run.outcome = Outcome(OutcomeKind.TIMEOUT)
            if not response.started:
                message = "the worker did not respond in time"
                raise RunRejectedError(504, message, OutcomeKind.WORKER_TIMEOUT) from None
            elapsed_ms = round(1000 * (self._clock.seconds() - started_at))
            response.end(formats.Exit.forced(formats.Reason.TIMEOUT, elapsed_ms))
        except WorkerError as error:
            self._log.warn(
                "run {run}: {machine} failed: {error}", run=run.id, machine=machine.id, error=error
            )
            if isinstance(error, NotStartedError):
                message = "the worker could not start the script"
                raise RunRejectedError(502, message, OutcomeKind.NOT_STARTED) from None
            raise RunRejectedError(502, "the worker failed", OutcomeKind.WORKER_FAILED) from None
        finally:
            response.close()
            run.response_at, run.first_byte_at = response.started_at, response.first_byte_at
            run.bytes = response.bytes_written
