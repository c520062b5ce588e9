"""
What a worker is for: one authenticated script is taken, run, and its output streamed.

A worker that listens loads this, and klein with it, behind its first answer (see `bfaas.basher`).
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
from bfaas.http.server import HTTPError, register_error_handlers, text_response
from bfaas.protocol import formats
from bfaas.protocol.request import parse_run_request
from bfaas.protocol.response import RunResponse
from bfaas.tokens import AuthError
from bfaas.worker.bash_process import BashRun, script_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from bfaas.protocol.request import RunRequest
    from bfaas.settings import BasherSettings
    from bfaas.worker.bash_process import BashReactor


class WorkerApp:
    """
    The worker's resource. `finished` is called once, when its one run is over and answered.

    `wall` tells the time that tickets are checked against, in seconds since the epoch.
    """

    app = Klein()
    register_error_handlers(app)
    _log = Logger()
    _REFUSALS_TOLD = 3

    def __init__(
        self,
        reactor: BashReactor,
        settings: BasherSettings,
        wall: Callable[[], float],
        finished: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._wall = wall
        self._finished = finished
        self._refused = 0
        self._used = False
        self._run: BashRun | None = None

    @app.route(formats.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Tell that we listen, and who we are."""
        request.setHeader(formats.WORKER, self._settings.machine_id)
        return text_response(request, "ok")

    @app.route(formats.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """Run the script that is the body, or in it."""
        settings = self._settings
        try:
            ticket = request.getHeader(formats.AUTHORIZATION) or ""
            settings.verifier.verify(ticket, settings.machine_id, self._wall())
        except AuthError as error:
            self._tell_refusal(str(error))
            raise HTTPError(401, "unauthorized") from None
        if self._used:
            raise HTTPError(409, "this worker has had its run")
        ask = parse_run_request(request)
        with suppress(OSError):
            os.chdir(settings.home)  # it may have been removed and made again since we started
        format_ = formats.requested_format(request.args, request.getHeader("Accept") or "")
        answer = RunResponse(request, format_, self._reactor)
        run = BashRun(self._reactor, answer.output, settings.max_output)
        environment = script_environment(settings.home, settings.machine_id, settings.region, settings.run_as)
        try:
            self._used = True
            try:
                run.start(
                    self._reactor, ask, environment, settings.sandbox, settings.run_as,
                    merged=format_ is formats.Format.RAW,
                )  # fmt: skip
            except OSError as error:
                raise self._not_started(str(error)) from None
            self._run = run
            exit_ = await self._within_time(run, answer, self._limit(ask))
            self._log.info("run {run}: {exit}", run=_run_id(request), exit=exit_)
            if exit_.reason == formats.Reason.NOT_STARTED:
                raise self._not_started(run.complaint)
            self._begin(run, answer)  # where it was ended before bash had begun
            answer.end(exit_)
        except CancelledError:
            self._log.info("run {run}: the client has left", run=_run_id(request))
            raise
        finally:
            answer.close()
            self._finished()

    def _not_started(self, why: str) -> HTTPError:
        """Refuse a request whose script has not begun: that is not the script's own exit."""
        why = why or "no message; a SANDBOX must leave open descriptors open"
        self._log.error("bash cannot be started: {why}", why=why)
        return HTTPError(500, "bash cannot be started")

    def _begin(self, run: BashRun, answer: RunResponse) -> None:
        if not answer.started:
            answer.start(run, {formats.WORKER: self._settings.machine_id})

    def _tell_refusal(self, reason: str) -> None:
        """Log the first few: a script can ask its own worker as often as it likes."""
        self._refused += 1
        if self._refused <= self._REFUSALS_TOLD:
            last = " (others will not be told)" if self._refused == self._REFUSALS_TOLD else ""
            self._log.warn("refused a request: {reason}{last}", reason=reason, last=last)

    def _limit(self, ask: RunRequest) -> float | None:
        """Tell how long a run may take: what was asked for, and no more than any may."""
        most = self._settings.max_req_time
        return ask.timeout if most is None else ask.effective_timeout(most)

    async def _within_time(self, run: BashRun, answer: RunResponse, limit: float | None) -> formats.Exit:
        """
        Answer once bash has begun, and wait for the run's end.

        Kills it at the deadline, and at once when the client has left.
        """

        async def follow() -> formats.Exit:
            if await run.when_begun():
                self._begin(run, answer)
            return await run.when_ended()

        try:
            if limit is not None:
                try:
                    return await Deadline(self._reactor, limit).run(follow())
                except DeadlineExceededError:
                    run.kill(formats.Reason.TIMEOUT)
                    return await run.when_ended()
            return await follow()
        finally:
            run.kill()

    async def stop(self) -> None:
        """Kill what runs, and wait until nothing of it is left."""
        if self._run is not None:
            self._run.kill(formats.Reason.WORKER_LOST)
            await self._run.when_ended()


def _run_id(request: Request) -> str:
    """Read what the coordinator calls the run; nothing else that comes in the header is for the log."""
    told = request.getHeader(formats.RUN_ID) or ""
    return told if re.fullmatch("[0-9a-f]{16}", told) else "of no name"
