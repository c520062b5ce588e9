"""
The worker's HTTP application: runs one authenticated script and streams its output.

A worker loads this module, and klein with it, after its first health check response (see `bfaas.basher`).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from klein import Klein
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.errors import HTTPError
from bfaas.http.server import register_error_handlers, text_response
from bfaas.protocol import formats
from bfaas.protocol.http_request import parse_run_request, response_format
from bfaas.protocol.response import RunResponse
from bfaas.tokens import AuthError
from bfaas.worker.bash_process import BashRun, script_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from bfaas.protocol.request import RunRequest
    from bfaas.settings import BasherSettings
    from bfaas.system.confinement import Confinement
    from bfaas.worker.bash_process import BashReactor


class WorkerApp:
    """
    The worker's routes.

    `wall_clock` returns the seconds since the epoch, which auth tokens are checked against. `on_finished` is
    called once, when the worker's only run has ended and its response has been written.
    """

    app = Klein()
    register_error_handlers(app)
    _log = Logger()
    _LOGGED_REJECTIONS = 3

    def __init__(
        self,
        reactor: BashReactor,
        settings: BasherSettings,
        confinement: Confinement,
        wall_clock: Callable[[], float],
        on_finished: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._confinement = confinement
        self._wall_clock = wall_clock
        self._on_finished = on_finished
        self._rejections = 0
        self._used = False
        self._run: BashRun | None = None

    @app.route(formats.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Return 200 with the machine's id: the worker listens."""
        request.setHeader(formats.WORKER, self._settings.machine_id)
        return text_response(request, "ok")

    @app.route(formats.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """Run the script in the body and stream its output."""
        self._authenticate(request)
        if self._used:
            raise HTTPError(409, "this worker has already run a script")
        run_request = parse_run_request(request)
        format_ = response_format(request)
        response = RunResponse(request, format_, self._reactor)
        run_id = _run_id(request)
        self._used = True
        try:
            run = self._start(run_request, response, merge_output=format_ is formats.Format.RAW)
            self._run = run
            exit_ = await self._wait(run, response, self._time_limit(run_request))
            self._log.info("run {run}: {exit}", run=run_id, exit=exit_)
            if exit_.reason == formats.Reason.NOT_STARTED:
                raise self._start_error(run.startup_errors)
            self._start_response(run, response)  # a run may be killed before its script starts
            response.end(exit_)
        except CancelledError:
            self._log.info("run {run}: the client disconnected", run=run_id)
            raise
        finally:
            response.close()
            self._on_finished()

    def _authenticate(self, request: Request) -> None:
        """Verify the auth token. Raises `HTTPError` with 401, without the reason, which is only logged."""
        token = request.getHeader(formats.AUTHORIZATION) or ""
        try:
            self._settings.verifier.verify(token, self._settings.machine_id, self._wall_clock())
        except AuthError as error:
            self._log_rejection(str(error))
            raise HTTPError(401, "unauthorized") from None

    def _log_rejection(self, reason: str) -> None:
        """Log only the first few rejections: a script can send its own worker any number of requests."""
        self._rejections += 1
        if self._rejections <= self._LOGGED_REJECTIONS:
            is_last = self._rejections == self._LOGGED_REJECTIONS
            note = " (further rejections are not logged)" if is_last else ""
            self._log.warn("rejected a request: {reason}{note}", reason=reason, note=note)

    def _start(self, request: RunRequest, response: RunResponse, *, merge_output: bool) -> BashRun:
        """Start bash. Raises `HTTPError`."""
        settings = self._settings
        with suppress(OSError):
            os.chdir(settings.home)  # the directory may have been replaced since the worker started
        environment = script_environment(
            settings.home, settings.machine_id, settings.region, self._confinement
        )
        run = BashRun(self._reactor, response.output, settings.max_output)
        try:
            run.start(request, environment, self._confinement, merge_output=merge_output)
        except OSError as error:
            raise self._start_error(str(error)) from None
        return run

    def _start_error(self, reason: str) -> HTTPError:
        """Log why bash did not start, and return the error response."""
        reason = reason or "no message; a SANDBOX must not close inherited descriptors"
        self._log.error("bash cannot be started: {reason}", reason=reason)
        return HTTPError(500, "bash cannot be started")

    def _start_response(self, run: BashRun, response: RunResponse) -> None:
        if not response.started:
            response.start(run, {formats.WORKER: self._settings.machine_id})

    def _time_limit(self, request: RunRequest) -> float | None:
        """Return the requested timeout, at most that of the settings, in seconds; None means no limit."""
        maximum = self._settings.max_req_time
        return request.timeout if maximum is None else request.effective_timeout(maximum)

    async def _wait(self, run: BashRun, response: RunResponse, limit: float | None) -> formats.Exit:
        """
        Start the response once the script has started, and wait for the end of the run.

        Kills the run after `limit` seconds, or when this is cancelled because the client has disconnected.
        """

        async def follow() -> formats.Exit:
            if await run.wait_started():
                self._start_response(run, response)
            return await run.wait_ended()

        try:
            if limit is None:
                return await follow()
            try:
                return await Deadline(self._reactor, limit).run(follow())
            except DeadlineExceededError:
                run.kill(formats.Reason.TIMEOUT)
                return await run.wait_ended()
        finally:
            run.kill()

    async def stop(self) -> None:
        """Kill the run, if any, and wait until it has ended."""
        if self._run is not None:
            self._run.kill(formats.Reason.WORKER_LOST)
            await self._run.wait_ended()


def _run_id(request: Request) -> str:
    """Return the coordinator's id of the run. Other values of the header are not logged."""
    run_id = request.getHeader(formats.RUN_ID) or ""
    return run_id if re.fullmatch("[0-9a-f]{16}", run_id) else "without an id"
